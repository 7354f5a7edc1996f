"""An accelerated model under torch.compile: batches of several sizes, in one graph or in pieces."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import BertConfig, BertLMHeadModel, BertModel

from kernels import accelerate

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


def accelerated(causal: bool) -> nn.Module:
    config = BertConfig(**SIZES, is_decoder=causal, use_cache=False)
    model = BertLMHeadModel(config) if causal else BertModel(config, add_pooling_layer=False)
    accelerate(model)
    return model


def mask_of(sequences: int, length: int) -> Tensor:
    """Padding on the left and on the right."""
    mask = torch.ones(sequences, length, dtype=torch.int64)
    mask[0, :2] = 0
    mask[sequences // 2, length // 2 :] = 0
    return mask


def outputs_and_gradients(run: nn.Module, model: nn.Module, ids: Tensor, mask: Tensor | None):
    """With gradients where the model trains."""
    model.zero_grad()
    with torch.set_grad_enabled(model.training):
        out = run(ids, attention_mask=mask)[0]
    if not model.training:
        return [out]
    out.float().square().mul(torch.linspace(0, 1, out.shape[-1])).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compare(
    model: nn.Module,
    compiled: nn.Module,
    masked: bool,
    batches: Sequence[tuple[int, int]] = BATCHES,
    tolerance: float = 1e-5,
) -> None:
    """The compiled model gives what the plain one does, errors relative to a tensor's largest."""
    for sequences, length in batches:
        ids = torch.randint(5, 60, (sequences, length))
        mask = mask_of(sequences, length) if masked else None
        pair = [outputs_and_gradients(run, model, ids, mask) for run in (compiled, model)]
        for found, expected in zip(*pair, strict=True):
            atol = tolerance * (1 + expected.abs().max().item())
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("causal", "masked", "training", "dynamic"),
    [
        (False, True, True, None),
        (False, False, True, True),
        (True, True, True, True),
        (True, False, False, None),
    ],
)
def test_in_one_graph(causal: bool, masked: bool, training: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = accelerated(causal).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compare(model, compiled, masked)
    # Of the first batch, then of another length, then of another number of sequences.
    assert counters["stats"]["unique_graphs"] <= (1 if dynamic else 3)


def test_in_bfloat16() -> None:
    torch._dynamo.reset()
    model = accelerated(causal=False).train().to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compare(model, compiled, True, BATCHES[:3], tolerance=0.0)


def test_under_inductor() -> None:
    torch._dynamo.reset()
    model = accelerated(causal=False).eval()
    compare(model, torch.compile(model), True, BATCHES[:3])


def test_under_inductor_in_pieces() -> None:
    """A graph that is broken before and within the making of the mask, by hooks of a user's."""

    def break_graph(*_: object) -> None:
        torch._dynamo.graph_break()

    torch._dynamo.reset()
    model = accelerated(causal=False).eval()
    model.embeddings.register_forward_hook(break_graph)
    model.encoder.layer[0].attention.self.register_forward_pre_hook(break_graph)
    compare(model, torch.compile(model), True, BATCHES[:2])


def test_padding_between_tokens_in_a_compiled_decoder_is_an_error() -> None:
    torch._dynamo.reset()
    model = accelerated(causal=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    for run, error in ((model, ValueError), (compiled, RuntimeError)):
        with torch.no_grad(), pytest.raises(error, match="padding between tokens"):
            run(torch.full((1, 5), 7), attention_mask=mask)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_mask_of_another_length_is_an_error(compiles: bool) -> None:
    torch._dynamo.reset()
    model = accelerated(causal=False).eval()
    run = torch.compile(model, backend="eager") if compiles else model
    for length in (9, 11, 7):
        with torch.no_grad(), pytest.raises(ValueError, match="keys of other lengths"):
            run(torch.full((2, 10), 7), attention_mask=mask_of(2, length))
