"""``python -m bench.plot JSON… --out DIR``: draw a record of any benchmark here.

The growth of the step has a picture of its own (bench/plot_growth.py), and so have encoders of
transformers (bench/plot_transformers.py).  For all others there is one panel a case, one bar a
contestant: its median time as a multiple of the first one's, which is this project's, with the 20 %
and 80 % quantiles as whiskers.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # draws into files, wherever it runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.utils.errors import InputError
from engine.utils.file_names import distinct_names
from engine.utils.output_files import check_outputs, write_output

from . import harness
from .plot_growth import draw_growth
from .plot_transformers import REFERENCE, draw_transformers

_COLUMNS = 3
_OURS, _THEIRS = "#1b6ca8", "#b8b8b8"

Samples = Mapping[str, Sequence[float]]
"""Seconds by contestant."""


def cases(results: Any, name: str) -> Iterator[tuple[str, Samples]]:
    """Find what was timed side by side, wherever a benchmark's results hold it.

    Args:
        results: a record's results or a part of them.
        name: what to call a case that has no name of its own.  Those of a list say theirs under
            "case"; other lists hold one operator's growth, not contestants.
    """
    if isinstance(results, list):
        for record in results:
            if isinstance(record, dict) and "case" in record:
                known = (record[part] for part in ("case", "precision") if part in record)
                yield from cases(record, ", ".join(known))
    if not isinstance(results, dict):
        return
    seconds = results.get("seconds")
    if isinstance(seconds, dict):
        if all(isinstance(samples, dict) for samples in seconds.values()):  # tiles, by case
            yield from ((f"{name}, {case}", samples) for case, samples in seconds.items())
        else:
            yield name, seconds
        return
    timed = {
        part: record
        for part, record in results.items()
        if isinstance(record, dict) and isinstance(record.get("seconds"), list)
    }
    if timed:
        yield name, {part: list(_beside_the_first(record, timed)) for part, record in timed.items()}
        return
    for part, record in results.items():
        yield from cases(record, part)


def _beside_the_first(record: Any, timed: Mapping[str, Any]) -> Iterator[float]:
    """Scale what was timed beside the first contestant, but not beside all others, to its time."""
    scale = 1.0
    if "seconds_of_first" in record:
        first = harness.median(next(iter(timed.values()))["seconds"])
        scale = first / harness.median(record["seconds_of_first"])
    yield from (scale * seconds for seconds in record["seconds"])


def _draw(axes: Axes, name: str, samples: Samples) -> None:
    contestants = list(samples)
    summaries = [harness.summary(samples[contestant]) for contestant in contestants]
    first = summaries[0]["p50"]
    medians = [summary["p50"] / first for summary in summaries]
    whiskers = [
        [(summary["p50"] - summary["p20"]) / first for summary in summaries],
        [(summary["p80"] - summary["p50"]) / first for summary in summaries],
    ]
    ours = (contestants[0], *(name for name in contestants if name.startswith("this ")))
    colours = [_OURS if name in ours else _THEIRS for name in contestants]
    bars = axes.barh(contestants, medians, xerr=whiskers, color=colours, ecolor="#555555")
    axes.bar_label(bars, [f" {ratio:.2f}" for ratio in medians], padding=3, fontsize=8)
    axes.invert_yaxis()  # the first one on top
    axes.margins(x=0.2)
    axes.set_title(f"{name}: {1e3 * first:.3g} ms", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(record: Mapping[str, Any]) -> bytes:
    """Draw a record (PNG)."""
    if record["benchmark"] == "step growth":
        figure, unit = draw_growth(record["results"]), ""
    elif record["benchmark"] == "transformers":
        figure, unit = draw_transformers(record["results"]), f": time as a multiple of {REFERENCE}"
    else:
        figure, unit = _draw_cases(record), ": time as a multiple of the first"
    environment = record["environment"]
    figure.suptitle(
        f"{record['benchmark']} on {environment['device']}{unit} "
        f"(commit {environment['commit'][:7]}, {environment['date'][:10]})",
        fontsize=10,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()


def _draw_cases(record: Mapping[str, Any]) -> Figure:
    found = list(cases(record["results"], record["benchmark"]))
    if not found:
        raise SystemExit(f"no timings in a record of {record['benchmark']!r}")
    columns = min(len(found), _COLUMNS)
    rows = math.ceil(len(found) / columns)
    bars = max(len(samples) for _, samples in found)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(max(8, 4.5 * columns), rows * (0.8 + 0.25 * bars)),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (name, samples) in zip(grid.flat, found, strict=False):
        _draw(axes, name, samples)
    return figure


def main() -> None:
    """Draw every record that is named."""
    parser = Parser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace pictures that are there")
    options = parser.parse_args()
    once = {Path(os.path.realpath(path)): path for path in options.records}
    names = distinct_names(list(once), ending=".json")
    pictures = {options.out / f"{name}.png": path for name, path in zip(names, once, strict=True)}
    try:
        replace = check_outputs(pictures, force=options.force)
        options.out.mkdir(parents=True, exist_ok=True)
        for picture, source in pictures.items():
            record = json.loads(source.read_text(encoding="utf-8"))
            write_output(picture, draw(record), replace=replace)
            print(picture)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    exit_with(main)
