"""Recipes: every setting of a run, checked in one place.

A recipe is a TOML file; the built-in ones lie in ``engine/config/recipes``.  What a file leaves out
has the default below, and ``--set key=value`` replaces any field, nested ones by a dotted name
(``tasks.sts.head=cosine``).  An unknown key is an error that names the nearest known one,
by its letters or by what other trainers call it.
"""

import re
import warnings
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError, model_validator

from ..data.task_schedule import TASK_SCHEDULES, batch_sizes
from ..data.task_schema import FORMATS, TaskSchema
from ..distributed.gradient_sync import MODES
from ..gradients.balancing import METHODS, TORCHJD, BalanceSettings
from ..gradients.groups import GRANULARITIES
from ..metrics.loggers import LOGGERS
from ..models.lora import DEFAULT_PROJECTIONS, PROJECTIONS, LoraSettings
from ..models.pooling import POOLINGS
from ..optim.build import OPTIMIZERS
from ..optim.lr_schedule import SCHEDULES
from ..optim.torch_optimizer import OptionValue, is_torch, torch_arguments
from ..runtime.execution import EXECUTIONS
from ..runtime.precision import PRECISIONS
from ..utils.errors import InputError
from ..utils.field_types import (
    Count,
    Fraction,
    GivenName,
    Name,
    NonNegativeReal,
    Positive,
    PositiveReal,
    Settings,
)
from ..utils.untrusted_io import parse_toml, read_bytes
from .messages import FIELDS, first_problem, nearest
from .misplaced import misplaced, phase_by_mistake
from .objective import ObjectiveRecipe, check_objective
from .places import with_places
from .renamed import with_new_name, with_new_names
from .stream_checks import check_streams
from .tables import EncoderRecipe, TaskRecipe
from .task_checks import check_task

_NAME = re.compile(r"[_-]*[A-Za-z0-9][A-Za-z0-9_-]*")

RECIPES = Path(__file__).parent / "recipes"


OF_A_PHASE = (
    *(
        "train",
        "task_schedule",
        "epochs",
        "max_steps",
        "max_train_examples",
        "batch_size",
        "sampling_alpha",
    ),
    *("micro_batches", "checkpoint_layers", "freeze_encoder", "balance", "balancing"),
    *("balance_granularity", "optimizer", "optimizer_options", "momentum", "lr", "schedule"),
    *("schedule_power", "warmup", "betas", "eps", "weight_decay", "clip_norm", "eval_every"),
    *("patience", "ema_decay", "layer_lr_decay", "head_lr"),
)
"""The settings that a phase may have of its own."""


