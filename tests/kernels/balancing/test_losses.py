"""Methods of losses on losses that are zero, tiny, huge, negative or not finite; their states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import balancing
from kernels.balancing.states import Step

from .methods import gradients, losses_of_steps

LOGARITHMIC = {"gls", "stch", "famo", "db_mtl"}
STATEFUL: dict[str, Callable[..., Step[Any]]] = {
    "uw": balancing.uw,
    "dwa": lambda *arguments: balancing.dwa(*arguments, window=1),
    "imtl_l": balancing.imtl_l,
    "imtl": balancing.imtl,
    "stch": lambda *arguments: balancing.stch(*arguments, warmup=1),
    "famo": balancing.famo,
}
METHODS: dict[str, Callable[..., Step[Any]]] = {
    **STATEFUL,
    "gls": lambda gram, losses, _: Step(balancing.gls(gram, losses), ()),
    "db_mtl": lambda gram, losses, _: Step(balancing.db_mtl(gram, losses), ()),
}
DTYPES = [torch.float32, torch.float64]
LOSSES = {
    "zero": [0.0, 0.0, 0.0],
    "one zero": [1.0, 0.0, 2.0],
    "one of them": [0.0, 0.0, 2.0],
    "tiny": [1e-38, 1e-30, 1e-44],
    "huge": [1e38, 1e30, 3e38],
    "tiny and huge": [1e-44, 3e38, 1.0],
    "equal": [1.0, 1.0, 1.0],
}
NEGATIVE = {"negative": [-1.0, 1.0, 2.0], "huge negative": [1.0, -3e38, 0.0]}
UNKNOWN = {"nan": [torch.nan, 1.0, 2.0], "inf": [1.0, torch.inf, 2.0], "-inf": [1.0, -torch.inf, 0]}


def matrix(dtype: torch.dtype = torch.float32, num_tasks: int = 3) -> Tensor:
    rows = gradients(num_tasks, 3).to(dtype)
    return rows @ rows.T


def later(name: str, gram: Tensor) -> Any:
    """A method's state after a few usual steps."""
    state = None
    for losses in losses_of_steps(gram.shape[-1]):
        state = METHODS[name](gram, losses, state).state
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LOSSES | NEGATIVE)
@pytest.mark.parametrize("name", METHODS)
def test_weights_and_states_are_finite(name: str, case: str, dtype: torch.dtype) -> None:
    """For ten steps, from the first one on or from usual ones; then with usual losses again."""
    gram, losses = matrix(dtype), torch.tensor((LOSSES | NEGATIVE)[case])
    for state in (None, later(name, gram)):
        for number in range(10):
            step = METHODS[name](gram, losses if number < 7 else torch.ones(3), state)
            if case in NEGATIVE and name in LOGARITHMIC and number < 7:
                assert step.weights.isnan().all()
            else:
                assert step.weights.isfinite().all(), number
                assert (name == "imtl") or (step.weights >= 0).all()
            assert step.weights.dtype == dtype
            assert all(tensor.isfinite().all() for tensor in step.state)
            state = step.state


@pytest.mark.parametrize("name", ["uw", "imtl_l", "imtl", "famo"])
def test_the_largest_rate_leaves_all_finite(name: str) -> None:
    method, state = getattr(balancing, name), None
    for number in range(20):
        losses = losses_of_steps(3)[number % 3]
        weights, state = method(matrix(), losses, state, lr=torch.finfo(torch.float32).max)
        assert weights.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in state)


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_makes_all_weights_nan_and_changes_no_state(
    name: str, case: str
) -> None:
    gram = matrix()
    state = later(name, gram)
    step = METHODS[name](gram, torch.tensor(UNKNOWN[case]), state)
    assert step.weights.isnan().all()
    assert all(map(torch.equal, step.state, state))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_gradient_that_is_not_finite_changes_no_state(name: str) -> None:
    gram = matrix()
    state = later(name, gram)
    for value in (torch.nan, torch.inf):
        corrupted = gram.clone()
        corrupted[1, 1] = value
        step = METHODS[name](corrupted, torch.ones(3), state)
        assert step.weights.isnan().all()
        assert all(map(torch.equal, step.state, state))


@pytest.mark.parametrize("name", METHODS)
def test_tasks_can_be_permuted(name: str) -> None:
    rows, order = gradients(5, 4), torch.tensor([3, 0, 4, 1, 2])
    state = permuted = None
    for losses in losses_of_steps(5):
        weights, state = METHODS[name](rows @ rows.T, losses, state)
        found, permuted = METHODS[name](rows[order] @ rows[order].T, losses[order], permuted)
        torch.testing.assert_close(found, weights[order])


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_states_may_be_each_groups_own(name: str) -> None:
    grams = torch.stack([matrix(num_tasks=4), 2 * matrix(num_tasks=4)])
    together: Any = None
    apart: list[Any] = [None, None]
    for losses in losses_of_steps(4):
        own = torch.stack([losses, losses.flip(0)])
        weights, together = METHODS[name](grams, own, together)
        for group in range(2):
            expected, apart[group] = METHODS[name](grams[group], own[group], apart[group])
            torch.testing.assert_close(weights[group], expected)
            for tensor, other in zip(together, apart[group], strict=True):
                torch.testing.assert_close(tensor[group], other)


@pytest.mark.parametrize("name", STATEFUL)
def test_states_keep_their_dtype(name: str) -> None:
    for gram, dtype in ((matrix(), torch.float32), (matrix(torch.float64), torch.float64)):
        state = later(name, gram)
        assert {tensor.dtype for tensor in state} == {dtype}
        step = METHODS[name](matrix(torch.float64), torch.ones(3), state)
        assert {tensor.dtype for tensor in step.state} == {dtype}


@pytest.mark.parametrize("name", METHODS)
def test_weights_have_no_derivative_and_states_no_graph(name: str) -> None:
    gram, losses = matrix(), torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    step = METHODS[name](gram, losses, None)
    with pytest.raises(NotImplementedError, match=f"^{name}: has no derivative; use detached"):
        step.weights.sum().backward()
    assert not any(tensor.requires_grad for tensor in step.state)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_is_no_state_is_refused(name: str) -> None:
    gram = matrix()
    state = later(name, gram)
    for bad in (state._asdict(), tuple(state), gram):
        with pytest.raises(TypeError, match=r"^state: expected "):
            STATEFUL[name](gram, torch.ones(3), bad)
    first = state._fields[0]
    for bad in (torch.ones(1), torch.ones(4), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=rf"^state\.{first}: expected \[3\], got "):
            STATEFUL[name](gram, torch.ones(3), state._replace(**{first: bad}))


@pytest.mark.parametrize("name", METHODS)
def test_losses_of_other_shapes_are_refused(name: str) -> None:
    for bad in (torch.ones(2), torch.ones(1, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^losses: expected \[3\], got "):
            METHODS[name](matrix(), bad, None)
