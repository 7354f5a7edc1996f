"""Draw how the step's time grows with its arithmetic (``bench.step --growth``)."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from . import harness
from .step_growth import SHAPES

_COLOURS = {"pcgrad": "#1b6ca8", "sum": "#7a7a7a"}
_AXES = {"tasks": "num_tasks", "shape": "shape", "examples": "examples"}


def arithmetic(point: Mapping[str, Any]) -> float:
    """Tokens times the encoder's matrix weights, which its products grow with."""
    layers, width, _ = SHAPES[point["shape"]]
    return float(point["tokens"]) * layers * 12 * width * width


def draw_growth(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw one panel a kind of growth; dashed: the first point, grown with the arithmetic."""
    size = (4.5 * len(results), 3.6)
    figure, grid = pyplot.subplots(
        1, len(results), figsize=size, squeeze=False, layout="constrained"
    )
    panels = grid[0]
    for axes, (kind, points) in zip(panels, results.items(), strict=True):
        places = range(len(points))
        names = [f"{point[_AXES[kind]]}" for point in points]
        for name, colour in _COLOURS.items():
            medians = [harness.median(point["seconds"][name]) for point in points]
            axes.plot(places, medians, "o-", color=colour, label=name)
        first = harness.median(points[0]["seconds"]["sum"]) / arithmetic(points[0])
        linear = [first * arithmetic(point) for point in points]
        axes.plot(places, linear, "--", color="#c0392b", label="as the arithmetic grows")
        axes.set_xticks(places, names)
        axes.set_yscale("log")
        axes.set_xlabel({"tasks": "tasks", "shape": "shape", "examples": "examples a task"}[kind])
        axes.set_ylabel("seconds a step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    return figure
