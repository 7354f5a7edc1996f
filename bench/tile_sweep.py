"""Try tile sizes of a Triton kernel: compile every setting beforehand, and tell the times apart."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from rich.table import Table

from . import harness

Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds by case and setting."""


def broken(compile_one: Callable[..., str], settings: Sequence[tuple[Any, ...]]) -> dict[Any, str]:
    """Compile settings in processes of their own, for Triton's cache on disk.

    Args:
        compile_one: a function of a module; returns what went wrong, or nothing.
        settings: its arguments, for each setting.

    Returns:
        What went wrong, by setting.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=spawn) as pool:
        wrong = list(pool.map(compile_one, *zip(*settings, strict=True)))
    return {setting: text for setting, text in zip(settings, wrong, strict=True) if text}


def attempt(launch: Callable[[], object]) -> str:
    """Return what goes wrong where a kernel is compiled and run, or nothing."""
    try:
        launch()
    except Exception as error:  # too much shared memory, for one
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def table_of(title: str, heading: str, seconds: Samples) -> Table:
    """Return a table of microseconds, a line for each setting; a star marks each case's least."""
    table = Table(title=title)
    for column in (heading, *seconds):
        table.add_column(column, justify="right")
    least = [min(map(harness.median, samples.values())) for samples in seconds.values()]
    for name in next(iter(seconds.values())):
        times = [harness.median(samples[name]) for samples in seconds.values()]
        cells = [
            f"{1e6 * time:.1f}" + (" *" if time == best else "")
            for time, best in zip(times, least, strict=True)
        ]
        table.add_row(name, *cells)
    return table
