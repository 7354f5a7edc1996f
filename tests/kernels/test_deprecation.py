"""Old public names work and warn with the new one; under torch.compile they break no graph."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import kernels

from .operator_calls import public_calls

RENAMED = {"implementation": "backend", "wipe_": "zero_rows_"}
WITH_DROPOUT = [
    "dropout",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]


def call_of(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    return public_calls()[name]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_the_new_function(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"kernels.{old} is kernels.{new} now") as caught:
        function = getattr(kernels, old)
    assert function is getattr(kernels, new)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", WITH_DROPOUT)
@pytest.mark.parametrize("dtype", ["", " in float64"])
def test_stream_is_the_rng_offset(name: str, dtype: str) -> None:
    function, arguments = call_of(name + dtype)
    expected = function(**arguments, rng_offset=5)
    with pytest.warns(DeprecationWarning, match="argument stream is rng_offset now") as caught:
        found = function(**arguments, stream=5)
    assert caught[0].filename == __file__
    assert torch.equal(found, expected)
    assert not torch.equal(found, function(**arguments))
    with pytest.raises(TypeError, match="stream: the old name of rng_offset"):
        function(**arguments, rng_offset=5, stream=5)
    with pytest.raises(TypeError, match="stream: the old name of rng_offset"):
        function(**arguments, rng_offset=torch.tensor([1, 2]), stream=5)
    with (
        pytest.warns(DeprecationWarning, match="stream"),
        pytest.raises(ValueError, match="rng_offset"),
    ):
        function(**arguments, stream=-1)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_an_old_argument_breaks_no_graph(name: str) -> None:
    function, arguments = call_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: function(**given, stream=5), fullgraph=True, backend="aot_eager"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the argument stream", DeprecationWarning)
        expected = function(**arguments, stream=5)
    assert torch.equal(compiled(arguments), expected)


@pytest.mark.parametrize(
    "wrap", [kernels.PCGrad, partial(kernels.BalancedOptimizer, method=kernels.balancing.mgda)]
)
def test_extent_is_the_granularity(wrap: Callable[..., kernels.BalancedOptimizer]) -> None:
    weights = []
    for name in ("extent", "granularity"):
        first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        inner = torch.optim.SGD([first, second], lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = wrap(inner, **{name: "tensor"})
        losses = [(first * second).sum(), (first - 2 * second).sum()]
        backward = getattr(optimizer, "pc_backward", optimizer.backward)
        backward(losses)
        weights.append(optimizer.weights)
        assert [str(w.message) for w in caught] == (
            ["the argument extent is granularity now"] if name == "extent" else []
        )
        assert all(w.filename == __file__ for w in caught)
        assert weights[-1].shape == (2, 2)  # a row for each tensor
    assert torch.equal(*weights)
    with pytest.raises(TypeError, match="extent: the old name of granularity"):
        wrap(inner, extent="group", granularity="tensor")
