"""Write one self-contained HTML page about several runs: scores, settings, curves."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.local_names import toml_without_paths
from ..metrics.read import Json
from ..runs.run import Run
from ..runs.scoring import METRICS, read_scores, score_names
from ..utils.output_files import write_output
from .page import Picture, Section, draw_curves, facts_of, rendered
from .run_data import names, read_evaluations, read_steps, series, series_by_name


class RunValue(NamedTuple):
    """A cell of a table.

    Attributes:
        text: empty where a run has nothing.
        difference: from the first run, with its sign.
        best: whether no run has a better score.
    """

    text: str
    difference: str = ""
    best: bool = False


class Line(NamedTuple):
    """A line of a table: a name and a cell for each run."""

    name: str
    cells: list[RunValue]


def write_comparison(runs: Mapping[str, Run], path: Path, *, replace: bool = False) -> None:
    """Write a page that puts runs beside each other.

    Args:
        runs: by the names that the page calls them by; those without scores have empty cells.
        path: of the HTML file.
        replace: whether a file that is there is replaced.

    Raises:
        InputError: a run has no steps, one of its files cannot be read, or the file is there.
    """
    steps = {name: read_steps(run) for name, run in runs.items()}
    evaluations = {name: read_evaluations(run) for name, run in runs.items()}
    facts = [dict(facts_of(run, steps[name])) for name, run in runs.items()]
    html = rendered(
        "comparison.html",
        name="Comparison",
        description=", ".join(runs),
        runs=[*runs],
        scores=score_rows([*map(_scores, runs.values())]),
        settings=differing_settings([*runs.values()]),
        facts=[Line(name, [RunValue(text or "") for text in own]) for name, own in _by_name(facts)],
        sections=[
            _curves("Dev scores", evaluations, "scores", "dev score", smooth=False),
            _curves("Training losses", steps, "losses", "loss"),
            _gradients(steps),
        ],
    )
    write_output(path, html, replace=replace)


def _scores(run: Run) -> dict[str, float]:
    """Return a run's dev scores by the names of its recipe; none of a run that has no scores."""
    if not (run.folder / METRICS).is_file():
        return {}
    found = read_scores(run.folder, run.recipe.tasks)
    known = [*score_names(run.recipe), "overall"]
    return {name: found.scores[name] for name in known if name in found.scores}


def score_rows(scores: Sequence[Mapping[str, float]]) -> list[Line]:
    """Return a line for each score, ``overall`` last.

    Means of other tasks are shown without a difference.
    """
    rows = dict(_by_name(scores))
    overall = rows.pop("overall", None)
    made = [score_row(name, own) for name, own in rows.items()]
    if overall is None:
        return made
    comparable = len({frozenset(own) for own in scores if own}) == 1
    plain = [RunValue("" if value is None else f"{value:.3f}") for value in overall]
    return [*made, score_row("overall", overall) if comparable else Line("overall", plain)]


def score_row(name: str, scores: Sequence[float | None]) -> Line:
    """Return a score of each run, with its difference from the first one's."""
    known = [score for score in scores if score is not None]
    first, cells = scores[0], []
    for number, score in enumerate(scores):
        if score is None:
            cells.append(RunValue(""))
            continue
        compared = number > 0 and first is not None
        difference = f"{score - first:+.3f}" if compared and first is not None else ""
        best = len(known) > 1 and f"{score:.3f}" == f"{max(known):.3f}"
        cells.append(RunValue(f"{score:.3f}", difference, best))
    return Line(name, cells)


def differing_settings(runs: Sequence[Run]) -> list[Line]:
    """Return the settings in which recipes differ.

    Those of a task, objective or phase that not all have are left out.
    """
    flat = [_flat(tomllib.loads(toml_without_paths(run.recipe))) for run in runs]
    tables = [{_table_of(name) for name in own} for own in flat]
    shared = tables[0].intersection(*tables)
    return [
        Line(name, [RunValue("" if value is None else _spelled(value)) for value in values])
        for name, values in _by_name(flat)
        if _table_of(name) in shared and any(value != values[0] for value in values)
    ]


def _table_of(name: str) -> str:
    """Return the task, objective or phase of a setting, ``tasks.sst``; empty for one of none."""
    table, *rest = name.split(".")
    return f"{table}.{rest[0]}" if table in ("tasks", "objectives", "phases") else ""


def _flat(table: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return the values of a table and the tables in it by dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{within}{key}.")
        else:
            found[f"{within}{key}"] = value
    return found


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_spelled, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _by_name(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return the values of all tables by name, None where one has no such name."""
    found = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name) for table in tables]) for name in found]


def _curves(
    title: str, lines: Mapping[str, list[Json]], table: str, quantity: str, *, smooth: bool = True
) -> Section:
    """Return a picture for each number of a table of the lines, with a curve of each run."""
    by_run = {run: series_by_name(own, table) for run, own in lines.items()}
    shown = [
        draw_curves(
            name,
            {run: own[name] for run, own in by_run.items() if name in own},
            quantity,
            smooth=smooth,
        )
        for name in dict.fromkeys(name for own in by_run.values() for name in own)
    ]
    note = "Of all evaluations." if not smooth else "Running means; the points are single steps."
    return Section(title, note if shown else "None was recorded.", shown)


def _gradients(steps: Mapping[str, list[Json]]) -> Section:
    """Return pictures of cosines, by pair of tasks, and of the conflict rate."""
    section = _curves("Task gradients", steps, "cosines", "cosine")
    if not section.pictures:
        return section._replace(note="No step had two tasks, whose gradients could conflict.")
    rates = {
        run: series(own, "conflict_rate") for run, own in steps.items() if names(own, "cosines")
    }
    rate: Picture = draw_curves("Conflict rate", rates, "pairs in conflict")
    return section._replace(pictures=[rate, *section.pictures])
