"""Torch's attention in place of these kernels', where a CPU multiplies bfloat16 and nothing is
padded."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, BertModel, PreTrainedModel

from kernels import accelerate
from kernels.integrations import transformers_layers

from .tolerance import assert_within_twice

LENGTH = transformers_layers.MIN_PADDED_LENGTH
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.1,
}


def model_of(causal: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    if causal:
        return BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval()
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()


def arguments(length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (3, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether torch's attention got views, of each of its calls; on a CPU that multiplies bf16."""
    found: list[bool] = []
    own = nn.functional.scaled_dot_product_attention

    def noting(*tensors: Tensor, **options: Any) -> Tensor:
        found.append(all(x._is_view() for x in tensors))
        return own(*tensors, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(transformers_layers, "multiplies_bf16", lambda: True)
    return found


def outputs(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given)[0]


@pytest.mark.parametrize("causal", [False, True])
def test_as_near_as_transformers(causal: bool, calls: list[bool]) -> None:
    model, given = model_of(causal), arguments()
    exact = outputs(model.double(), given)
    theirs = outputs(model.bfloat16(), given)
    calls.clear()
    accelerate(model)
    found = outputs(model, given)
    assert_within_twice(found, theirs, exact)
    assert calls == [True, True]


def test_separate_products(calls: list[bool]) -> None:
    """Queries of a layer with a hook: three products, and attention on each of them."""
    model, given = model_of().bfloat16(), arguments()
    accelerate(model)
    expected = outputs(model, given)
    for layer in model.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda *_: None)
    found = outputs(model, given)
    assert len(calls) == 4
    # Another order of sums in a product of 32 numbers.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_under_autocast(calls: list[bool]) -> None:
    model, given = model_of(), arguments()
    accelerate(model)
    outputs(model, given)
    assert calls == []
    with torch.autocast("cpu", torch.bfloat16):
        outputs(model, given)
    assert calls == [True, True]


def _with_padding(given: dict[str, Tensor]) -> None:
    given["attention_mask"][1, -1] = 0


OTHERS: dict[str, Callable[[PreTrainedModel, dict[str, Tensor]], object]] = {
    "padding": lambda _, given: _with_padding(given),
    "short sequences": lambda _, given: given.update(arguments(LENGTH - 1)),
    "float16": lambda model, _: model.half(),
    "float32": lambda model, _: model.float(),
    "dropout": lambda model, _: model.train(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_batches_run_on_these_kernels(other: str, calls: list[bool]) -> None:
    model, given = model_of().bfloat16(), arguments()
    accelerate(model)
    OTHERS[other](model, given)
    outputs(model, given)
    assert calls == []


def test_gradients_run_on_these_kernels(calls: list[bool]) -> None:
    model, given = model_of().bfloat16(), arguments()
    accelerate(model)
    model(**given)[0].sum().backward()
    assert calls == []
    model.requires_grad_(False)
    model(**given)
    assert len(calls) == 2


@pytest.mark.parametrize("instructions", ["none", "avx512_bf16", "amx_bf16"])
def test_what_a_cpu_has(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"avx512_bf16": False, instructions: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert transformers_layers.multiplies_bf16() == (instructions != "none")


def test_no_sequences(calls: list[bool]) -> None:
    model = model_of().bfloat16()
    accelerate(model)
    given = {"input_ids": arguments()["input_ids"][:0]}
    assert outputs(model, given).shape == (0, LENGTH, 32)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*_prims_common:FutureWarning")
def test_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    model, given = model_of().bfloat16(), {"input_ids": arguments()["input_ids"]}
    accelerate(model)
    expected = outputs(model, given)
    torch._dynamo.reset()
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(outputs(compiled, given), expected)
    assert sum("scaled_dot_product_attention" in name for name in called) == 2
