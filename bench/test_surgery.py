"""The cases of bench.surgery under pytest-benchmark: ``pytest bench/test_surgery.py``."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .harness import synchronize
from .surgery import Update, operators, updates

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COLUMNS = 4_000_000


@pytest.fixture(scope="module")
def update() -> Update:
    """Gradients of three tasks that do not fit a cache."""
    return Update(3, _COLUMNS, torch.float32, _DEVICE)


_NAMES = [
    *operators(Update(3, 16, torch.float32, _DEVICE), _DEVICE),
    *updates(Update(3, 16, torch.float32, _DEVICE), _DEVICE),
]


@pytest.mark.parametrize("name", _NAMES)
def test_case(benchmark: BenchmarkFixture, update: Update, name: str) -> None:
    """Time one case."""
    case = (operators(update, _DEVICE) | updates(update, _DEVICE))[name]

    def run() -> None:
        case.run()
        synchronize(torch.device(_DEVICE))

    benchmark(run)
