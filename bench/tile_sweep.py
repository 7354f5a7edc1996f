"""Try settings of Triton kernels: compile them beforehand, time them, print the lines to paste.

A sweep has a budget of seconds.  Settings that it does not suffice for are named as not measured.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from rich.table import Table

from . import harness

Setting = Any
"""A named tuple of numbers, or a number."""
Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds by case and setting, as `text_of` writes it."""

_PROCESSES = 12
_COMPILING = 0.7
"""Share of a budget that compiling may take: what it leaves is for measuring."""
_ROUNDS, _REPLAYS = 4, 10


class Budget:
    """Seconds that a sweep may take, from now on.

    Args:
        seconds: how many.
        clock: tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.seconds = clock, seconds
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; negative where more were taken."""
        return self._end - self._clock()

    def share(self, fraction: float) -> "Budget":
        """Return a budget of a fraction of what is left."""
        return Budget(max(0.0, self.left * fraction), self._clock)


class Compiled(NamedTuple):
    """What came of compiling settings beforehand.

    Attributes:
        broken: what went wrong, by setting.
        late: settings that were not compiled in time.
    """

    broken: dict[Any, str]
    late: list[Any]


def compile_all(
    compile_one: Callable[..., str], settings: Sequence[tuple[Any, ...]], budget: Budget
) -> Compiled:
    """Compile settings in processes of their own, for Triton's cache on disk.

    Args:
        compile_one: a function of a module; returns what went wrong, or nothing.
        settings: its arguments, for each setting, the most important first.
        budget: of the whole sweep, a part of which this may take.
    """
    own = budget.share(_COMPILING)
    broken, late = {}, []
    with multiprocessing.get_context("spawn").Pool(min(_PROCESSES, len(settings))) as pool:
        waiting = [pool.apply_async(compile_one, setting) for setting in settings]
        for setting, each in zip(settings, waiting, strict=True):
            try:
                wrong = each.get(max(0.0, own.left))
            except multiprocessing.TimeoutError:
                late.append(setting)
                continue
            if wrong:
                broken[setting] = wrong
    return Compiled(broken, late)  # leaving the pool ended its processes


def attempt(launch: Callable[[], object]) -> str:
    """Return what goes wrong where a kernel is compiled and run, or nothing."""
    try:
        launch()
    except Exception as error:  # too much shared memory, for one
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def measure(
    run: harness.Contestant,
    settings: Iterable[Setting],
    using: Callable[[Setting], AbstractContextManager[object]],
    device: torch.device,
    budget: Budget,
) -> tuple[dict[str, list[float]], list[Setting]]:
    """Time what settings make of a call, by graph replay and in turn.

    Args:
        run: the call.
        settings: the most important first.
        using: makes the call have a setting, while it is recorded.
        device: a GPU.
        budget: of these; about half of it goes into recording.

    Returns:
        Seconds by setting, and the settings that there was no time for.
    """
    recording = budget.share(0.5)
    graphs: dict[str, harness.Contestant] = {}
    late: list[Setting] = []
    for setting in settings:
        if recording.left <= 0:
            late.append(setting)
            continue
        with using(setting):
            graphs[text_of(setting)] = harness.graph_replay(run, device)
    if not graphs:
        return {}, late
    return harness.device_seconds(graphs, device, rounds=_ROUNDS, replays=_REPLAYS), late


def text_of(setting: Setting) -> str:
    """Return a setting as a table's source has it."""
    if not isinstance(setting, tuple):
        return str(setting)
    return f"{type(setting).__name__}({', '.join(map(str, setting))})"


def line_of(key: tuple[Any, ...], setting: Setting) -> str:
    """Return the line of a table's source with this key and setting."""
    texts = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return f"    ({texts}): {text_of(setting)},"


def fastest(
    settings: Iterable[Setting], usual: Setting, seconds: Samples
) -> tuple[Setting, float] | None:
    """Choose the setting whose times are the least, as multiples of the usual one's.

    Returns:
        The setting, and the geometric mean of these multiples over all cases; None where no
        setting, or the usual one not, was measured in every case.
    """
    medians = {
        setting: [
            harness.median(of_case[text_of(setting)])
            for of_case in seconds.values()
            if text_of(setting) in of_case
        ]
        for setting in dict.fromkeys((usual, *settings))
    }
    whole = {setting: own for setting, own in medians.items() if own and len(own) == len(seconds)}
    if usual not in whole:
        return None
    ratios = {
        setting: math.exp(
            sum(map(math.log, own)) / len(own) - sum(map(math.log, whole[usual])) / len(own)
        )
        for setting, own in whole.items()
    }
    best = min(ratios, key=lambda setting: ratios[setting])  # of equal ones the usual one
    return best, ratios[best]


class Choice(NamedTuple):
    """A line of a table, and what a sweep found for it.

    Attributes:
        table: the file and the table's name.
        key: of the line.
        usual: the setting that it has; None where there is no such line.
        found: of `fastest`.
    """

    table: str
    key: tuple[Any, ...]
    usual: Setting | None
    found: tuple[Setting, float] | None


def report(choices: Sequence[Choice]) -> str:
    """Return the lines to paste, table by table, below those that are there now."""
    lines = ["What compiles here may spill elsewhere: python -m tests.kernels.compile_triton"]
    for table in dict.fromkeys(choice.table for choice in choices):
        own = [choice for choice in choices if choice.table == table]
        lines += [f"{table}, now:"]
        lines += [line_of(each.key, each.usual) for each in own if each.usual is not None]
        times = ["not measured" if each.found is None else f"{each.found[1]:.2f}" for each in own]
        lines += [f"{table}, to paste, in {', '.join(times)} of the time:"]
        lines += [line_of(each.key, each.found[0]) for each in own if each.found is not None]
    return "\n".join(lines)


def print_end(
    broken: Mapping[str, str], late: Sequence[str], budget: Budget, choices: Sequence[Choice]
) -> int:
    """Print what was not measured, and the lines to paste, which come last.

    Returns:
        The status to exit with: 1 where nothing was found for a line.
    """
    for name, text in broken.items():
        print(f"{name}: {text}")
    if late:
        print(f"not measured, since {budget.seconds:g} s did not suffice: {'; '.join(late)}")
    print(f"{budget.seconds - budget.left:.0f} s of {budget.seconds:g}")
    print(report(choices))
    return int(any(each.found is None for each in choices))


def table_of(title: str, heading: str, seconds: Samples) -> Table:
    """Return a table of microseconds, a line for each setting; a star marks each case's least.

    A setting that was not measured in a case has a dash there.
    """
    table = Table(title=title)
    for column in (heading, *seconds):
        table.add_column(column, justify="right")
    medians = {
        case: {name: harness.median(own) for name, own in samples.items()}
        for case, samples in seconds.items()
    }
    least = {case: min(own.values(), default=None) for case, own in medians.items()}
    for name in dict.fromkeys(name for samples in seconds.values() for name in samples):
        cells = ["-"] * len(seconds)
        for place, (case, own) in enumerate(medians.items()):
            if name in own:
                cells[place] = f"{1e6 * own[name]:.1f}" + (" *" if own[name] == least[case] else "")
        table.add_row(name, *cells)
    return table
