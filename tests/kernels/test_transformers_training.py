"""A transformers BERT on these kernels: the same numbers, and all of it can be undone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask

from kernels import accelerate, restore
from kernels.integrations import transformers_patch

from .tolerance import assert_within_twice

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
# What members of the family ask for besides.
OPTIONS = {"distilbert": {"hidden_dim": 64}, "xmod": {"default_language": "en_XX"}}
IDS = torch.randint(4, 50, (3, 11), generator=torch.Generator().manual_seed(0))
# Padding on the right, none, and on the left.
MASK = torch.tensor([[1] * 4 + [0] * 7, [1] * 11, [0] * 5 + [1] * 6])


def encoder(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES, **OPTIONS.get(kind, {}))
    return AutoModel.from_config(config).eval()


def hidden_and_gradients(
    model: nn.Module, mask: Tensor | None = MASK
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, those at padding too, and the gradients of a loss made from them."""
    model.zero_grad()
    hidden = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    hidden.square().mul(torch.linspace(0, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach(), gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * (1 + scale))


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "full"])
@pytest.mark.parametrize("kind", sorted(transformers_patch.FAMILY))
def test_same_hidden_states_and_gradients(
    kind: str, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder(kind)
    norms = [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]
    hidden, gradients = hidden_and_gradients(model, mask)
    report = accelerate(model)
    assert report.attention == ("",)
    assert sorted(report.layer_norms) == sorted(norms)
    calls = []
    attention = transformers_patch.flash_attn_varlen_func
    monkeypatch.setattr(
        transformers_patch,
        "flash_attn_varlen_func",
        lambda *arguments: calls.append(1) or attention(*arguments),
    )
    found, found_gradients = hidden_and_gradients(model, mask)
    assert len(calls) == SIZES["num_hidden_layers"]
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found_gradients, gradients)
    restore(model)
    assert torch.equal(hidden_and_gradients(model, mask)[0], hidden)
    assert not any("Fused" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("causal", [False, True])
def test_same_loss_and_gradients_of_a_head(causal: bool) -> None:
    mask = MASK
    if causal:
        model: nn.Module = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval()
        labels = IDS.where(MASK.bool(), -100)
    else:
        model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
        labels = torch.tensor([0, 1, 1])
        mask = MASK.sort(descending=True).values  # the first place, which it looks at, is a token

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(input_ids=IDS, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach(), gradients_of(model)

    loss, gradients = loss_and_gradients()
    accelerate(model)
    found, found_gradients = loss_and_gradients()
    torch.testing.assert_close(found, loss)
    assert_same_gradients(found_gradients, gradients)


def hidden_and_gradients_in_bf16(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        return hidden_and_gradients(model)


@pytest.mark.parametrize(
    "kind", sorted(transformers_patch.FAMILY - {"xmod"})
)  # whose adapters fail without us
def test_under_autocast(kind: str) -> None:
    """Nomic's queries and keys are float32 there, from its rotation, and its values bfloat16."""
    model = encoder(kind)
    exact, exact_gradients = hidden_and_gradients(model.double())

    model.float()
    hidden, gradients = hidden_and_gradients_in_bf16(model)
    accelerate(model)
    found, found_gradients = hidden_and_gradients_in_bf16(model)
    assert found.dtype == hidden.dtype
    assert_within_twice(found, hidden, exact)
    largest = max(gradient.norm() for gradient in exact_gradients.values())
    for name, gradient in exact_gradients.items():
        allowed = 2 * (gradients[name].double() - gradient).norm()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * largest
        assert (found_gradients[name].double() - gradient).norm() <= max(allowed, rounding), name


def test_under_autocast_and_with_checkpointed_layers() -> None:
    model = BertModel(BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    exact, exact_gradients = hidden_and_gradients(model.double())

    model.float()
    hidden, gradients = hidden_and_gradients_in_bf16(model)
    accelerate(model)
    # Of two names, transformers 5.17 has the second and later versions warn of it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))()
    found, found_gradients = hidden_and_gradients_in_bf16(model)
    assert_within_twice(found, hidden, exact)
    for name, gradient in exact_gradients.items():
        assert_within_twice(found_gradients[name], gradients[name], gradient)


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0))
    accelerate(model)
    train = [hidden_and_gradients(model.train())[0] for _ in range(2)]
    assert not torch.equal(*train)
    evaluation = [hidden_and_gradients(model.eval())[0] for _ in range(2)]
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


def test_parameters_that_were_exchanged_stay() -> None:
    model, other = encoder("bert"), encoder("bert")
    accelerate(model)
    model.load_state_dict(other.state_dict(), assign=True)
    restore(model)
    assert torch.equal(hidden_and_gradients(model)[0], hidden_and_gradients(other)[0])


def test_what_is_not_supported_is_refused() -> None:
    decoder = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval()
    accelerate(decoder)
    with pytest.raises(ValueError, match="other masks are not supported"):
        decoder(input_ids=IDS, attention_mask=torch.zeros(3, 1, 11, 11))
    with pytest.raises(ValueError, match="output_attentions"):
        decoder(input_ids=IDS, output_attentions=True)
    cache = decoder(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="keys of other lengths"):
        decoder(input_ids=IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="masks other than padding and causality"):
        create_causal_mask(
            *(decoder.config, torch.zeros(3, 11, 32), None, None),
            or_mask_function=lambda batch, head, query, key: key == 0,
        )
    with pytest.raises(ValueError, match="cross attention"):
        accelerate(BertModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)))


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
