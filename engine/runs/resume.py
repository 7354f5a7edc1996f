"""Resume a run, and refuse settings that may not change between its sessions."""

import os
from collections.abc import Collection, Iterator
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..data.cache import Reading
from ..utils.errors import InputError
from .prune import PRUNED, has_scores_alone
from .run import Run, begin, open_run

_WITHOUT_EFFECT_ON_SCORES = {
    "log_every",
    "check_ranks_every",
    "checkpoint_every",
    "distribute",
    "keep_checkpoints",
    "keep_logs",
    "log_mib",
    "max_skipped",
    "threads",
    "timeout",
    "loggers",
    "log_layer_cosines_every",
}

_FREE_TO_CHANGE = _WITHOUT_EFFECT_ON_SCORES | {"max_steps", "data", "init"}
"""Fields that a run may be resumed with another value of."""

_FOLDERS = ("checkpoints", "tensorboard", "wandb")

_PLACES = ("data", "init")

_PLAIN = Reading()


def resume(recipe: Recipe, folder: Path, reading: Reading = _PLAIN, ranks: int = 1) -> Run:
    """Open a run to go on with it, or begin it if there is none in ``folder``.

    As of :func:`.run.begin`.

    Raises:
        InputError: the run was made with other settings, has lost its checkpoints since it was
            done, or cannot write into its own folders.
    """
    if not isfile(folder / "recipe.toml"):
        return begin(recipe, folder, resumes=True, reading=reading, ranks=ranks)
    run = open_run(folder)
    if has_scores_alone(folder):
        raise InputError(f"--resume: {folder}: {PRUNED}; give another --out")
    recipe = _with_model(recipe, run)
    for field, before, after in _differences(run.recipe, recipe, but=_FREE_TO_CHANGE):
        raise InputError(
            f"--resume: {folder} was made with {field} = {before!r}, now it is "
            f"{after!r}; resume with the same settings or give another --out"
        )
    for name in _FOLDERS:
        if (folder / name).is_symlink():
            raise InputError(
                f"{folder / name}: is a link, and a run writes into its own folder alone; put "
                "there what it names, or give --out a link to the whole run"
            )
        if os.path.lexists(folder / name) and not isdir(folder / name):
            raise InputError(f"{folder / name}: is no folder; move it elsewhere")
    return run._replace(recipe=recipe, reading=reading)


def check_scores_of(recipe: Recipe, folder: Path) -> None:
    """Check that a run that is finished has the scores of a recipe, whatever the seed.

    Raises:
        InputError: it was made with other settings.
    """
    run = open_run(folder)
    but = _WITHOUT_EFFECT_ON_SCORES | {"seed"}
    for field, before, after in _differences(run.recipe, _with_model(recipe, run), but=but):
        raise InputError(
            f"{folder} was made with {field} = {before!r}, now it is {after!r}; its scores are of "
            "other settings: give another --out"
        )


def _with_model(recipe: Recipe, run: Run) -> Recipe:
    """Return the settings to resume with, with those of the pretrained encoder in force.

    The model may have moved since, or not be named any more: the run has its shape and weights.

    Raises:
        InputError: the run was begun from scratch and a model is given, or another shape.
    """
    if not run.recipe.init:
        if recipe.init:
            raise InputError(
                f"--init {recipe.init}: {run.folder} was begun from scratch; resume without it or "
                "give another --out"
            )
        return recipe
    encoder = recipe.encoder
    if not recipe.init:
        encoder = encoder.without_shape(encoder.model_fields_set)
    encoder, _ = encoder.of_model(run.config, f"the model of {run.folder}")
    init = recipe.init or run.recipe.init
    return recipe.model_copy(update={"encoder": encoder, "init": init})


def _differences(
    before: Recipe, after: Recipe, *, but: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted names of the settings that differ, with their two values."""
    one, other = before.model_dump(), after.model_dump()
    for key in sorted(other.keys() - but):
        named = key in _PLACES and one[key] and other[key]
        if not (named and os.path.realpath(one[key]) == os.path.realpath(other[key])):
            yield from _differing(key, one[key], other[key])


def _differing(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        for name in after:
            yield from _differing(f"{key}.{name}", before[name], after[name])
    elif before != after:
        yield key, before, after
