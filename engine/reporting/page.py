"""Write one self-contained HTML page a run: settings, curves, mistakes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..config.local_names import toml_without_paths
from ..metrics.read import Json
from ..runs.run import Run
from ..utils.output_files import write_output
from ..utils.quoting import printable
from . import plots
from .run_data import (
    Answers,
    Series,
    dev_answers,
    label_shares,
    layer_conflicts,
    names,
    read_evaluations,
    read_steps,
    series,
    series_by_name,
)

_MISTAKES = 12
"""Examples that went wrong, of each task."""

_LABELS = 24
"""The most labels of a task that are drawn, the most frequent ones."""

_GPU_READINGS = {
    "power_w": "power, W",
    "temperature_c": "temperature, °C",
    "memory_mib": "memory, MiB",
    "sm_clock_mhz": "clock, MHz",
    "memory_clock_mhz": "memory clock, MHz",
    "utilization": "utilization, %",
}


class Picture(NamedTuple):
    """A picture and its caption."""

    title: str
    source: str


class Section(NamedTuple):
    """A part of the page: pictures under a heading, and a sentence about them."""

    title: str
    note: str
    pictures: list[Picture]


def write_page(run: Run, path: Path, device: torch.device, *, replace: bool = False) -> None:
    """Write a run's page.

    Args:
        run: a trained run whose data are there.
        path: of the HTML file, whose name the page has.
        device: where its best checkpoint answers the dev data.
        replace: whether a file that is there is replaced.

    Raises:
        InputError: the run has no steps or no checkpoint, its data cannot be read, or the file is
            there.
    """
    steps, evaluations = read_steps(run), read_evaluations(run)
    answers = dev_answers(run, device, _MISTAKES)
    sections = [
        _losses(steps, evaluations),
        _gradients(steps),
        _layers(steps),
        _answers(answers),
        _speed(steps),
    ]
    html = rendered(
        "page.html",
        name=path.stem,
        description=run.recipe.description,
        facts=dict(facts_of(run, steps)),
        answers=answers,
        sections=sections,
        recipe=toml_without_paths(run.recipe),
    )
    write_output(path, html, replace=replace)


def rendered(template: str, **values: Any) -> str:
    """Return a template of this folder, filled in; texts lose what is no character."""
    loader = PackageLoader(__package__, "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_printable
    )
    return environment.get_template(template).render(values)


def _printable(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def facts_of(run: Run, steps: list[Json]) -> Iterator[tuple[str, str]]:
    """Yield what a run was and did, in words."""
    recipe = run.recipe
    _, rate = series(steps, "tokens_per_s")
    _, conflicts = series(steps, "conflict_rate")
    yield "tasks", ", ".join(recipe.trained)
    yield "balance", f"{recipe.balance}, by {recipe.balance_granularity}"
    yield "encoder", f"{run.config.num_hidden_layers} layers of {run.config.hidden_size}"
    yield "steps", f"{len(steps):,}"
    yield "tokens", f"{sum(line['tokens'] for line in steps):,}"
    if len(rate):
        yield "tokens a second", f"{np.median(rate):,.0f} (median)"
    if len(conflicts):
        yield "conflict rate", f"{conflicts.mean():.0%}"
    _, energy = series(steps, "gpu", "energy_j")  # since the driver was loaded
    if len(energy) > 1 and (np.diff(energy) >= 0).all():
        yield "energy of the GPU, first to last reading", f"{np.ptp(energy) / 3600:,.1f} Wh"
    skipped = sum(line["skipped"] for line in steps)
    if skipped:
        yield "steps skipped", f"{skipped} (gradients not finite)"


def draw_curves(title: str, named: Mapping[str, Series], quantity: str, **options: bool) -> Picture:
    """Draw curves; of more than a picture holds those of the lowest and highest means."""
    means = {name: float(values.mean()) for name, (_, values) in named.items() if len(values)}
    shown = plots.extremes(means)
    if len(shown) < len(means):
        title = f"{title} ({len(shown)} of {len(means):,}: the lowest and highest means)"
    drawn = {name: named[name] for name in shown}
    return Picture(title, plots.curves(drawn, quantity, **options))


def _losses(steps: list[Json], evaluations: list[Json]) -> Section:
    shown = [draw_curves("Training loss", series_by_name(steps, "losses"), "loss")]
    if evaluations:
        scores = series_by_name(evaluations, "scores")
        shown.append(draw_curves("Dev scores", scores, "dev score", smooth=False))
    rate = plots.curves({"lr": series(steps, "lr")}, "learning rate", smooth=False)
    norm = plots.curves({"norm": series(steps, "grad_norm")}, "norm of the combined gradient")
    shown += [Picture("Learning rate", rate), Picture("Gradient norm", norm)]
    return Section("Curves", "Running means; the points behind them are single steps.", shown)


def _gradients(steps: list[Json]) -> Section:
    cosines = series_by_name(steps, "cosines")
    if not cosines:
        return Section(
            "Task gradients", "No step had two tasks, whose gradients could conflict.", []
        )
    norms, weights = (series_by_name(steps, table) for table in ("task_grad_norms", "weights"))
    conflict = plots.curves({"rate": series(steps, "conflict_rate")}, "pairs in conflict")
    return Section(
        "Task gradients",
        "Two tasks are in conflict where the cosine between their gradients is negative.",
        [
            draw_curves("Cosines between task gradients", cosines, "cosine", zero=True),
            Picture("Conflict rate", conflict),
            draw_curves("Norms of the task gradients", norms, "norm"),
            draw_curves("Weights after balancing", weights, "weight in the sum"),
        ],
    )


def _layers(steps: list[Json]) -> Section:
    layers, pairs, cosines, conflicts = layer_conflicts(steps)
    means = zip(pairs, _mean(cosines), strict=True)
    shown = plots.extremes({pair: mean for pair, mean in means if not np.isnan(mean)})
    if not shown:
        hint = (
            "Nothing was recorded: that takes two tasks in a step and --set "
            "log_layer_cosines_every=10."
        )
        return Section("Conflict by layer", hint, [])
    columns = [pairs.index(pair) for pair in shown]
    some = f" ({len(shown)} of {len(pairs):,} pairs)" if len(shown) < len(pairs) else ""
    shares = plots.heatmap(layers, shown, conflicts[:, columns], signed=False)
    mean = plots.heatmap(layers, shown, cosines[:, columns], signed=True)
    return Section(
        "Conflict by layer",
        "How often two tasks pull a layer in opposite directions, and their mean cosine there.",
        [Picture(f"Records in conflict{some}", shares), Picture(f"Mean cosine{some}", mean)],
    )


def _mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean of each column, without NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    sums = np.where(known, values, 0.0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(len(sums), np.nan), where=known.any(0))


def _answers(answers: dict[str, Answers]) -> Section:
    drawn = [
        Picture(
            f"{task}: {own.metric} {own.score:.3f}",
            _drawn(own),
        )
        for task, own in answers.items()
    ]
    return Section("Answers on the dev data", "The best checkpoint's.", drawn)


def _drawn(answers: Answers) -> str:
    form = answers.form
    if form.labels == "none":
        return plots.ranks(answers)
    if form.labels == "spans":
        return plots.word_shares(answers)
    if form.labels != "several":
        return plots.confusion_matrix(answers) if form.whole else plots.scatter(answers)
    shares = label_shares(answers)
    most = np.sort(np.argsort(-shares[:, 2], kind="stable")[:_LABELS])
    rows = [form.spell_label(number) for number in most.tolist()]
    return plots.heatmap(rows, ["recall", "precision", "frequency"], shares[most], signed=False)


def _speed(steps: list[Json]) -> Section:
    shown = [
        Picture(
            "Throughput",
            plots.curves({"rate": series(steps, "tokens_per_s")}, "tokens a second"),
        )
    ]
    for reading, label in _GPU_READINGS.items():
        if reading in names(steps, "gpu"):
            curve = plots.curves({reading: series(steps, "gpu", reading)}, label, smooth=False)
            shown.append(Picture(f"GPU {label}", curve))
    return Section("Speed", "Evaluations and checkpoints are left out.", shown)
