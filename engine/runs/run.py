"""A run: its folder, and everything that is made from the folder's files.

recipe.toml      every setting, resolved
config.json      the encoder's shape, as in a Hugging Face model folder
tokenizer.json   (and vocab.txt, tokenizer_config.json)
metrics.jsonl    a line for every training step; evaluations.jsonl, for every evaluation
metrics.json     the scores of the last evaluation, and the memory that training took
checkpoints/     see engine/checkpoints/store.py
output.log       what it printed, where several runs of a sweep were trained at once
.superbert.lock  held by the process that trains it, see engine/runs/lock.py
"""

import os
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints.manifest import Progress, read_manifest
from ..checkpoints.store import Checkpoints, load_weights
from ..config import recipe as recipes
from ..config.recipe import Recipe
from ..config.tables import EncoderRecipe
from ..data.addresses import Place
from ..data.cache import Reading, load_split
from ..data.hub_stream import HubStream
from ..data.masked_text import MaskedText
from ..data.origins import Origin
from ..data.prepare import Preparation
from ..data.sentences_twice import SentencesTwice
from ..data.split import TokenizedSplit, tokenize
from ..data.stream_order import StreamOrder
from ..data.streamed import StreamedExamples
from ..data.table import OnBadRow, Table
from ..data.task_schema import TaskSchema
from ..data.tokenizer import Tokenizer
from ..models import hf_weights
from ..models.config import EncoderConfig
from ..models.heads import CROSS, head_class
from ..models.multitask import MultitaskModel
from ..models.random_weights import WithoutRandomWeights
from ..models.registry import MODELS
from ..runtime.cpu import set_threads
from ..runtime.oom import SMALLER_MODEL, check_memory, memory_explained
from ..runtime.precision import pick_dtype
from ..utils.errors import InputError
from ..utils.files import explained, write_text
from ..utils.finite import all_finite
from ..utils.json_text import dump_json
from .data_paths import origin
from .folder import check_folder
from .initial_weights import compare, is_run
from .objectives import head_settings, load_examples
from .prune import PRUNED, is_pruned
from .texts import check_texts, learn_vocabulary

_BEST = ("average", "best", "step")
"""Kinds of checkpoints, the one with the best weights first."""
_PLAIN = Reading()
_INIT_TYPE = "init_model_type"
"""The entry of ``config.json`` for the type of the model that a run began from."""


