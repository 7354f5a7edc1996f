"""The report on the papers' systems: a table and a picture a paper, mistakes a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from .. import recipe as recipes
from ..errors import InputError
from ..run import Run, open_run
from ..runtime.files import explained, write_text
from . import mistakes, papers
from .papers import Row
from .record import dev_answers

_WORST = 5
"""Worst examples of each task."""


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Open runs; a folder that is none stands for all runs below it.

    Raises:
        InputError: there is no run in a folder.
    """
    found = []
    for folder in folders:
        files = [folder / "recipe.toml"]
        if not files[0].is_file():
            files = sorted(folder.rglob("recipe.toml"))
        if not files:
            raise InputError(f"{folder}: holds no run (no recipe.toml); give a run's folder")
        found += [open_run(file.parent) for file in files]
    return found


def write_systems(runs: Sequence[Run], out: Path, device: torch.device) -> Iterator[Path]:
    """Write the report on the papers; yield each file when it is there.

    Args:
        runs: trained, in any order; those of no paper's system are left out.
        out: the folder, made if missing.
        device: where the runs' best checkpoints answer the dev data.
    """
    with explained("write", out):
        out.mkdir(parents=True, exist_ok=True)
    tables = []
    for paper in papers.read_papers():
        rows = papers.rows_of(paper, runs)
        if any(row.runs for row in rows):
            tables.append(papers.markdown(paper, rows))
            _write_bars(rows, out / f"paper-{paper.key}.png")
            yield out / f"paper-{paper.key}.png"
    if not tables:
        raise InputError("--papers: none of these runs was made by the recipe of a paper's system")
    write_text(out / "papers.md", "\n".join(tables))
    yield out / "papers.md"
    yield from _write_mistakes(runs, out, device)


def _write_mistakes(runs: Sequence[Run], out: Path, device: torch.device) -> Iterator[Path]:
    """Write heatmaps and mistakes of the first run of every system."""
    names = {recipes.load(name).paper: name for name in recipes.of_papers()}
    first = {names[run.recipe.paper]: run for run in reversed(runs) if run.recipe.paper in names}
    sections = []
    for name in sorted(first):
        answers = dev_answers(first[name], device, _WORST)
        mistakes.write_heatmaps(answers, out / f"{name}.png")
        yield out / f"{name}.png"
        sections.append(mistakes.markdown(name, answers))
    write_text(out / "mistakes.md", "\n".join(sections))
    yield out / "mistakes.md"


def _write_bars(rows: Sequence[Row], path: Path) -> None:
    """Draw the papers' overall scores (or the only one) beside ours, a pair of bars a system."""
    shown = [row for row in rows if row.runs]
    task = "overall" if all("overall" in row.system.scores for row in shown) else None
    theirs, ours, deviations = [], [], []
    for row in shown:
        scored = task or next(iter(row.system.scores))
        values = row.ours(scored)
        theirs.append(row.system.scores[scored])
        ours.append(float(np.mean(values)))
        deviations.append(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    place = np.arange(len(shown))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 0.9 + 0.5 * len(shown)), layout="constrained", dpi=120)
        axes = figure.add_subplot()
        axes.barh(place - 0.2, theirs, 0.38, label="paper", color="#b8b8b8")
        axes.barh(place + 0.2, ours, 0.38, label="ours, dev", xerr=deviations, color="#3b6fb6")
        labels = [f"{row.system.name} ({row.system.split})" for row in shown]
        axes.set_yticks(place, labels)
        axes.invert_yaxis()
        axes.set_xlabel(f"{task or 'score'}")
        figure.legend(frameon=False, ncols=2, loc="outside upper right")
        figure.savefig(path, metadata={"Software": None})
