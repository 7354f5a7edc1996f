"""Fixtures of the cases under the interpreter; test_triton.py has its own for a GPU."""

from collections.abc import Iterator

import pytest

from ..interpreter import builtins_replaced_once


@pytest.fixture
def device() -> Iterator[str]:
    """The CPU, under the interpreter."""
    with builtins_replaced_once():
        yield "cpu"


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    """For every case."""
