"""Fixtures of the kernels' tests."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch


@pytest.fixture(params=[16, 32, 64], ids=["plain", "avx2", "avx512"])
def vector_unit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on each build of the CPU kernels that this machine can run."""
    limit = torch.ops.superbert.limit_vector_unit
    if limit(request.param) != request.param:
        limit(64)
        pytest.skip(f"this processor has no vectors of {request.param} bytes")
    yield
    limit(64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test with the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Lets the kernels part their work, whatever the number of test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> None:
    """Fills the memory that the allocator hands out next with NaN.

    A kernel that forgets to write part of its output then fails, instead of passing because fresh
    memory happens to be zero.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, size in product(devices, (64, 512, 4096, 32_768, 262_144)):
        blocks = [torch.full((size,), torch.nan, device=device) for _ in range(16)]
        del blocks


@pytest.fixture(scope="module")
def torchjd():
    """TorchJD's aggregation package with the solvers that it leaves to the user to install."""
    for name in ("cvxpy", "clarabel", "ecos", "qpsolvers", "quadprog", "scipy"):
        pytest.importorskip(name)
    return pytest.importorskip("torchjd.aggregation")


def exact_projector():
    """TorchJD's, with so little regularisation that only rounding is left of it."""
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)
