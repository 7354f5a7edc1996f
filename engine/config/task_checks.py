"""Check the settings of a task against what its data look like."""

from ..data.task_schema import TaskSchema
from ..models.heads import head_class, metrics_for
from ..models.heads.thresholds import deciding_metric
from .tables import TaskRecipe


def check_task(name: str, task: TaskRecipe, form: TaskSchema) -> None:
    """Check metrics, and settings that tasks of some kinds alone have.

    Args:
        name: the task's.
        task: its settings.
        form: the schema of its data.

    Raises:
        ValueError: the message names the recipe's key.
    """
    table = f"tasks.{name}"
    _check_metrics(table, task, form)
    _check_threshold(table, task, form)
    if task.first_n and task.source is not None and task.source.split_by_rank:
        raise ValueError(
            f"{table}.first_n: source.split_by_rank deals the files to ranks, so that no rows are "
            "the first; give max_train_examples, or leave one of them out"
        )
    if task.tag_pieces != "first" and form.labels != "words":
        raise ValueError(f"{table}.tag_pieces: the task has no words with tags")
    for field in ("temperature", "symmetric", "margin"):
        is_default = getattr(task, field) == TaskRecipe.model_fields[field].default
        reason = "" if is_default else _no_effect_on_similarity(field, task, form)
        if reason:
            raise ValueError(f"{table}.{field}: {reason}; leave it out")


def _check_metrics(table: str, task: TaskRecipe, form: TaskSchema) -> None:
    known = {metric.name: metric for metric in metrics_for(form)}
    for metric in task.metrics:
        if metric not in known:
            raise ValueError(
                f"{table}.metrics: {metric!r} is none of this kind of task; it has "
                f"{', '.join(known)}"
            )
    if len(set(task.metrics)) != len(task.metrics):
        raise ValueError(f"{table}.metrics: a metric stands twice")
    if task.decided_by == "mean" and len(task.metrics) > 1:
        for metric in task.metrics:
            if known[metric].sign < 0:
                raise ValueError(
                    f"{table}.decided_by: {metric} is an error, which has no mean with scores; "
                    "leave it out of metrics"
                )


def _check_threshold(table: str, task: TaskRecipe, form: TaskSchema) -> None:
    # Of other thresholds than these the head says that it has none.
    if task.threshold not in head_class(form.kind).known_thresholds[1:]:
        return
    names = task.metrics or (metrics_for(form)[0].name,)
    try:
        deciding_metric(task.threshold, names, several=form.labels == "several")
    except ValueError as error:
        raise ValueError(f"{table}.threshold = {task.threshold!r}: {error}") from None


def _no_effect_on_similarity(field: str, task: TaskRecipe, form: TaskSchema) -> str:
    """Return why a setting of similarities has no effect on a task; empty where it has one."""
    if field == "margin":
        has_one = task.loss in ("triplet", "contrastive")
        return "" if has_one else "only loss = triplet and loss = contrastive have one"
    if form.kind != "retrieval":
        return "the task is no retrieval"
    return "loss = triplet has none" if task.loss == "triplet" else ""
