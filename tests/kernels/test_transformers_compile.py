"""An accelerated model under torch.compile: batches of several sizes, in one graph or in two."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
)

from kernels import accelerate
from kernels.integrations import transformers_layers

from ..compilations import Compilations

# Compilers warn of what torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_prims_common:FutureWarning"),
]

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Other lengths, other numbers of sequences, and both the same.
BATCHES = [(6, 20), (6, 13), (3, 13), (5, 5)]


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    torch._dynamo.reset()


def accelerated(causal: bool = False) -> nn.Module:
    config = BertConfig(**SIZES, is_decoder=causal)
    model = BertLMHeadModel(config) if causal else BertModel(config, add_pooling_layer=False)
    accelerate(model)
    return model


def padded(sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Padding on the left and on the right, in some batches at a row's first place."""
    lengths = torch.randint(1, length + 1, (sequences, 1))
    mask = (torch.arange(length) < lengths).long()
    if seed % 2:
        mask[0] = mask[0].flip(0)
    return {"input_ids": torch.randint(5, 60, (sequences, length)), "attention_mask": mask}


def full(sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 60, (sequences, length))}


def packed(sequences: int, length: int, seed: int = 0) -> dict[str, Any]:
    lengths = torch.randint(2, length + 1, (sequences,))
    return {
        "input_ids": torch.randint(5, 60, (1, int(lengths.sum()))),
        "cu_seq_lens_q": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_length_q": int(lengths.max()),
    }


