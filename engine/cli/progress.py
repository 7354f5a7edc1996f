"""Show a training run on the terminal."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live

from ..checkpoints.manifest import Progress
from ..data.masked_text import MaskedText
from ..data.rank_examples import RankExamples
from ..data.sampler import TokenSampler
from ..data.sentences_twice import SentencesTwice
from ..data.split import TokenizedSplit
from ..data.streamed import StreamedExamples
from ..data.table import bad_row_lines
from ..data.task_batch import Examples
from ..distributed.bandwidth import measure_traffic
from ..lint.idle_settings import lines_on_idle_settings
from ..lint.phase_facts import PhaseFacts
from ..runs.run import Run
from ..runtime.execution import RECORDED, Execution
from ..training.trainer import Trainer


def print_line_on_init(console: Console, run: Run) -> None:
    """Print what a run takes from another one that ``--init`` names, if it does."""
    if line := run.line_on_init:
        console.print(line, soft_wrap=True, highlight=False)


def describe(console: Console, trainer: Trainer) -> None:
    """Print what is about to be trained."""
    recipe, parameters = trainer.recipe, trainer.parameters
    name = trainer.name
    rows = len(parameters.rows)
    gradients = f"{rows} task gradients, balance {recipe.balance}" if rows > 1 else "one gradient"
    console.print(
        (f"{name}: " if name else "") + f"{parameters.numel / 1e6:.1f} M parameters, {gradients}, "
        f"{trainer.total_steps} steps of {_examples(trainer)} on {trainer.device} "
        f"({str(parameters.compute.dtype).removeprefix('torch.')})",
        soft_wrap=True,
    )
    if trainer.ranks.size > 1:
        traffic = measure_traffic(trainer.sync, parameters, trainer.optimizer)
        console.print(f"{trainer.ranks.size} ranks, {recipe.distribute}: {traffic}", soft_wrap=True)


def _examples(trainer: Trainer) -> str:
    """Return ``16 examples a task``, or how many of each."""
    sizes = {
        sampler.task: f"{sampler.tokens:,} tokens"
        if isinstance(sampler, TokenSampler)
        else f"{sampler.batch_size} examples"
        for sampler in trainer.samplers
    }
    (first, *others) = dict.fromkeys(sizes.values())
    if not others:
        return f"{first} a task"
    return ", ".join(f"{size} of {task}" for task, size in sizes.items())


def report_data(
    console: Console, splits: Iterable[Examples], known: Collection[str] = ()
) -> list[str]:
    """Print the warnings about the data files.

    Args:
        console: where to.
        splits: what was read.
        known: notes on files that were printed before.

    Returns:
        The notes that are known now.
    """
    notes = list(known)
    for split in splits:
        for line in _notes_on(split):
            if line not in notes:
                notes.append(line)
                console.print(line, highlight=False, soft_wrap=True)
        if not isinstance(split, TokenizedSplit | RankExamples):
            continue
        found = split.report if isinstance(split, RankExamples) else split
        if found.truncated:
            console.print(f"{split.task}: {found.truncated} sentences cut to the length limit")
        for line in bad_row_lines(found.bad_rows, found.first_bad):
            console.print(f"{split.task}: {line}", highlight=False, soft_wrap=True)
    return notes


def report_streams(console: Console, splits: Iterable[Examples]) -> None:
    """Print what was cut or skipped of the streams that were trained on."""
    for split in splits:
        if not isinstance(split, StreamedExamples):
            continue
        if split.truncated:
            console.print(f"{split.task}: {split.truncated} sentences cut to the length limit")
        what = "rows of the stream skipped"
        for line in bad_row_lines(split.bad_rows, split.first_bad, what):
            console.print(f"{split.task}: {line}", highlight=False, soft_wrap=True)


def _notes_on(examples: Examples) -> Iterator[str]:
    """Yield a line for each note on the files of a task or objective."""
    if isinstance(examples, TokenizedSplit | StreamedExamples):
        yield from (f"{examples.task}: {note}" for note in examples.notes)
    elif isinstance(examples, RankExamples):
        yield f"{examples.task}: {_dealt(examples)}"
        of_task = f"{examples.task}: " if examples.report.found is None else ""
        yield from (f"{of_task}{note}" for note in examples.report.notes)
    elif isinstance(examples, MaskedText | SentencesTwice):
        yield from examples.found.notes


def _dealt(examples: RankExamples) -> str:
    """Return how many files and examples the ranks have, and what follows."""
    report, ranks = examples.report, len(examples.sizes)
    return (
        f"{report.files:,} files dealt to {ranks} ranks, {report.rows:,} examples, of which this "
        f"one reads {len(examples.own):,}; runs with another number of ranks see other batches"
    )


def print_idle_settings(
    console: Console, trainer: Trainer, facts: Mapping[str, PhaseFacts], known: Collection[str]
) -> list[str]:
    """Print a line for each setting that the recipe gives and that changes nothing.

    Args:
        console: where to.
        trainer: of the phase that begins.
        facts: by phase, what its data decide, as far as they are read.
        known: lines that were printed before.

    Returns:
        The lines that are known now.
    """
    lines = lines_on_idle_settings(trainer.run, trainer.device, trainer.ranks, facts)
    for line in lines:
        if line not in known:
            console.print(line, soft_wrap=True, highlight=False)
    return [*known, *lines]


def print_warmup(console: Console, execution: Execution) -> None:
    """Print the time of compiling and recording, and the number of graphs, if there were any."""
    if execution.kind == "eager":
        return
    graphs = (
        f"{execution.num_graphs} CUDA graphs of at most {execution.max_graphs}, "
        f"{execution.steps_beyond_limit} steps beyond them run as they are, "
    )
    console.print(
        f"execution {execution.kind}: {graphs if execution.kind in RECORDED else ''}"
        f"{execution.warmup_seconds:.1f} s of warm-up, not counted in tokens a second",
        soft_wrap=True,
    )


_SPEED_OVER = 3600.0
"""Seconds over which the time left is estimated; rich's 30 may see a single block of steps."""


