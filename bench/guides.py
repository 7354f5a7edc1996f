"""Score a sweep on the test split and compare each setting with the plain sum, seed by seed.

    python -m bench.guides SWEEP [--json FILE]

SWEEP is the folder of ``engine.sweep`` runs over ``balance`` (``sum`` among it), over weights of
tasks, and over ``train`` with one task each, as docs/guide-multitask.md makes them.  A run is
scored by its best checkpoint on dev, on test examples that decided nothing.  Each setting's
difference from the sum of all tasks under the same seed has a 95 % interval (Student's t over the
seeds); chance would explain a difference whose interval has 0 inside.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.cli.common import Parser, run_cli, terminal
from engine.config.recipe import Recipe
from engine.metrics.read import read_step_lines
from engine.runs.data_paths import origin
from engine.runs.experiments import mean_and_deviation, print_rows, read_results
from engine.runs.paired import t_quantile
from engine.runs.run import open_run
from engine.runs.scoring import score_splits
from engine.utils.errors import InputError

from . import harness

SUM = "sum"


def main() -> int:
    """Score, compare, print and write."""
    parser = Parser(prog="python -m bench.guides", description=__doc__)
    parser.add_argument("sweep", type=Path, help="the folder of a sweep")
    options = harness.parse(parser)
    names = [*read_results(options.sweep)]
    if not names:
        raise InputError(f"{options.sweep}: no finished run; give the folder of a sweep")
    runs = [score_run(options.sweep, name) for name in names]
    compared = compare(runs)
    _print(compared)
    record = harness.Record(options, "guides", torch.device("cpu"))
    record.write({"runs": runs, "compared": compared})
    return 0


def score_run(sweep: Path, name: str) -> dict[str, Any]:
    """Return a run's settings, test scores of the tasks that it trains, and conflicts.

    Args:
        sweep: the folder of the sweep.
        name: of the run below it.

    Raises:
        InputError: its recipe has no test files, or the run cannot be read.
    """
    run = open_run(sweep / name)
    recipe = run.recipe
    tasks = {task: recipe.tasks[task] for task in recipe.train}
    splits = {task: run.read(recipe.formats[task], origin(recipe, task, "test")) for task in tasks}
    model, progress = run.trained_model(torch.device("cpu"))
    of_tasks = recipe.model_copy(update={"tasks": tasks})
    lines = read_step_lines(run.folder)
    cosines: dict[str, list[float]] = {}
    for line in lines:
        for pair, cosine in line["cosines"].items():
            if cosine is not None:
                cosines.setdefault(pair, []).append(cosine)
    return {
        "run": name,
        "setting": setting_of(recipe),
        "seed": recipe.seed,
        "init": bool(recipe.init),
        "steps": len(lines),
        "best_step": progress.step,
        "precision": recipe.precision,
        "test": score_splits(model, splits, of_tasks),
        "conflict_rate": _mean([line["conflict_rate"] for line in lines]) if cosines else None,
        "cosines": {pair: _mean(values) for pair, values in cosines.items()},
    }


def setting_of(recipe: Recipe) -> str:
    """Return what a row of the table is called: the method and weights, or the task alone."""
    if len(recipe.train) == 1:
        return f"{recipe.train[0]} alone"
    weights = {task: recipe.tasks[task].weight for task in recipe.train}
    changed = (f"{task} x {weight:g}" for task, weight in weights.items() if weight != 1)
    return ", ".join((recipe.balance, *changed))


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mean scores of each setting, and its differences from the sum, seed by seed.

    Args:
        runs: what :func:`score_run` returned, of any settings and seeds.

    Returns:
        By setting: ``seeds``, ``conflict_rate`` (None of one task), ``scores`` by name with
        ``mean`` and ``deviation`` (of a sample; None of one seed), and ``against_sum`` by name
        with ``mean``, ``deviation`` and ``half_width`` of the 95 % interval, of the seeds that
        both have, of two seeds at least.
    """
    by_setting: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        by_setting.setdefault(run["setting"], {})[run["seed"]] = run
    sums = by_setting.get(SUM, {})
    found = dict[str, dict[str, Any]]()
    for setting, members in by_setting.items():
        names = [name for name in next(iter(members.values()))["test"] if name != "overall"]
        scores = {name: [run["test"][name] for run in members.values()] for name in names}
        differences = {
            name: [
                run["test"][name] - sums[seed]["test"][name]
                for seed, run in members.items()
                if seed in sums
            ]
            for name in names
        }
        found[setting] = {
            "seeds": sorted(members),
            "conflict_rate": _mean([run["conflict_rate"] for run in members.values()]),
            "scores": {name: _spread(values) for name, values in scores.items()},
            "against_sum": {
                name: _spread(values) | {"half_width": half_width(values)}
                for name, values in differences.items()
                if len(values) > 1 and setting != SUM
            },
        }
    return found


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean by Student's t; of two values at least."""
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "values": [*values]}


def _print(compared: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [["setting", "score", "seeds", "test", "against sum", "conflict"]]
    for setting, result in compared.items():
        rate = result["conflict_rate"]
        for name, score in result["scores"].items():
            difference = result["against_sum"].get(name)
            rows.append(
                [
                    setting,
                    name,
                    str(len(score["values"])),
                    mean_and_deviation(score["values"]),
                    "" if difference is None else _signed(difference),
                    "" if rate is None else f"{rate:.2f}",
                ]
            )
    print_rows(terminal(), rows)


def _signed(difference: Mapping[str, Any]) -> str:
    return f"{difference['mean']:+.3f} ± {difference['half_width']:.3f}"


if __name__ == "__main__":
    run_cli(main)
