"""Write one task of a trained model as a folder that transformers' pipelines load.

config.json, model.safetensors   transformers.AutoModelForSequenceClassification or
                                 AutoModelForTokenClassification, with the names of the classes
modeling_….py                    its class, where transformers has none (trust_remote_code=True)
tokenizer.json, …                transformers.AutoTokenizer
README.md                        the model card
"""

from os.path import realpath
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..checkpoints.manifest import Progress
from ..models.heads import LinearHead
from ..models.hf_weights import to_huggingface_state
from ..models.multitask import MultitaskModel
from ..models.registry import spec_of
from ..runs.predictor import class_names, schema
from ..runs.run import Run
from ..utils.errors import InputError
from ..utils.files import whole_folder
from ..utils.json_text import dump_json
from .card_sections import Scores
from .folder import check_exportable, check_free
from .task_card import task_card
from .tokenizer_files import write_tokenizer

_IDENTITY = "torch.nn.modules.linear.Identity"
"""sentence-transformers' CrossEncoder would put a sigmoid on a single output."""


def write_task_folder(
    run: Run,
    model: MultitaskModel,
    task: str,
    progress: Progress,
    scores: Scores | None,
    to: Path,
) -> None:
    """Write the folder; it appears under its name when it is complete.

    Args:
        run: what was trained.
        model: with the trained weights.
        task: one of the run's tasks.
        progress: of the checkpoint that they come from.
        scores: dev scores of that checkpoint, by task, or None.
        to: the folder, new or empty.

    Raises:
        InputError: there is no such task, no class of transformers computes its head, ``to`` holds
            something already or cannot be written, or the model has adapters.
    """
    check_free(to)
    check_exportable(run, model)
    head = linear_head(run, model, task)
    hold = spec_of(run.config).task_model
    if hold is None:
        raise InputError(
            f"{run.folder}: an encoder of type {run.config.model_type}, whose tasks no class of "
            "transformers holds; export without --task"
        )
    try:
        made = hold(run.config, head, run.recipe.pooling, run.recipe.dropout)
    except InputError as error:
        raise InputError(f"task {task!r} of {run.folder}: {error}") from None
    encoder = {name: tensor.float().cpu() for name, tensor in model.encoder.state_dict().items()}
    state = to_huggingface_state(encoder, run.config)
    weights = {f"{made.prefix}{name}": tensor for name, tensor in state.items()} | dict(made.head)
    known = {"dtype": "float32", "pad_token_id": run.tokenizer.pad_id}
    config = run.config.to_huggingface() | known | dict(made.config)
    with whole_folder(Path(realpath(to))) as folder:
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
        text = dump_json(config | label_entries(run, task, head), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for name, code in made.code.items():
            (folder / name).write_text(code, encoding="utf-8")
        write_tokenizer(folder, run)
        card = task_card(run, task, head, made, progress, scores)
        (folder / "README.md").write_text(card, encoding="utf-8")


def linear_head(run: Run, model: MultitaskModel, task: str) -> LinearHead:
    """Return a task's head as a linear layer.

    Raises:
        InputError: there is no such task, or its head is more than that.
    """
    form = schema(run, task)
    head = model.head(task).as_linear()
    if head is not None:
        return head
    others = [name for name in run.recipe.tasks if model.head(name).as_linear() is not None]
    which = f"of this run {', '.join(others)}" if others else "this run has none"
    raise InputError(
        f"task {task!r} of {run.folder}: head = {model.head(task).features!r}, of kind "
        f"{form.kind}, is none that --task writes: classes, labels and numbers by 'single' or "
        f"'cross', tags of words by 'tokens' ({which}); export without --task"
    )


def label_entries(run: Run, task: str, head: LinearHead) -> dict[str, Any]:
    """Return the entries of ``config.json`` that name the outputs of a task's head."""
    names = class_names(schema(run, task), len(head.bias))
    is_regression = head.problem_type == "regression"
    if is_regression:
        names = [task]
    entries: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if not head.reads_tokens:
        entries["problem_type"] = head.problem_type
    if is_regression:
        entries["sentence_transformers"] = {"activation_fn": _IDENTITY}
    return entries