class Recipe(Settings):
    """Every setting of a run."""

    description: str = ""
    """One line for ``--list``."""
    paper: str = ""
    """The paper whose system this is, or empty."""

    data: Name = ""
    """Folder of the data files (``--data``); empty: that of the recipe's file, where its own files
    are there, or the embedded demo corpus."""
    init: Name = ""
    """Folder or hub name of a pretrained encoder (``--init``), or a run's folder, whose encoder,
    heads and adapters are taken (engine/runs/initial_weights.py); empty to train from scratch."""

    tasks: dict[str, TaskRecipe] = {}
    """The tasks that are evaluated; none where a recipe trains objectives alone."""
    objectives: dict[str, ObjectiveRecipe] = {}
    """What can be trained without labels, by name (engine/config/objective.py)."""
    train: tuple[str, ...] = Field(min_length=1)
    """The tasks, or objectives, that are trained."""
    pooling: Literal[POOLINGS] = "mean"  # type: ignore[valid-type]
    """Sentence vector: the first token's state (cls) or the mean over tokens."""
    dropout: Fraction = 0.1
    """Dropout before the heads."""
    adapter_width: Count = 0
    """Width of a projected attention layer for each task, beside every layer; 0: none."""
    freeze_encoder: bool = False
    """Train only what lies outside the encoder: heads, shared layers, adapters.  Low-rank updates
    are within it."""
    lora_rank: Count = 0
    """Rank of the low-rank updates (LoRA) that a pretrained encoder is trained by, all its own
    weights frozen; 0: none, the encoder's weights are trained."""
    lora_alpha: PositiveReal = 8.0
    """The updates are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Fraction = 0.0
    """Dropout of the updates' inputs."""
    lora_targets: tuple[Literal[PROJECTIONS], ...] = DEFAULT_PROJECTIONS  # type: ignore[valid-type]
    """The linear layers that have updates: query, key, value and attention_output of attention,
    intermediate and output of the feed-forward layer."""
    encoder: EncoderRecipe = EncoderRecipe()
    """Shape of an encoder trained from scratch, and dropout; with ``--init`` what is left out is
    the model's own, and so is the shape (:class:`.EncoderRecipe`)."""
    max_length: Annotated[int, Field(ge=3)] = 512
    """Longest sequence in tokens; the model's own limit counts if it is lower."""

    batch_size: Positive = 32
    """Examples of each task in a step; ``tasks.NAME.batch_size`` is that of one task."""
    sampling_alpha: Annotated[float, Field(ge=0, le=10)] = 0.0
    """How tasks share by the sizes N of their training sets, as N^sampling_alpha: the examples of a
    step (together; they are batch_size on average), or the steps (sampled).  0: all alike; 1: as
    large as they are (MT-DNN); 1 / T: T5's temperature T."""
    micro_batches: Annotated[int, Field(ge=1, le=256)] = 1
    """Parts in which a batch goes through the model, one after the other; they save memory."""
    checkpoint_layers: bool = False
    """Compute the inside of each layer again in the backward pass, which saves memory too."""
    task_schedule: Literal[TASK_SCHEDULES] = "together"  # type: ignore[valid-type]
    """together: a step has a batch of every task, their gradients are balanced; or the tasks take
    turns, one a step, which leaves nothing to balance: sequential, cycle, round_robin, sampled,
    annealed (engine/data/task_schedule.py)."""
    epochs: Positive = 10
    """Passes over the training sets: over the largest, while smaller ones start again as they run
    out (together, cycle), or over every one."""
    max_steps: Count = 0
    """Stop after so many steps (``--max-steps``), or each phase does; 0: after the epochs."""
    max_train_examples: Count = 0
    """Cut every training set to so many examples, keeping the label distribution; 0: all.
    ``tasks.NAME.first_n`` cuts one task's to those that come first."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row of a data file does: end the run, or be skipped and counted."""

    balance: str = "pcgrad"
    """How the task gradients are combined: a method's name (engine/gradients/balancing.py), or
    ``torchjd.`` and the name of a TorchJD weighting."""
    balancing: BalanceSettings = BalanceSettings()
    """Settings of those methods that have any."""
    balance_granularity: Literal[GRANULARITIES] = "model"  # type: ignore[valid-type]
    """What gets weights of its own: the whole model, each layer, or each tensor."""
    optimizer: str = "adamw"
    """adamw: Adam with decoupled weight decay, Adam itself when weight_decay is 0; lamb, for large
    batches; apex_adam and apex_lamb: NVIDIA apex's, where it is installed; sgd, adafactor, or
    ``torch.`` and the name of a class of torch.optim, such as torch.RAdam."""
    optimizer_options: dict[str, OptionValue] = {}
    """Further arguments of sgd, adafactor or the class of torch.optim, such as { alpha = 0.9 }."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    lr: PositiveReal = 1e-5
    """Peak learning rate."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer of the encoder to the one below, down to the
    embeddings: the last layer has ``lr``; 1: all layers have it."""
    head_lr: NonNegativeReal = 0.0
    """Peak learning rate of all outside the encoder: heads, the layer that they share, adapters; 0:
    the same as ``lr``."""
    schedule: Literal[SCHEDULES] = "constant"  # type: ignore[valid-type]
    """After warm-up: stay at the peak (constant), or fall to 0: in a straight line (linear), by
    half a cosine (cosine), or as a power of the share of steps left (polynomial)."""
    schedule_power: PositiveReal = 1.0
    """That power of schedule = polynomial; with 1 it is linear."""
    warmup: Fraction = 0.0
    """Share of all steps in which the rate climbs from 0 to its peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moments of Adam and LAMB; a class of torch.optim takes its own from
    optimizer_options, as it does eps."""
    eps: PositiveReal = 1e-8
    """Epsilon of Adam and LAMB."""
    weight_decay: NonNegativeReal = 0.0
    """Decoupled decay of matrices; biases and norms are left alone.  Classes of torch.optim decay
    as they do it: SGD and most others add it to the gradient."""
    clip_norm: NonNegativeReal = 0.0
    """Largest norm of the combined gradient; 0: no clipping."""
    ema_decay: Fraction = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; its n-th update decays
    by (1 + n) / (10 + n) at most.  Dev scores and the best checkpoint are those of the average.  0:
    none."""

    precision: Literal[PRECISIONS] = "auto"  # type: ignore[valid-type]
    """What the model computes in, beside fp32 master weights; auto: bf16 where the hardware
    multiplies it fast; tf32: fp32 whose products are rounded; fp16: with a dynamic loss scale."""
    execution: Literal[EXECUTIONS] = "auto"  # type: ignore[valid-type]
    """eager; compile: by torch.compile; graphs: the whole eager step as a CUDA graph;
    compiled_graphs: both, which costs half a minute at first; auto: graphs on a GPU, eager on a
    CPU."""
    max_graphs: Positive = 16
    """The most CUDA graphs, and so the shapes that batches are filled up to for them.  Batches with
    and without sequences of more than 61 tokens have graphs of their own, if there are enough."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides initial weights, batches, dropout and the order of surgery."""
    log_every: Positive = 10
    """Steps between reads of the metrics; every step has its line all the same."""
    log_mib: Positive = 64
    """MiB from which on metrics.jsonl becomes metrics-STEP.jsonl, STEP its first, and a new one
    begins."""
    keep_logs: Count = 0
    """How many of those put aside stay; 0: all."""
    max_skipped: Count = 20
    """Stop after so many steps in a row whose loss or gradient was not finite (each is skipped);
    0: never."""
    loggers: tuple[Literal[LOGGERS], ...] = ()  # type: ignore[valid-type]
    """Where metrics go besides the run's folder: tensorboard, wandb, wandb_offline."""
    log_layer_cosines_every: Count = 0
    """Steps between records of the cosines in each layer, for a picture of the conflicts; 0: none.
    Their Gram matrices cost every step one more pass over the task gradients."""
    eval_every: Count = 0
    """Steps of a phase between evaluations on dev, besides the one at each epoch's end; 0: none."""
    best_of: str = "overall"
    """The dev score that decides which weights are kept as the best: overall, or a task's name."""
    patience: Count = 0
    """End a phase after so many evaluations in a row without a better deciding score (best_of) than
    the phase has had; 0: never."""
    average_best: Count = 0
    """Average the weights of so many of the best evaluations (best_of) of the last phase, as it
    ends; evaluate, predict and export load the average, unless it scores worse on dev than the best
    weights do.  0: none."""
    checkpoint_every: Count = 0
    """Steps between checkpoints besides those at each epoch's end and of the best scores; 0:
    none."""
    keep_checkpoints: Positive = 2
    """How many of them stay; should the newest be damaged, a run goes on from the one before."""

    phases: dict[GivenName, dict[str, Any]] = {}
    """Phases that follow one another, by name: the settings that each has otherwise than the
    recipe.  A phase begins with the last one's weights and a fresh optimizer.  None: one phase."""

    distribute: Literal[MODES] = "sharded"  # type: ignore[valid-type]
    """With several ranks: each updates a part of the weights, or (replicated) all of them."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """Seconds after which a rank that does not answer is given up."""
    check_ranks_every: Count = 100
    """Steps between comparisons of several ranks' weights, seed and step, by a checksum; also as
    training begins and before each checkpoint.  A difference ends the run.  0: never."""
    threads: Count = 0
    """CPU threads of each process; 0: the cores, shared among the ranks of a machine."""

    @model_validator(mode="after")
    def _names_exist(self) -> "Recipe":
        for name, task in self.tasks.items():
            if name not in FORMATS and task.source is None:
                raise ValueError(
                    f"tasks.{name}: no such task{nearest(name, FORMATS)}; "
                    f"a task of your own needs [tasks.{name}.source]"
                )
            _check_name(f"tasks.{name}", name)
            if name == "overall":
                raise ValueError("tasks.overall: the mean score is called so; give another name")
        scores = ["overall", *self.tasks]
        if self.best_of not in scores:
            raise ValueError(
                f"best_of = {self.best_of!r}: no such score{nearest(self.best_of, scores)}"
            )
        known = [*self.tasks, *self.objectives]
        self._check_tasks()
        self._check_lora()
        for name in self.train:
            if name not in known:
                raise ValueError(f"train: {name!r} is not among tasks{nearest(name, known)}")
        for name, objective in self.objectives.items():
            _check_name(f"objectives.{name}", name)
            check_objective(name, objective)
            if name in self.tasks:
                raise ValueError(f"objectives.{name}: a task is called so; give another name")
            if not (self.tasks or objective.sentences_of or objective.files):
                raise ValueError(f"objectives.{name}: the recipe has no task; give files")
            for source in objective.sentences_of:
                if source not in self.tasks and source not in FORMATS:
                    raise ValueError(f"objectives.{name}.sentences_of: no such task: {source}")
            self._check_sentences(name, objective)
        if len(set(self.train)) != len(self.train):
            raise ValueError("train: a task is named twice")
        if not self.init and not self.encoder.initializer_range:
            raise ValueError(
                "encoder.initializer_range = 0: weights that begin at zero stay there; raise it"
            )
        self._check_batches()
        if self.balance not in METHODS and not self.balance.startswith(TORCHJD):
            raise ValueError(
                f"balance = {self.balance!r}: no such method"
                f"{nearest(self.balance, METHODS, FIELDS)}"
            )
        if self.optimizer not in OPTIMIZERS and not is_torch(self.optimizer):
            raise ValueError(
                f"optimizer = {self.optimizer!r}: no such optimizer"
                f"{nearest(self.optimizer, OPTIMIZERS, FIELDS)}"
            )
        torch_arguments_of(self)
        return self

    def _check_sentences(self, name: str, objective: ObjectiveRecipe) -> None:
        every = () if objective.files else tuple(self.tasks)
        for task in objective.sentences_of or every:
            source = self.tasks[task].source if task in self.tasks else None
            if source is not None and source.split_by_rank:
                raise ValueError(
                    f"objectives.{name}.sentences_of: no rank reads all sentences of {task}, since "
                    f"tasks.{task}.source.split_by_rank is true; give the objective files, or "
                    "other tasks"
                )

    def _check_batches(self) -> None:
        own = {name: self._own_batch_size(name) for name in self.train}
        smallest = min(size or self.batch_size for size in own.values())
        if self.micro_batches > smallest:
            raise ValueError(
                f"micro_batches = {self.micro_batches}: a batch has only {smallest} examples"
            )
        if self.task_schedule != "together" or not self.sampling_alpha:
            return
        for name in self.train:
            by_tokens = name in self.objectives and self.objectives[name].tokens_per_batch
            if own[name] or by_tokens:
                field = "tokens_per_batch" if by_tokens else "batch_size"
                raise ValueError(
                    f"sampling_alpha = {self.sampling_alpha:g}: decides all batches of a step, and "
                    f"{name} has a {field} of its own; leave one of them out"
                )

    def _own_batch_size(self, name: str) -> int:
        settings = self.tasks.get(name) or self.objectives.get(name)
        return 0 if settings is None else settings.batch_size

    def batch_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Return how many examples each trained task has in a step that trains it.

        Args:
            sizes: of their training sets.
        """
        # A task alone has all of them, and a stream may have no size.
        if self.task_schedule == "together" and self.sampling_alpha and len(self.train) > 1:
            return batch_sizes(self.batch_size, sizes, self.sampling_alpha)
        return [self._own_batch_size(name) or self.batch_size for name in self.train]

    def _check_tasks(self) -> None:
        for name, task in self.tasks.items():
            check_task(name, task, self.formats[name])
        if self.tasks and not any(task.score_weight for task in self.tasks.values()):
            raise ValueError("tasks: some score_weight has to be above 0, or none is best")

    def _check_lora(self) -> None:
        if not self.lora_targets or len(set(self.lora_targets)) != len(self.lora_targets):
            raise ValueError("lora_targets: expected at least one name, and each once")
        if self.lora_rank and not self.init:
            raise ValueError(
                f"lora_rank = {self.lora_rank}: an encoder from scratch would keep its random "
                "weights; give a pretrained one (--init)"
            )

    @property
    def lora(self) -> LoraSettings | None:
        """The low-rank updates of the encoder; None without any."""
        if not self.lora_rank:
            return None
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    @property
    def formats(self) -> dict[str, TaskSchema]:
        """What the data of each task look like, but for splits that are written otherwise."""
        return {
            name: FORMATS[name] if task.source is None else task.source.format(name)
            for name, task in self.tasks.items()
        }

    def split_schema(self, task: str, split: str) -> TaskSchema:
        """Return what a split of a task looks like, one of the recipe or a built-in one."""
        source = self.tasks[task].source if task in self.tasks else None
        return FORMATS[task] if source is None else source.format(task, split)

    @property
    def streamed(self) -> tuple[str, ...]:
        """The trained tasks whose examples are read as they are trained on."""
        sources = {name: self.tasks[name].source for name in self.train if name in self.tasks}
        return tuple(name for name, source in sources.items() if source and source.streaming)

    @property
    def divided(self) -> tuple[str, ...]:
        """The trained tasks and objectives of which several ranks have examples of their own."""
        sources = {name: task.source for name, task in self.tasks.items()}
        own = {name for name, source in sources.items() if source and source.split_by_rank}
        own |= {name for name, settings in self.objectives.items() if settings.split_by_rank}
        return tuple(name for name in self.train if name in own or name in self.streamed)

    @property
    def scored(self) -> bool:
        """Whether what is trained is scored on dev sets: some task, not objectives alone."""
        return any(name in self.tasks for name in self.train)

    @property
    def trained(self) -> tuple[str, ...]:
        """The tasks and objectives that some phase trains."""
        return tuple(dict.fromkeys(n for phase in self.in_phases.values() for n in phase.train))

    def loss_weight(self, name: str) -> float:
        """Return the factor on the loss of a task or objective."""
        return (self.tasks.get(name) or self.objectives[name]).weight

    @model_validator(mode="after")
    def _phases_fit(self) -> "Recipe":
        for name in self.phases:
            try:
                self._phase(name)
            except ValidationError as error:
                raise ValueError(f"phases.{name}.{first_problem(error, Recipe)}") from None
        if self.is_scored and not list(self.in_phases.values())[-1].scored:
            raise ValueError(
                "phases: the last one trains no task, so its weights are never scored and the best "
                "are an earlier phase's; train a task in it, or put it before"
            )
        return self

    @model_validator(mode="after")
    def _streams_fit(self) -> "Recipe":
        if not self.phases:  # each phase is checked by itself
            check_streams(self)
        return self

    @property
    def is_scored(self) -> bool:
        """Whether a run gets dev scores: some phase of it trains a task."""
        return any(phase.scored for phase in self.in_phases.values())

    @property
    def in_phases(self) -> dict[str, "Recipe"]:
        """The recipe of each phase, in order; of the only one if there are none."""
        return {name: self._phase(name) for name in self.phases} or {"": self}

    def _phase(self, name: str) -> "Recipe":
        for key in self.phases[name]:
            if key not in OF_A_PHASE:
                raise ValueError(
                    f"phases.{name}: no setting of a phase: {key}{nearest(key, OF_A_PHASE, FIELDS)}"
                )
        return Recipe.model_validate(
            self.model_dump(exclude={"phases", "encoder"}, exclude_unset=True)
            | {"encoder": self.encoder}
            | self.phases[name]
        )

    def to_toml(self) -> str:
        """Return the recipe with every field, as TOML that :func:`load` reads back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def torch_arguments_of(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of a recipe's optimizer, if it is one of torch.optim.

    Raises:
        ValueError: they do not fit.
    """
    if not is_torch(recipe.optimizer):
        return {}
    return torch_arguments(
        recipe.optimizer, recipe.optimizer_options, recipe.momentum, recipe.weight_decay
    )


