"""Fixtures of the kernels' tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kernels.integrations import transformers_layers

VECTOR_UNITS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")
"""In the order of their numbers, see csrc/cpu_isa.cpp; "amx" has no build but of products."""
BF16_UNITS = VECTOR_UNITS[3:]
"""Those with products of bfloat16."""


@pytest.fixture(params=range(len(VECTOR_UNITS)), ids=VECTOR_UNITS)
def vector_unit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on each build of the CPU kernels that this machine can run."""
    limit, best = torch.ops.superbert.limit_vector_unit, len(VECTOR_UNITS) - 1
    if limit(request.param) != request.param:
        limit(best)
        pytest.skip(f"this processor has no {VECTOR_UNITS[request.param]}")
    yield
    limit(best)


@pytest.fixture(params=BF16_UNITS)
def bf16_unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each build of the products of bfloat16, and once where there is none."""
    limit, best = torch.ops.superbert.limit_vector_unit, len(VECTOR_UNITS) - 1
    number = VECTOR_UNITS.index(request.param)
    if limit(number) != number and request.param != BF16_UNITS[0]:
        limit(best)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    limit(best)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test with the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Lets the kernels share their work out, whatever the number of test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fuses_norms_of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes this package's norms in models as small as those of the tests."""
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills with NaN what torch hands out uninitialised: outputs, and the scratch of the kernels.

    A kernel that reads what it has not written, or forgets to write part of its output, then fails,
    instead of passing because fresh memory happens to be zero.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def untouched_memory() -> Iterator[None]:
    """Within `poisoned_memory`: leave memory that is allocated as it is, for far more than fits."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let torch's own functions, the references, be nondeterministic on a GPU."""
    for item in items:
        if "poisoned_memory" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"))


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
