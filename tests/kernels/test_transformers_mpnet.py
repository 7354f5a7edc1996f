"""MPNet on packed tokens: the biases of distances, which its encoder makes for all layers."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import MPNetConfig

from kernels import accelerate, restore
from kernels.integrations import transformers_mpnet

from .tolerance import assert_within_twice
from .transformers_cases import (
    LENGTH,
    MASKS,
    ROWS,
    SIZES,
    assert_accelerated_runs_are_the_same,
    assert_close,
    assert_same_gradients,
    base_model,
    batch,
    input_ids,
    mask_of,
    places,
    run,
)

LONG = 37
"""Distances beyond 8, which share a bias with others, and padding of many rows."""


@pytest.mark.parametrize("length", [LONG, 1])
def test_rows_of_other_lengths(length: int) -> None:
    model = base_model("mpnet", max_position_embeddings=LONG + 2)
    assert_accelerated_runs_are_the_same(model, length=length)


def test_the_biases_have_a_gradient() -> None:
    model = base_model("mpnet")
    accelerate(model)
    _, gradients = run(model, batch(model, "right"), places(model, "right"))
    assert gradients["encoder.relative_attention_bias.weight"].abs().max() > 0


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_gradients(dtype: torch.dtype, case: str) -> None:
    """Of padded tensors the biases then have the padding in them, but in float16."""
    model = base_model("mpnet").to(dtype)
    arguments = batch(model, case)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**arguments).last_hidden_state
        torchs = model(**arguments).last_hidden_state
        accelerate(model)
        found = model(**arguments).last_hidden_state
    where = places(model, case).computed
    assert_within_twice(found[where], torchs[where], exact[where])


@pytest.mark.parametrize("case", ["none", "empty row"])
def test_a_layer_that_is_run_again_for_its_gradients(case: str) -> None:
    """Its first run, without gradients, has biases with a gradient, and padding apart."""
    model = base_model("mpnet")
    accelerate(model)
    _, expected = run(model, batch(model, case), places(model, case))
    for layer in model.encoder.layer:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=True)
    _, found = run(model, batch(model, case), places(model, case))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("case", "on_the_stream"),
    [("none", True), ("right", True), ("left", False), ("both", False), ("empty row", False)],
)
def test_where_attention_runs(
    case: str, on_the_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stream wherever its places are those of the rows, and all of its rows are tokens."""
    taken = set()
    for name in ("relative_attention", "biased_attention"):
        function = getattr(transformers_mpnet, name)

        def run_and_tell(*given: Any, name: str = name, function: Any = function) -> Any:
            taken.add(name)
            return function(*given)

        monkeypatch.setattr(transformers_mpnet, name, run_and_tell)
    model = base_model("mpnet")
    accelerate(model)
    run(model, batch(model, case), places(model, case))
    assert taken == {"relative_attention" if on_the_stream else "biased_attention"}


def test_a_table_of_biases_that_is_watched_is_called() -> None:
    model = base_model("mpnet")
    plain = model(**batch(model, "right")).last_hidden_state
    model.encoder.relative_attention_bias.register_forward_hook(lambda _m, _a, output: -2 * output)
    expected = model(**batch(model, "right")).last_hidden_state
    accelerate(model)
    where = mask_of("right").bool()
    assert_close(model(**batch(model, "right")).last_hidden_state[where], expected[where])
    assert not torch.allclose(plain[where], expected[where])


def test_padding_tokens_without_a_mask() -> None:
    """They have a position of their own, and are seen."""
    model = base_model("mpnet")
    ids = input_ids(model, "none")
    ids[0, 4:] = 1
    expected = model(ids).last_hidden_state
    accelerate(model)
    assert_close(model(ids).last_hidden_state, expected)


def test_parts_of_an_accelerated_model_are_not_called_alone() -> None:
    model = base_model("mpnet")
    accelerate(model)
    hidden = torch.zeros(ROWS, LENGTH, SIZES["hidden_size"])
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder(hidden)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder.layer[0](hidden)


def test_the_config_stays() -> None:
    """Since transformers' registry plays no part, others may share it."""
    config = MPNetConfig(**SIZES)
    one, other = transformers.MPNetModel(config), transformers.MPNetModel(config)
    accelerate(one)
    assert one.config is other.config
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(one)
    restore(one)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(one)
