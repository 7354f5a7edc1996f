"""``papers.json``: outcomes of runs, all that the report on the papers needs.

It refers to no checkpoint, data or path, and is small enough to be kept under version control; the
report can be made from it anywhere, and more runs can be added to it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ..config import recipe as recipes
from ..config.messages import first_problem
from ..config.recipe import Recipe
from ..config.renamed import with_new_names
from ..data.rows import shorten
from ..runs.experiments import RESULTS, read_results
from ..runs.run import Run, open_run
from ..runs.scoring import read_scores
from ..utils.errors import InputError
from ..utils.field_types import Count
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .mistakes import Findings, findings
from .run_data import dev_answers

_WORST = 5
"""Worst examples of each task."""
_MACHINES = {"data", "init"}
"""The fields of a recipe that name places on one machine."""


class Outcome(BaseModel):
    """Outcome of one run."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    system: str
    """The built-in recipe that it was made by."""
    settings: dict[str, Any]
    """Its own recipe, every field but those that name places on one machine."""
    layers: Count
    """Of the encoder."""
    width: Count
    """Of the encoder."""
    pretrained: bool
    """Whether the encoder was."""
    examples: dict[str, Count]
    """Of the training set of each trained task, before the recipe cut any."""
    scores: dict[str, float]
    """On dev, of the best epoch, by task and ``overall``."""
    answers: dict[str, Findings] = {}
    """Summaries of the dev answers to each task, of the first run of a system."""

    @field_validator("settings")
    @classmethod
    def _has_new_names(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return with_new_names(settings)[0]

    @model_validator(mode="after")
    def _is_of_its_recipe(self) -> Self:
        if self.system not in recipes.names():  # files are named by it
            raise ValueError(f"system = {self.system!r}: no built-in recipe")
        try:
            tasks = self.recipe.tasks
        except ValidationError as error:
            raise ValueError(f"settings: {first_problem(error, Recipe)}") from None
        for name in (*self.examples, *self.answers, *self.scores):
            if name not in tasks and (name != "overall" or name not in self.scores):
                raise ValueError(f"{name!r} is no task of its settings")
        return self

    @property
    def recipe(self) -> Recipe:
        """Its settings."""
        return Recipe.model_validate(self.settings)

    def without_texts(self) -> Self:
        """Return the same without sentences of the data, which are not everybody's to pass on."""
        answers = {task: found.without_texts() for task, found in self.answers.items()}
        return self.model_copy(update={"answers": answers})

    @property
    def key(self) -> str:
        """Settings that tell it from other runs, the seed among them."""
        return dump_json([self.system, self.settings], sort_keys=True)


def collect(places: Sequence[Path], device: torch.device, data: Path | None) -> list[Outcome]:
    """Return the outcomes of all runs of built-in recipes that are scored.

    Args:
        places: runs' folders, folders of such, ``papers.json`` files; what a later one says of the
            same run counts.
        device: where the first run of each system answers the dev data.
        data: the folder of the data files; None for each run's own.

    Raises:
        InputError: there is no run in a folder, a file is damaged, or a run has no dev scores.
    """
    made_by = {signature(recipes.load(name)): name for name in recipes.names()}
    found: dict[str, Outcome] = {}
    for place in places:
        if place.is_file():
            found |= {outcome.key: outcome for outcome in read_outcomes(place)}
            continue
        shown = {outcome.system for outcome in found.values() if outcome.answers}
        for run in _runs(place):
            system = made_by.get(signature(run.recipe))
            if system is None or not run.recipe.is_scored:
                continue
            run = run if data is None else run.with_data(data)
            outcome = _outcome(run, system, device if system not in shown else None)
            before = found.get(outcome.key)
            if before is not None and not outcome.answers:  # it was asked already
                outcome = outcome.model_copy(update={"answers": before.answers})
            found[outcome.key] = outcome
            shown |= {system} if outcome.answers else set()
    return list(found.values())


def read_outcomes(path: Path) -> list[Outcome]:
    """Read a ``papers.json``.

    Raises:
        InputError: it is none.
    """
    try:
        return TypeAdapter(list[Outcome]).validate_json(read_bytes(path, None))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f", {part}" for part in problem["loc"])
        raise InputError(
            f"{path}{shorten(where)}: not the outcomes of runs ({problem['msg']}); make it again "
            "from the runs' folders"
        ) from None


def to_json(outcomes: Sequence[Outcome]) -> str:
    """Return the content of a ``papers.json``, a line for each outcome."""
    return (
        "[\n"
        + ",\n".join(dump_json(outcome.model_dump(mode="json")) for outcome in outcomes)
        + "\n]\n"
    )


def _runs(folder: Path) -> Iterator[Run]:
    """Open the runs in a folder, which may be one, or a series, whose finished ones count.

    Raises:
        InputError: there are none.
    """
    found = list(_run_folders(folder))
    if not found:
        raise InputError(f"{folder}: holds no finished run; give a run's folder, or one of several")
    yield from map(open_run, found)


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "recipe.toml").is_file():
        yield folder
    elif (folder / RESULTS).is_file():
        for name in read_results(folder):
            if not _leads_down(name):
                raise InputError(f"{folder / RESULTS}: {name!r} is no folder below it; remove it")
            yield folder / name
    else:
        for below in sorted(path for path in folder.glob("*") if path.is_dir()):
            yield from _run_folders(below)


def signature(recipe: Recipe) -> str:
    """Return what a recipe is known by, whatever its settings: no two built-in ones share it."""
    return recipe.paper or recipe.description


def _outcome(run: Run, system: str, device: torch.device | None) -> Outcome:
    """Return the outcome of a run; with a device, and a checkpoint, its answers too."""
    scores = read_scores(run.folder, run.recipe.tasks)
    named = (*run.recipe.tasks, "overall")
    if scores.split != "dev":
        raise InputError(
            f"{run.folder / 'metrics.json'}: scores on {scores.split}; run engine.evaluate"
        )
    answers = {}
    if device is not None and any(map(run.checkpoints.all, ("best", "step"))):
        answers = {
            task: findings(found) for task, found in dev_answers(run, device, _WORST).items()
        }
    return Outcome(
        system=system,
        settings=run.recipe.model_dump(mode="json", exclude=_MACHINES),
        layers=run.config.num_hidden_layers,
        width=run.config.hidden_size,
        pretrained=bool(run.recipe.init),
        examples={
            task: len(run.split(task, "train"))
            for task in run.recipe.tasks
            if task in run.recipe.trained
        },
        scores=_finite(run.folder / "metrics.json", {name: scores.scores[name] for name in named}),
        answers=answers,
    )


def _finite(file: Path, scores: Mapping[str, float | None]) -> dict[str, float]:
    """Return scores of which every one is a number.

    Raises:
        InputError: one is none: the weights, or what they answer, are not finite.
    """
    for name, score in scores.items():
        if score is None or not math.isfinite(score):
            raise InputError(f"{file}: the score of {name} is not finite; leave this run out")
    return {name: score for name, score in scores.items() if score is not None}


def _leads_down(name: str) -> bool:
    return not (Path(name).is_absolute() or ".." in Path(name).parts)
