"""Folders of series whose statistics are known, written without training."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine import report
from engine.config import recipe as recipes
from engine.runs.experiments import Result, seeds_of
from engine.sweep import grid_points

TASKS = ("sst", "quora", "sts")
PAIRS = ("sst/quora", "sst/sts", "quora/sts")
EFFECTS = {"sum": 0.0, "pcgrad": 0.05, "cagrad": 0.001}
NOISE = np.random.default_rng(3).normal(0, 0.004, (3, 4, 3))


def write_run(
    folder: Path,
    recipe: str,
    settings: Sequence[str],
    seed: int,
    steps: Sequence[Mapping[str, float]],
) -> None:
    """Write what stays of a run: its settings, and a line for each step.

    Args:
        folder: of the run.
        recipe: a built-in one.
        settings: overrides.
        seed: of the run.
        steps: the cosine of each pair of tasks, by step.
    """
    folder.mkdir(parents=True)
    made = recipes.load(recipe, [*settings, f"seed={seed}"])
    (folder / "recipe.toml").write_text(made.to_toml())
    lines = [json.dumps(step_line(number, cosines)) for number, cosines in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def step_line(step: int, cosines: Mapping[str, float]) -> dict:
    by_task = {task: 1.0 + number for number, task in enumerate(TASKS)}
    conflicts = sum(value < 0 for value in cosines.values())
    return {
        "step": step,
        "lr": 0.1,
        "tokens": 100,
        "losses": by_task,
        "weights": by_task,
        "cosines": dict(cosines),
        "conflict_rate": conflicts / len(cosines) if cosines else 0.0,
        "task_grad_norms": {task: 2 * value for task, value in by_task.items()},
        "grad_norm": 1.0,
        "skipped": 0,
        "tokens_per_s": 50.0,
    }


def scores_of(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(TASKS, values, strict=True)) | {"overall": sum(values) / len(values)}


def write_series(
    folder: Path,
    axes: Sequence[str],
    seeds: int,
    scores: Callable[[Mapping[str, str], int], Mapping[str, float] | None],
    recipe: str = "demo",
    steps: int = 40,
) -> Path:
    """Write the folder of a sweep.

    Args:
        folder: of the series.
        axes: of the grid.
        seeds: of each point.
        scores: of a point and seed; None for a run that has no result.
        recipe: a built-in one.
        steps: of each run.
    """
    results = {}
    for point in grid_points(axes):
        group = f"{recipe}/{','.join(point)}" if point else recipe
        settings = dict(setting.split("=", 1) for setting in point)
        for spec in seeds_of(group, recipes.load(recipe, point), seeds, point):
            rng = np.random.default_rng([spec.recipe.seed, len(results)])
            course = rng.normal(0.1, 0.3, (steps, 3)) + np.linspace(-0.2, 0.2, steps)[:, None]
            cosines = [dict(zip(PAIRS, row, strict=True)) for row in course.tolist()]
            write_run(folder / spec.name, recipe, point, spec.recipe.seed, cosines)
            found = scores(settings, spec.recipe.seed)
            if found is not None:
                results[spec.name] = Result(group, dict(found), 60.0 + spec.recipe.seed)._asdict()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def of_point(point, seed) -> dict[str, float]:
    method = list(EFFECTS).index(point["balance"])
    values = 0.5 + EFFECTS[point["balance"]] + 0.02 * seed + NOISE[method, seed]
    return scores_of(values.tolist())


def run(*arguments: object) -> None:
    assert report.main(["--series", *map(str, arguments), "--device", "cpu"]) == 0


def rows_of(text: str, title: str = "# Runs of") -> list[list[str]]:
    """The cells of the first table below a title, without its head."""
    table = text.partition(title)[2].partition("\n| ")[2].partition("\n\n")[0]
    lines = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
