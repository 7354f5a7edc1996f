"""Check the settings of a phase against tasks that are streamed, whose examples nobody has counted.

The number of rows that a data set promises is not used in place of the counts: what it has of each
class, and what of it is skipped, nobody promises.
"""

from typing import TYPE_CHECKING

from ..runtime.execution import RECORDED

if TYPE_CHECKING:
    from .recipe import Recipe

_SCHEDULES = ("together", "cycle")


def check_streams(recipe: "Recipe") -> None:
    """Refuse what streams cannot have.

    Args:
        recipe: of a phase.

    Raises:
        ValueError: the message names the recipe's key.
    """
    _check_texts(recipe)
    if not recipe.streamed:
        return
    task = recipe.streamed[0]
    what = f"{task} is a stream, whose examples are not counted"
    if not recipe.max_steps and set(recipe.streamed) == set(recipe.train):
        raise ValueError(f"max_steps: {what}, so it has no epochs; say how many steps to train")
    if recipe.max_train_examples:
        raise ValueError(f"max_train_examples: {what}; leave it out, and set max_steps")
    if recipe.execution in RECORDED:
        raise ValueError(
            f"execution = {recipe.execution}: the shapes of the later batches of {task}, a "
            "stream, are not known; set execution=eager"
        )
    if recipe.freeze_encoder and not recipe.adapter_width and not _trains_objective(recipe):
        raise ValueError(
            f"freeze_encoder: the encoder's states are computed once, and {task} is a stream; set "
            "streaming=false, or train the encoder"
        )
    if len(recipe.train) > 1:
        _check_sizes(recipe, what)
    for name in recipe.streamed:
        for field in ("first_n", "class_weights"):
            if getattr(recipe.tasks[name], field):
                raise ValueError(
                    f"tasks.{name}.{field}: {name} is a stream, whose examples are not counted; "
                    "leave it out"
                )


def _check_sizes(recipe: "Recipe", what: str) -> None:
    """Refuse what weighs tasks by their sizes, or goes once through each of them."""
    if recipe.sampling_alpha:
        raise ValueError(f"sampling_alpha: {what}; give tasks.NAME.batch_size instead")
    if recipe.task_schedule not in _SCHEDULES:
        raise ValueError(
            f"task_schedule = {recipe.task_schedule}: {what}; set one of {', '.join(_SCHEDULES)}"
        )
    if recipe.balance == "proportional":
        raise ValueError(f"balance = proportional: {what}; set another, such as sum")


def _trains_objective(recipe: "Recipe") -> bool:
    return any(name in recipe.objectives for name in recipe.train)


def _check_texts(recipe: "Recipe") -> None:
    """Refuse an objective that reads the texts of a stream, which it would keep on the disk."""
    for name in recipe.train:
        if name not in recipe.objectives:
            continue
        settings = recipe.objectives[name]
        sources = settings.sentences_of or (() if settings.files else tuple(recipe.tasks))
        for task in sources:
            source = recipe.tasks[task].source if task in recipe.tasks else None
            if source is not None and source.streaming:
                raise ValueError(
                    f"objectives.{name}.sentences_of: {task} is a stream, whose texts would all be "
                    "kept on the disk; name other tasks, or files"
                )
