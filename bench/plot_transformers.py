"""Draw how the loops of ``bench.transformers`` compare with transformers' on padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import harness

REFERENCE = "transformers, padded"
# This project's in blues; of a loop that is not here, the next one of matplotlib's.
_COLOURS = {
    "accelerated, padded": "#1b6ca8",
    "accelerated, packed": "#6cb4e4",
    "accelerated, compiled": "#0b3558",
    "transformers, sorted": "#9a9a9a",
    "transformers, compiled": "#4d4d4d",
}

Case = Mapping[str, Any]
"""What was measured of one model on one case."""


def panels(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return the cases of each panel: of a mode and a precision, with padding or without."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        if REFERENCE in case["seconds"]:
            padding = "without padding" if full(case) == 1 else "padded texts"
            name = f"{case['mode']}, {padding}, {case['precision']}"
            found.setdefault(name, []).append(case)
    return found


def full(case: Case) -> float:
    """Return the share of a case's places that are tokens."""
    return float(sum(case["tokens"]) / sum(case["places"]))


def ratios(case: Case) -> Iterator[tuple[str, float, float, float]]:
    """Return the time of each loop but the reference, as a multiple of the reference's median.

    Returns:
        Its name, the median, and the 20 % and 80 % quantiles.
    """
    reference = harness.median(case["seconds"][REFERENCE])
    for name, samples in case["seconds"].items():
        if name != REFERENCE:
            summary = harness.summary(samples)
            yield name, *(summary[key] / reference for key in ("p50", "p20", "p80"))


def draw_transformers(results: Mapping[str, Any]) -> Figure:
    """Draw one panel a mode, precision and kind of batch; a line a model and case, a dot a loop."""
    found = panels(results["cases"])
    if not found:
        raise SystemExit(f"no timings of {REFERENCE!r} to compare others with")
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    names = list(found)
    most = [
        max(len(found[name]) for name in names[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(6.2 * columns, sum(0.8 + 0.24 * count for count in most) + 0.8),
        gridspec_kw={"height_ratios": [1 + 0.3 * count for count in most]},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, (name, cases) in zip(grid.flat, found.items(), strict=False):
        _draw(axes, name, cases, handles)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    return figure


def _draw(axes: Axes, name: str, cases: Sequence[Case], handles: dict[str, Any]) -> None:
    for line, case in enumerate(cases):
        loops = list(ratios(case))
        for turn, (loop, median, low, high) in enumerate(loops):
            height = line + 0.15 * (turn - (len(loops) - 1) / 2)  # none hides another
            known = handles.get(loop)
            colour = known.get_color() if known else _COLOURS.get(loop, f"C{len(handles) + 1}")
            axes.plot([low, high], [height, height], color=colour, linewidth=1.5)
            (dot,) = axes.plot([median], [height], "o", color=colour, markersize=5)
            handles.setdefault(loop, dot)
    axes.axvline(1, color="#c0392b", linewidth=1)
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)  # the first one on top
    axes.set_xlim(left=0)
    axes.tick_params(labelbottom=True)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(case: Case) -> str:
    share = f" ({100 * full(case):.0f} % full)"
    says_so = full(case) == 1 or case["case"].endswith("full")
    return f"{case['model']}, {case['case']}{'' if says_so else share}"