def _check_name(key: str, name: str) -> None:
    """Refuse names that parameters, metrics and files cannot be called by.

    Raises:
        ValueError: the message begins with ``key``.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{key}: a name is letters (a to z) or digits, with _ and -")


def names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def of_papers() -> list[str]:
    """Return the names of the built-in recipes that stand for a system of a paper."""
    return [name for name in names() if load(name).paper]


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    It warns (DeprecationWarning) of fields that are given by an old name.

    Args:
        name: a built-in recipe's name, or the path of a TOML file.
        overrides: ``key=value`` each; the value is read as TOML, or as text when it is none.

    Raises:
        InputError: no such recipe, no TOML, an unknown key, or a value out of range.
    """
    recipe, lines = read(name, overrides)
    for line in lines:
        warnings.warn(line, DeprecationWarning, stacklevel=2)
    return recipe


def read(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read a recipe as :func:`load` does; return a line for each old name instead of warning.

    Data that a file names are looked for in its folder, too: :func:`.with_places`.

    Args:
        name: as for :func:`load`.
        overrides: as for :func:`load`.

    Raises:
        InputError: as :func:`load`.
    """
    is_file = name.endswith(".toml")
    path = Path(name) if is_file else RECIPES / f"{name}.toml"
    if not (isfile(path) if is_file else name in names()):
        hint = "; give a file or a name that --list shows"
        raise InputError(
            f"recipe {name}: not found{hint if is_file else nearest(name, names(), '--list')}"
        )
    try:
        fields = parse_toml(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise InputError(f"recipe {path}: not TOML ({error})") from None
    try:
        fields, lines = with_new_names(fields)
    except ValueError as error:
        raise InputError(f"recipe {name}: {error}") from None
    lines = [f"recipe {name}: {line}" for line in lines]
    init, given = fields.get("init", ""), dict[str, Any]()
    for override in overrides:
        _apply(given, override)
    if problem := phase_by_mistake(fields, given):
        raise InputError(f"recipe {name}: {problem}")
    for override in overrides:
        lines += _apply(fields, override)
    if is_file:
        fields = with_places(fields, path.parent)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        problem = misplaced(fields, given, Recipe.model_fields, OF_A_PHASE)
        raise InputError(f"recipe {name}: {problem or first_problem(error, Recipe)}") from None
    lines = list(dict.fromkeys(lines))
    if recipe.init in ("", init):
        return recipe, lines
    # The [encoder] of a file describes an encoder from scratch, or that of the file's own init.
    of_file = recipe.encoder.model_fields_set - given.get("encoder", {}).keys()
    return recipe.model_copy(update={"encoder": recipe.encoder.without_shape(of_file)}), lines


def override(key: str, value: object) -> str:
    """Return the ``key=value`` that sets a field to ``value``."""
    return f"{key}={tomli_w.dumps({'v': value}).removeprefix('v = ').strip()}"


def _apply(fields: dict[str, Any], override: str) -> list[str]:
    """Set one field of nested tables from ``a.b.c=value``; return a line for each old name."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override}: expected key=value")
    if not text.strip():
        raise InputError(
            f"--set {override}: no value (is a shell variable unset?); give one, or {key}='\"\"' "
            "for an empty text"
        )
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    where = f"--set {key.strip()}=…"
    try:
        key, value, lines = with_new_name(key.strip(), value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    *tables, last = key.split(".")
    for table in tables:
        fields = fields.setdefault(table, {})
        if not isinstance(fields, dict):
            raise InputError(f"--set {override}: {table} has no fields of its own")
    fields[last] = value
    return [f"{where}: {line}" for line in lines]
