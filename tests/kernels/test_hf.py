"""A transformers BERT on these kernels: the same numbers, and all of it can be undone."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from kernels import accelerate, restore

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
DISTILLED = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
IDS = torch.randint(4, 50, (3, 11), generator=torch.Generator().manual_seed(0))
# Padding on the right, none, and on the left.
MASK = torch.tensor([[1] * 4 + [0] * 7, [1] * 11, [0] * 5 + [1] * 6])


def losses_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    hidden = hidden[MASK.bool()]
    hidden.square().mul(torch.linspace(0, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "model",
    [
        BertModel(BertConfig(**SIZES)),
        RobertaModel(RobertaConfig(**SIZES)),
        DistilBertModel(DistilBertConfig(**{**SIZES, **DISTILLED})),
    ],
    ids=lambda model: type(model).__name__,
)
def test_same_hidden_states_and_gradients(model: nn.Module) -> None:
    model = copy.deepcopy(model).eval()
    hidden, gradients = losses_and_gradients(model)
    report = accelerate(model)
    assert report.attention == ("",)
    assert len(report.layer_norms) == 5
    found, found_gradients = losses_and_gradients(model)
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-4, atol=1e-5 * (1 + scale)
        )
    restore(model)
    assert torch.equal(losses_and_gradients(model)[0], hidden)
    assert not any("Fused" in type(module).__name__ for module in model.modules())


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0))
    accelerate(model)
    train = [losses_and_gradients(model.train())[0] for _ in range(2)]
    assert not torch.equal(*train)
    evaluation = [losses_and_gradients(model.eval())[0] for _ in range(2)]
    assert torch.equal(*evaluation)


def test_a_model_inside_another_and_without_a_mask() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BertForSequenceClassification(BertConfig(**SIZES)).eval()

    holder = Holder()
    expected = holder.inner(input_ids=IDS).logits
    report = accelerate(holder)
    assert "inner.bert.embeddings.LayerNorm" in report.layer_norms
    torch.testing.assert_close(holder.inner(input_ids=IDS).logits, expected)
    restore(holder)
    assert torch.equal(holder.inner(input_ids=IDS).logits, expected)


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to accelerate"):
        accelerate(nn.Sequential(nn.LayerNorm(4)))
    model = BertModel(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="not accelerated"):
        restore(model)
    accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)


def test_masks_of_other_shapes_are_refused() -> None:
    model = BertModel(BertConfig(**SIZES))
    accelerate(model)
    with pytest.raises(ValueError, match="other masks are not supported"):
        model(input_ids=IDS, attention_mask=torch.zeros(3, 1, 11, 11))


def test_a_sentence_transformers_model(real_encoder: Path) -> None:
    """A Transformer, a Pooling and a Normalize module, with pretrained weights."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(real_encoder), device="cpu").eval()
    sentences = ["A man is playing a guitar.", "Someone makes music", "It rains."]

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        embeddings = model(model.preprocess(sentences))["sentence_embedding"]
        loss = (embeddings @ embeddings.T).square().sum()
        loss.backward()
        named = model.named_parameters()
        return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    encoded = model.encode(sentences, convert_to_tensor=True)
    loss, gradients = loss_and_gradients()
    report = accelerate(model)
    assert len(report.attention) == 1
    assert len(report.layer_norms) == 1 + 2 * 6
    torch.testing.assert_close(model.encode(sentences, convert_to_tensor=True), encoded)
    found, found_gradients = loss_and_gradients()
    torch.testing.assert_close(found, loss)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # That of a key's bias is zero but for rounding, of which the query's tells the size.
        scale = gradients[name.replace("key.bias", "query.bias")].norm()
        assert (found_gradients[name] - gradient).norm() <= 1e-4 * scale, name
    restore(model)
    assert torch.equal(model.encode(sentences, convert_to_tensor=True), encoded)


def test_importing_the_kernels_does_not_import_transformers() -> None:
    check = "import sys, kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