class Run(NamedTuple):
    """One run's folder, opened.

    Attributes:
        folder: where everything lies.
        recipe: its settings.
        config: the encoder's shape.
        tokenizer: what its sentences are split with.
        init_type: the ``model_type`` of the model that it began from; empty for none.
        reading: how its data are read.
    """

    folder: Path
    recipe: Recipe
    config: EncoderConfig
    tokenizer: Tokenizer
    init_type: str = ""
    reading: Reading = Reading()

    @property
    def max_length(self) -> int:
        """The most tokens in a sentence."""
        return min(self.recipe.max_length, self.config.max_position_embeddings)

    @property
    def task_names(self) -> str:
        """The names of its tasks, for error messages."""
        return ", ".join(self.recipe.tasks) or "no task"

    @property
    def masked_lm(self) -> str | None:
        """The name of its objective that predicts masked words; None without one."""
        for name, settings in self.recipe.objectives.items():
            if head_class(settings.kind).fills_masks:
                return name
        return None

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.folder / "checkpoints")

    def write(self) -> None:
        """Write the folder's settings: recipe, encoder's shape, tokenizer.

        The recipe comes last: a folder that has one has the rest, which never changes.
        """
        if not (self.folder / "recipe.toml").exists():
            with explained("write", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.tokenizer.save(self.folder)
            shape = self.config.to_huggingface()
            if self.init_type:
                shape[_INIT_TYPE] = self.init_type
            write_text(self.folder / "config.json", dump_json(shape, indent=2) + "\n")
        write_text(self.folder / "recipe.toml", self.recipe.to_toml())

    def split(self, task: str, split: str) -> TokenizedSplit:
        """Return a labelled split of the run's data set, tokenized."""
        return self.read(self.recipe.split_schema(task, split), origin(self.recipe, task, split))

    def read(
        self,
        form: TaskSchema,
        origin: Origin,
        *,
        labelled: bool = True,
        on_bad_row: OnBadRow | None = None,
    ) -> TokenizedSplit:
        """Return the examples of a file or data set, tokenized for this run's encoder."""
        return load_split(
            origin,
            form,
            self.tokenizer,
            self.max_length,
            labelled=labelled,
            on_bad_row=on_bad_row or self.recipe.on_bad_row,
            joins_pairs=self._joins_pairs(form),
            reading=self.reading,
        )

    def stream(self, task: str, shard: tuple[int, int]) -> StreamedExamples:
        """Return the training examples of a streamed task, of one rank.

        Args:
            task: the task's name.
            shard: (rank, ranks).

        Raises:
            InputError: the data cannot be read, or have no row that can be used.
        """
        form, settings = self.recipe.split_schema(task, "train"), self.recipe.tasks[task]
        found = origin(self.recipe, task, "train")
        assert isinstance(found, HubStream)
        assert settings.source is not None
        return StreamedExamples(
            StreamOrder(
                stream=found,
                schema=form,
                size=settings.source.shuffle_buffer,
                seed=self.recipe.seed,
                shard=shard,
            ),
            Preparation(
                schema=form,
                labelled=True,
                on_bad_row=self.recipe.on_bad_row,
                max_length=self.max_length,
                joins_pairs=self._joins_pairs(form),
            ),
            self.tokenizer,
            self.reading,
            all_pieces=settings.tag_pieces == "all",
            folder=self.folder,
        )

    def tokenize(self, form: TaskSchema | None, table: Table) -> TokenizedSplit:
        """Return the examples of a table, tokenized; nothing goes into the cache.

        Args:
            form: the schema of a task of the run; None for sentences of none.
            table: read by it.
        """
        return tokenize(
            "" if form is None else form.task,
            table,
            self.tokenizer,
            self.max_length,
            schema=form,
            joins_pairs=form is not None and self._joins_pairs(form),
        )

    def _joins_pairs(self, form: TaskSchema) -> bool:
        """Return whether the head of a task takes pairs in one sequence."""
        return len(form.sentences) == 2 and self.recipe.tasks[form.task].head == CROSS

    def objective(
        self, name: str, files: Sequence[Place] | None = None
    ) -> MaskedText | SentencesTwice:
        """Return what an objective of the recipe is trained on.

        Args:
            name: the objective's.
            files: those that are dealt to this rank; None for all that the recipe names.

        Raises:
            InputError: its text cannot be read, or there is too little of it.
        """
        return load_examples(
            name, self.recipe, self.tokenizer, self.max_length, self.reading, files
        )

    def new_model(self) -> MultitaskModel:
        """Return the model as the run's seed initialises it, fp32, on the CPU."""
        with torch.random.fork_rng(devices=[]), memory_explained(SMALLER_MODEL):
            self._check_size()
            torch.manual_seed(self.recipe.seed)
            return self._build_model()

    def _model_to_load(self) -> MultitaskModel:
        """Return the model with weights that are yet to be read, fp32, on the CPU."""
        with memory_explained(SMALLER_MODEL):
            self._check_size()
            with WithoutRandomWeights():
                return self._build_model()

    def _model_without_memory(self) -> MultitaskModel:
        # Of tensors of none, random numbers would import torch's compiler.
        with torch.device("meta"), WithoutRandomWeights():
            return self._build_model()

    def _check_size(self) -> None:
        weights = sum(weight.numel() for weight in self._model_without_memory().parameters())
        check_memory(weights * torch.float32.itemsize, SMALLER_MODEL)

    def _build_model(self) -> MultitaskModel:
        return MultitaskModel(
            self.config,
            list(self.recipe.formats.values()),
            {task: settings.head for task, settings in self.recipe.tasks.items()},
            pooling=self.recipe.pooling,
            dropout_p=self.recipe.dropout,
            losses={task: settings.loss for task, settings in self.recipe.tasks.items()},
            class_losses={task: each.class_loss for task, each in self.recipe.tasks.items()},
            similarities={task: each.similarity for task, each in self.recipe.tasks.items()},
            thresholds={task: each.threshold for task, each in self.recipe.tasks.items()},
            adapter_width=self.recipe.adapter_width,
            objectives={
                name: head_settings(name, settings, self.config)
                for name, settings in self.recipe.objectives.items()
            },
            lora=self.recipe.lora,
        )

    def initial_model(self) -> MultitaskModel:
        """Return the model that training begins with, fp32, on the CPU.

        It has the pretrained weights, or those of the run that it begins from, if there are any.
        """
        model = self.new_model()
        if (begun_from := self.begun_from) is not None:
            taken = compare(self.recipe, begun_from.recipe)
            model.take_over(begun_from._best_model(), taken.heads, taken.adapters)
        elif self.recipe.init:
            folder = hf_weights.resolve(self.recipe.init)
            model.load_encoder(hf_weights.load_encoder_state(folder, self.config))
            for name in self.recipe.objectives:
                head = model.head(name)
                if head.is_pretrained:
                    head.load_pretrained(hf_weights.load_pretraining_heads(folder))
        return model

    def model_to_train(self) -> MultitaskModel:
        """Return the model that a phase starts from, or goes on with, fp32, on the CPU.

        It has the weights of the newest checkpoint, if there is one.  What ``init`` names is read
        only without, so that it may be gone when the run is resumed.
        """
        checkpoint = self.checkpoints.find("step")
        if checkpoint is None:
            return self.initial_model()
        model = self._model_to_load()
        load_weights(checkpoint, model)
        return model

    @property
    def begun_from(self) -> "Run | None":
        """The run that ``init`` names; None where it names a model folder, or nothing.

        Raises:
            InputError: it cannot be opened, or has no checkpoint.
        """
        if not self.recipe.init or not is_run(folder := hf_weights.resolve(self.recipe.init)):
            return None
        return open_trained(folder)

    @property
    def line_on_init(self) -> str:
        """A line on what the run takes from the one that ``init`` names; empty if it names none.

        Raises:
            InputError: that run cannot be used.
        """
        if (begun_from := self.begun_from) is None:
            return ""
        checkpoint = begun_from.checkpoints.find_first(_BEST)
        assert checkpoint is not None, "it was opened as a trained one"
        source = read_manifest(checkpoint).progress.source
        model = self._model_without_memory()
        heads = {name: list(model.head(name).parameters()) for name in model.heads}
        without = [name for name, weights in heads.items() if not weights]
        return compare(self.recipe, begun_from.recipe).line(self.recipe.init, source, without)

    def _best_model(self) -> MultitaskModel:
        model = self._model_to_load()
        self._load(model, _BEST)
        model.merge_lora()
        return model

    def trained_model(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        newest: bool = False,
        merged: bool = True,
    ) -> tuple[MultitaskModel, Progress]:
        """Return the model with the weights of the best checkpoint, and where that was.

        The best one is the average of several, if there is one (``average_best``).

        Args:
            device: where it goes.
            dtype: of its weights; None for what the run computes in on that device, so that
                scores are those of its evaluations.
            newest: take the newest checkpoint instead.
            merged: add low-rank updates to the encoder's weights, so that they cost nothing;
                answers differ from those of the training by rounding.

        Raises:
            InputError: the run has no checkpoint, or it cannot be used.
        """
        if device.type == "cpu":
            set_threads(0, 1)
        model = self._model_to_load()
        kinds = ("step",) if newest else _BEST
        checkpoint, progress = self._load(model, kinds)
        if merged:
            model.merge_lora()
        dtype = dtype or pick_dtype(self.recipe.precision, device)
        model = model.to(device).eval()
        model.cast(dtype)
        if not all_finite(model.parameters()):
            raise InputError(
                f"{checkpoint}: weights are beyond the range of {dtype}, in which the run "
                "computes; train it again with precision=bf16 or fp32"
            )
        return model, progress

    def _load(self, model: MultitaskModel, kinds: Sequence[str]) -> tuple[Path, Progress]:
        """Load a checkpoint; where a process that trains the run drops it, its successor.

        ``kinds`` are those to look for, in that order.
        """
        while checkpoint := self.checkpoints.find_first(kinds):
            try:
                return checkpoint, load_weights(checkpoint, model)
            except InputError:
                if os.path.lexists(checkpoint):
                    raise
        raise InputError(f"{self.folder}: {_without_checkpoint(self.folder)}")

    def with_data(self, folder: Path) -> "Run":
        """Return the same run with another data set."""
        return self._replace(recipe=self.recipe.model_copy(update={"data": str(folder)}))


def begin(
    recipe: Recipe,
    folder: Path,
    *,
    resumes: bool = False,
    reading: Reading = _PLAIN,
    ranks: int = 1,
) -> Run:
    """Plan a run in ``folder``; nothing is written yet.

    Args:
        recipe: the settings.
        folder: of the run.
        resumes: whether it may hold what a run wrote before it was cut off.
        reading: how its data are read.
        ranks: processes that train it.

    Raises:
        InputError: the folder holds something already, or the encoder or data cannot be used.
    """
    check_folder(folder, resumes=resumes)
    check_texts(recipe, ranks)
    init_type = ""
    if recipe.init:
        encoder, config = pretrained_encoder(recipe)
        folder_of_model = hf_weights.resolve(recipe.init)
        tokenizer = Tokenizer.load(folder_of_model)
        init_type = hf_weights.read_model_type(folder_of_model)
        recipe = recipe.model_copy(update={"encoder": encoder})
    else:
        tokenizer = learn_vocabulary(recipe, reading)
        shape = recipe.encoder.model_dump() | {"vocab_size": tokenizer.vocab_size}
        config = MODELS[shape.pop("model_type")].config(**shape)
    run = _run_of(folder, recipe, config, tokenizer, f"--init {recipe.init}")
    return run._replace(init_type=init_type, reading=reading)


def _run_of(
    folder: Path, recipe: Recipe, config: EncoderConfig, tokenizer: Tokenizer, where: str
) -> Run:
    """Put a run together.

    Raises:
        InputError: the tokenizer has numbers that the embedding table has no row for.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} entries, "
            f"the embedding table {config.vocab_size}; the two belong to different models"
        )
    return Run(folder, recipe, config, tokenizer)


def pretrained_encoder(recipe: Recipe) -> tuple[EncoderRecipe, EncoderConfig]:
    """Return the settings of a recipe's pretrained encoder in force, and its config under them.

    Raises:
        InputError: the model cannot be used, or the settings contradict it.
    """
    folder = hf_weights.resolve(recipe.init)
    if is_run(folder) and recipe.lora_rank:
        raise InputError(
            f"lora_rank = {recipe.lora_rank}: --init {recipe.init} is a run, to which PEFT cannot "
            "add the exported updates; export it by engine.export, and give that folder"
        )
    config = open_trained(folder).config if is_run(folder) else hf_weights.read_config(folder)
    found = recipe.encoder.of_model(config, f"--init {recipe.init}")
    if not is_run(folder):
        hf_weights.check_weights(folder, config)
    return found


def open_trained(folder: Path) -> Run:
    """Open a run that has a checkpoint.

    Raises:
        InputError: ``folder`` holds no run, or it has none.
    """
    run = open_run(folder)
    if not any(map(run.checkpoints.all, _BEST)):
        raise InputError(f"{run.folder}: {_without_checkpoint(run.folder)}")
    return run


def _without_checkpoint(folder: Path) -> str:
    if is_pruned(folder):
        return (
            f"{PRUNED}; metrics.json has its scores, train it into another folder for its weights"
        )
    return "no checkpoint yet; train it first"


def open_run(folder: Path) -> Run:
    """Open a run that exists.

    Raises:
        InputError: ``folder`` holds no run.
    """
    if not isfile(folder / "recipe.toml"):
        raise InputError(f"{folder}: holds no run (no recipe.toml); give a run's folder")
    recipe, _ = recipes.read(str(folder / "recipe.toml"))
    config = hf_weights.read_config(folder)
    if recipe.init:
        encoder, _ = EncoderRecipe().of_model(config, str(folder / "config.json"))
        recipe = recipe.model_copy(update={"encoder": encoder})
    run = _run_of(folder, recipe, config, Tokenizer.load(folder), str(folder))
    return run._replace(init_type=hf_weights.read_entry(folder, _INIT_TYPE))
