"""Demands that a piece of code never waits for the GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Raise a RuntimeError within, where the host waits for the GPU; outside, never."""
    _set("error")
    try:
        yield
    finally:
        _set("default")


def _set(mode: str) -> None:
    with warnings.catch_warnings():  # torch says on first use that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