def restarting(sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    lengths = torch.randint(2, length + 1, (sequences,)).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": torch.randint(5, 60, (1, sum(lengths))), "position_ids": positions}


def outputs_and_gradients(
    run: nn.Module, model: nn.Module, arguments: dict[str, Any]
) -> list[Tensor]:
    """With gradients where the model trains."""
    model.zero_grad()
    with torch.set_grad_enabled(model.training):
        out = run(**arguments)[0]
    if not model.training:
        return [out]
    out.float().square().mul(torch.linspace(0, 1, out.shape[-1])).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compare(
    model: nn.Module,
    compiled: nn.Module,
    make: Any,
    batches: Sequence[tuple[int, int]] = BATCHES,
    tolerance: float = 1e-5,
) -> None:
    """The compiled model gives what the plain one does, errors relative to a tensor's largest."""
    for seed, (sequences, length) in enumerate(batches):
        arguments = make(sequences, length, seed)
        pair = [outputs_and_gradients(run, model, arguments) for run in (compiled, model)]
        for found, expected in zip(*pair, strict=True):
            atol = tolerance * (1 + expected.abs().max().item())
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


def test_one_graph_for_few_elements_and_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels are taken without a compiler depends on the number of tokens."""
    monkeypatch.setattr(transformers_layers, "MIN_FUSED_ELEMENTS", 2**15)
    model = accelerated().eval()
    compilations = Compilations()
    compiled = torch.compile(model, dynamic=True, backend=compilations, fullgraph=True)
    compare(model, compiled, packed, BATCHES)
    before = len(compilations)
    compare(model, compiled, packed, [(200, 20), (2, 30)])
    assert len(compilations) == before


@pytest.mark.parametrize(
    ("make", "causal", "training", "dynamic"),
    [
        (packed, False, True, True),
        (packed, True, False, None),
        (full, False, False, None),
    ],
)
def test_in_one_graph(make: Any, causal: bool, training: bool, dynamic: bool | None) -> None:
    """Without padding, and with packed inputs, as `PackingCollator` makes them."""
    model = accelerated(causal).train(training)
    compilations = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compilations)
    compare(model, compiled, make)
    # Of the first batch, then of another length, then of another number of sequences.
    assert len(compilations) <= (2 if dynamic else 3)
    before = len(compilations)
    compare(model, compiled, make, [(7, 9), (4, 11), (2, 30)])
    assert len(compilations) == before


@pytest.mark.parametrize(
    ("make", "training", "dynamic"),
    [(padded, True, None), (restarting, False, True)],
)
def test_in_pieces(make: Any, training: bool, dynamic: bool | None) -> None:
    """How many tokens a mask has is known on the host alone, where the graph breaks."""
    model = accelerated().train(training)
    compilations = Compilations()
    compiled = torch.compile(model, dynamic=dynamic, backend=compilations)
    # Of batches without, and with, padding at a row's first place: what is before and behind the
    # break, of the first batch and then of any shape.
    compare(model, compiled, make, [*BATCHES, (4, 17), (8, 6)])
    before = len(compilations)
    assert before <= 2 * (2 if dynamic else 4)
    # Batches of other shapes and with other numbers of tokens compile nothing.
    compare(model, compiled, make, [(7, 9), (4, 11), (2, 30), (7, 9), (3, 24)])
    assert len(compilations) == before


def test_training_a_head_behind_a_mask() -> None:
    """torch.compile reads `.grad` of what the graph is cut at, and hides torch's warning of it."""
    model = BertForSequenceClassification(BertConfig(**SIZES)).train()
    accelerate(model)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        compare(model, compiled, padded, BATCHES[:2])
    assert not [one for one in told if ".grad attribute" in str(one.message)]


class Means(nn.Module):
    """Reads the boundaries of packed outputs, as they are or of outputs made anew, in a graph."""

    def __init__(self, model: nn.Module, anew: bool) -> None:
        super().__init__()
        self.model, self.anew = model, anew

    def forward(self, **arguments: Any) -> tuple[Tensor, Any]:
        outputs = self.model(**arguments)
        if self.anew:
            outputs = _pytree.tree_map(lambda x: x * 2 if x.is_floating_point() else x, outputs)
        lengths = outputs["cu_seqlens"].diff().long()
        means = torch.segment_reduce(outputs[0][0], "mean", lengths=lengths, axis=0)
        return means if self.anew else means * outputs.max_seqlen, outputs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("anew", [False, True])
def test_boundaries_of_packed_outputs(anew: bool, backend: str) -> None:
    model = Means(accelerated().eval(), anew)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for sequences, length in BATCHES:
        arguments = packed(sequences, length)
        (found, outputs), (expected, plain) = (run(**arguments) for run in (compiled, model))
        torch.testing.assert_close(found, expected)
        assert type(outputs) is type(plain)
        assert list(outputs) == list(plain)
        assert torch.equal(outputs.cu_seqlens, arguments["cu_seq_lens_q"])
        assert outputs.max_seqlen == plain.max_seqlen == arguments["max_length_q"]
        assert len(_pytree.tree_leaves(outputs)) == 2


def test_in_bfloat16() -> None:
    model = accelerated().train().to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compare(model, compiled, packed, BATCHES[:2], tolerance=0.0)


def test_under_inductor() -> None:
    model = accelerated().eval()
    compare(model, torch.compile(model, dynamic=True), packed, BATCHES[:3])


def test_under_inductor_in_pieces() -> None:
    """A graph that is broken by hooks of a user's, too."""

    def break_graph(*_: object) -> None:
        torch._dynamo.graph_break()

    model = accelerated().eval()
    model.embeddings.register_forward_hook(break_graph)
    model.encoder.layer[0].attention.self.register_forward_pre_hook(break_graph)
    compare(model, torch.compile(model, dynamic=True), padded, BATCHES[:2])


def test_with_hooks() -> None:
    """What listens to a linear layer is called in the compiled model."""
    model = accelerated().eval()
    counted: list[int] = []
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: counted.append(1))
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    compare(model, compiled, packed, BATCHES[:2])
    assert len(counted) == 2 * 2


@pytest.mark.parametrize("compiles", [False, True])
def test_a_mask_of_another_length_is_an_error(compiles: bool) -> None:
    model = accelerated().eval()
    run = torch.compile(model, backend="eager") if compiles else model
    for length in (9, 11, 7):
        mask = torch.ones(2, length)
        with torch.no_grad(), pytest.raises(ValueError, match=r"expected \[2, 10\], got"):
            run(torch.full((2, 10), 7), attention_mask=mask)
