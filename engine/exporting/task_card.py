"""The model card of one exported task."""

from ..checkpoints.manifest import Progress
from ..data.task_schema import TaskSchema
from ..models.heads import HALF, LinearHead
from ..models.task_model import SEQUENCES, TOKENS, TaskModel
from ..runs.run import Run
from ..utils.quoting import markdown_text
from .card_sections import Scores, filled, listed, short_card

_SUBTRACTED = (
    "The threshold that was chosen on the dev data is subtracted from the logits, so that yes is "
    "above 1/2 here."
)

_SEQUENCE_EXAMPLE = """\
import sys
from transformers import pipeline

folder, *texts = sys.argv[1:]  # {what}
{name} = pipeline("text-classification", folder{trust})
answers = {name}({given}, top_k=None, truncation=True)
print({shown})
"""
_TOKEN_EXAMPLE = """\
import sys
from transformers import pipeline

folder, text = sys.argv[1:]
tag = pipeline("token-classification", folder, aggregation_strategy="first"{trust})
print([(each["word"], each["entity_group"]) for each in tag(text)])
"""


def task_card(
    run: Run,
    task: str,
    head: LinearHead,
    made: TaskModel,
    progress: Progress,
    scores: Scores | None,
) -> str:
    """Return the card as Markdown.

    Args:
        run: what was trained.
        task: the exported one.
        head: its head.
        made: what the export holds it in.
        progress: of the exported checkpoint.
        scores: its dev scores by task, or None where they are not known.
    """
    form, name = run.recipe.formats[task], markdown_text(task)
    kind = "token-classification" if head.reads_tokens else "text-classification"
    model_type = made.config.get("model_type", run.config.model_type)
    return short_card(
        run,
        progress,
        scores,
        only=task,
        header="library_name: transformers\n"
        f"pipeline_tag: {kind}\ntags: [{model_type}, multi-task]",
        what=f"The task {name} of one",
        use=_use(head, made),
        example=example(form, head, made),
        answers=filled(answers_text(form, head, run.recipe.tasks[task].threshold)),
    )


def _use(head: LinearHead, made: TaskModel) -> str:
    """Return how the model is loaded."""
    loader = TOKENS if head.reads_tokens else SEQUENCES
    text = f"`transformers.{loader}.from_pretrained` loads it, and so do pipelines."
    if made.code:
        files = listed([*made.code])
        text += (
            f" transformers has no class for this head, so the folder brings one, {files}, which "
            "is run with `trust_remote_code=True` alone: give that to pipelines, or to each "
            "`from_pretrained`, the tokenizer's too."
        )
    return filled(f"{text} {made.note}".strip())


def example(form: TaskSchema, head: LinearHead, made: TaskModel) -> str:
    """Return a script that answers; its arguments: the folder, and a text or the two of a pair."""
    trust = ", trust_remote_code=True" if made.code else ""
    if head.reads_tokens:
        return _TOKEN_EXAMPLE.format(trust=trust)
    is_pair = len(form.sentences) == 2
    shown = 'max(answers, key=lambda each: each["score"])["label"]'
    if head.problem_type == "regression":
        shown = 'answers[0]["score"]'
        if head.share_of is None:
            shown = f"min(max({shown}, {form.low:g}), {form.high:g})"
    if head.problem_type == "multi_label_classification":
        shown = '[each["label"] for each in answers if each["score"] > 0.5]'
    return _SEQUENCE_EXAMPLE.format(
        what="the two texts of a pair" if is_pair else "a text",
        name="rate" if head.problem_type == "regression" else "classify",
        trust=trust,
        given='{"text": texts[0], "text_pair": texts[1]}' if is_pair else '{"text": texts[0]}',
        shown=shown,
    )


def answers_text(form: TaskSchema, head: LinearHead, threshold: str) -> str:
    """Return what the outputs are, where the recipe has the threshold chosen so."""
    chosen = "" if threshold == HALF else f" {_SUBTRACTED}"
    if head.reads_tokens:
        return (
            "Each token has a logit for each tag. The tag of a word is that of its first token. "
            "Words were split at blanks in training."
        )
    if head.problem_type == "regression":
        text = f"The output is a number from {form.low:g} to {form.high:g}"
        cut = "; it is not cut to that range, which the line above does, and the engine"
        return f"{text}{'' if head.share_of else cut}."
    if head.problem_type == "multi_label_classification":
        text = "Each label has a logit; it applies where its probability, a sigmoid, is above 1/2."
        return text + chosen
    return f"Each class has a logit; softmax makes them probabilities.{chosen}"
