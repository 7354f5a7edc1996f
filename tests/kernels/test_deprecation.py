"""Old public names work and warn with the new one; under torch.compile they break no graph."""

import warnings
from collections.abc import Callable
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
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="rng_offset: expected"):
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