class ProgressBar:
    """Steps, conflict rate, tokens a second and the time left; below them the losses."""

    def __init__(self, console: Console, done: int, total: int) -> None:
        self._console = console
        self._bar = bars.Progress(
            bars.BarColumn(bar_width=16),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.description}"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("left"),
            console=console,
            speed_estimate_period=_SPEED_OVER,
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._live = Live(self._bar, console=console)

    def show(self, steps_done: int, line: Mapping[str, Any]) -> None:
        """Update the display with a line of ``metrics.jsonl``."""
        rates = f"conflict {line['conflict_rate']:.0%}  {line['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=steps_done, description=rates)
        losses = [f"{task} {_number(loss)}" for task, loss in line["losses"].items()]
        self._live.update(Group(self._bar, Columns(["losses", *losses], padding=(0, 2))))

    def print_epoch(
        self, progress: Progress, epoch_steps: int, scores: Mapping[str, float]
    ) -> None:
        """Print the dev scores, at the end of an epoch or within it."""
        figures = "  ".join(f"{task} {_number(value)}" for task, value in scores.items())
        mark = "  (best so far)" if progress.best_step == progress.step else ""
        self._console.print(
            f"epoch {progress.phase_step / epoch_steps:.3g}  dev  {figures or 'not scored'}{mark}",
            soft_wrap=True,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._live.stop()
        if not self._console.is_interactive:
            self._console.print()  # into a file, rich leaves the last line open


def list_recipes(console: Console, recipes: Iterable[tuple[str, str]]) -> None:
    """Print recipes, a line each: name and description."""
    pairs = list(recipes)
    width = max(len(name) for name, _ in pairs)
    for name, description in pairs:
        console.print(f"{name:{width}}  {description}", highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "not finite"
