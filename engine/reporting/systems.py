"""The report on the papers' systems: a table and a picture a paper, mistakes a system."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..config import recipe as recipes
from ..utils.errors import InputError
from ..utils.files import explained
from ..utils.output_files import write_output
from . import mistakes, papers
from .labels import LITERAL
from .outcomes import Outcome, to_json
from .papers import Row, System
from .plots import png

OUTCOMES = "papers.json"

_STYLE: Any = {
    **LITERAL,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def possible_files(out: Path) -> list[Path]:
    """Return the files that :func:`write_systems` writes, and those that it might."""
    tables = [f"paper-{paper.key}.png" for paper in papers.read_papers()]
    systems = [f"{name}.png" for name in recipes.names()]
    return [out / name for name in (OUTCOMES, "papers.md", "mistakes.md", *tables, *systems)]


def write_systems(
    outcomes: Sequence[Outcome], out: Path, *, replace: bool = False
) -> Iterator[Path]:
    """Write the report on the papers; yield each file when it is there.

    Args:
        outcomes: of runs of built-in recipes, in any order.
        out: the folder, made if missing.
        replace: whether files that are there are replaced.

    Raises:
        InputError: no system of a paper is among them, or a file is there.
    """
    with explained("write", out):
        out.mkdir(parents=True, exist_ok=True)
    write = partial(write_output, replace=replace)
    rows, tables = papers.rows_of(outcomes), []
    for paper in papers.read_papers():
        run = [
            (system, row)
            for system, row in papers.paired(paper, rows)
            if row is not None and row.scores(_shown_score(system))
        ]
        if run:
            tables.append(papers.markdown(paper, rows))
            write(out / f"paper-{paper.key}.png", _bars(run))
            yield out / f"paper-{paper.key}.png"
    if not tables:
        raise InputError(
            "--papers: none of these runs was made by the recipe of a paper's system and scored"
        )
    write(out / OUTCOMES, to_json(outcomes))
    yield out / OUTCOMES
    write(out / "papers.md", "\n".join([*tables, papers.ranking(rows)]))
    yield out / "papers.md"
    yield from _write_mistakes(outcomes, out, write)


def without_answers(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the systems of which no run brought its answers along."""
    systems = {outcome.system for outcome in outcomes}
    return sorted(systems - {outcome.system for outcome in outcomes if outcome.answers})


def _write_mistakes(
    outcomes: Sequence[Outcome], out: Path, write: Callable[[Path, str | bytes], None]
) -> Iterator[Path]:
    """Write heatmaps and mistakes of the first run of every system that has any."""
    first = {outcome.system: outcome.answers for outcome in reversed(outcomes) if outcome.answers}
    if not first:
        return
    for system, answers in sorted(first.items()):
        write(out / f"{system}.png", mistakes.heatmaps(answers))
        yield out / f"{system}.png"
    sections = [mistakes.markdown(system, answers) for system, answers in sorted(first.items())]
    write(out / "mistakes.md", "\n".join(sections))
    yield out / "mistakes.md"


def _bars(shown: Sequence[tuple[System, Row]]) -> bytes:
    """Draw the papers' overall scores (or the only one) beside ours, a pair of bars a row (PNG)."""
    theirs, ours, deviations = [], [], []
    for system, row in shown:
        scored = _shown_score(system)
        values = row.scores(scored)
        theirs.append(system.scores[scored])
        ours.append(float(np.mean(values)))
        deviations.append(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    place = np.arange(len(shown))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.5 * len(shown)), layout="constrained", dpi=120)
        axes = figure.add_subplot()
        axes.barh(place - 0.2, theirs, 0.38, label="paper", color="#b8b8b8")
        axes.barh(place + 0.2, ours, 0.38, label="ours, dev", xerr=deviations, color="#3b6fb6")
        labels = [f"{system.name} ({system.split})" for system, _ in shown]
        axes.set_yticks(place, labels)
        axes.invert_yaxis()
        axes.set_xlabel("overall score, or that of the only task")
        figure.legend(frameon=False, ncols=2, loc="outside upper right")
        return png(figure)


def _shown_score(system: System) -> str:
    """Return the score that a system's bar shows."""
    return "overall" if "overall" in system.scores else next(iter(system.scores))
