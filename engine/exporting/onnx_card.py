"""The model card of an ONNX graph."""

from collections.abc import Sequence

from ..checkpoints.manifest import Progress
from ..models.heads import LinearHead
from ..runs.run import Run
from ..utils.quoting import markdown_text
from .card_sections import Scores, filled, short_card
from .task_card import answers_text

_EXAMPLE = """\
{imports}
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, *texts = sys.argv[1:]  # {what}
tokenizer = Tokenizer.from_file(f"{{folder}}/tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding(pad_id={pad_id}, pad_token={pad_token!r})
{config}session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
rows = tokenizer.encode_batch({given})
{inputs}
({output},) = session.run(None, inputs)
{shown}
"""
_ROWS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def onnx_card(
    run: Run,
    task: str | None,
    head: LinearHead | None,
    inputs: Sequence[str],
    progress: Progress,
    scores: Scores | None,
) -> str:
    """Return the card as Markdown.

    Args:
        run: what was trained.
        task: the exported one; None for sentence vectors.
        head: its head.
        inputs: of the graph.
        progress: of the exported checkpoint.
        scores: its dev scores by task, or None where they are not known.
    """
    of = "The sentence vectors" if task is None else f"The task {markdown_text(task)}"
    listed = ", ".join(f"`{name}`" for name in inputs)
    if head is None:
        result = f"Sentence vectors, {run.recipe.pooling} pooling, [n, {run.config.hidden_size}]."
    else:
        assert task is not None
        result = answers_text(
            run.recipe.formats[task], head, run.recipe.tasks[task].threshold
        ).replace("the line above", "the last line")
    return short_card(
        run,
        progress,
        scores,
        only=task,
        header=f"library_name: onnx\ntags: [{run.config.model_type}, multi-task]",
        what=f"{of} of one",
        use=filled(
            f"`model.onnx` takes {listed}, int64 [n, T] for any n and T up to {run.max_length}, "
            "and needs neither torch nor transformers:"
        ),
        example=_example(run, task, head, inputs),
        answers=filled(result),
    )


def _example(run: Run, task: str | None, head: LinearHead | None, inputs: Sequence[str]) -> str:
    """Return a script that answers; its arguments: the folder, and texts or the two of a pair."""
    form = None if task is None else run.recipe.formats[task]
    is_pair = form is not None and len(form.sentences) == 2
    config = 'labels = json.loads(Path(folder, "config.json").read_text())["id2label"]\n'
    output = "logits"
    if head is None:
        config, output, shown = "", "vectors", "print(vectors @ vectors.T)"
    elif head.reads_tokens:
        shown = (
            "for row, scores in zip(rows, logits):\n"
            "    tags = [labels[str(number)] for number in scores.argmax(-1)]\n"
            "    print([each for each in zip(row.tokens, tags, row.attention_mask) if each[2]])"
        )
    elif head.problem_type == "regression":
        assert form is not None
        config, shown = "", "print(*logits[:, 0])"
        if head.share_of is None:
            shown = f"print(*logits[:, 0].clip({form.low:g}, {form.high:g}))"
    elif head.problem_type == "multi_label_classification":
        shown = (
            "for row in logits:\n"
            "    print([labels[str(number)] for number in np.flatnonzero(row > 0)])"
        )
    else:
        shown = "print(*(labels[str(number)] for number in logits.argmax(-1)))"
    arrays = ",\n".join(
        f'    "{name}": np.array([row.{_ROWS[name]} for row in rows])' for name in inputs
    )
    return _EXAMPLE.format(
        imports="import json, sys\nfrom pathlib import Path\n" if config else "import sys\n",
        what="the two texts of a pair" if is_pair else "texts",
        max_length=run.max_length,
        pad_id=run.tokenizer.pad_id,
        pad_token=run.tokenizer.special_tokens[0],
        config=config,
        given="[tuple(texts)]" if is_pair else "texts",
        inputs=f"inputs = {{\n{arrays},\n}}",
        output=output,
        shown=shown,
    )
