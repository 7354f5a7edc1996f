"""Every model class of the family gives the same outputs on these kernels, at padding as well."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, BertConfig, BertForQuestionAnswering, PreTrainedModel

from kernels import accelerate
from kernels.integrations import transformers_patch

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # what is seen at padding then changes the outputs by far
}
# What members of the family ask for besides.
OPTIONS = {
    "albert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "splinter": {"question_token_id": 50},
    "xmod": {"default_language": "en_XX"},
}
LENGTH = 11
MASKS = {
    "right": [[1] * 4 + [0] * 7, [1] * 11, [1] * 9 + [0] * 2],
    "left": [[0] * 7 + [1] * 4, [1] * 11, [0] * 2 + [1] * 9],
    "both": [[0] * 3 + [1] * 4 + [0] * 4, [1] * 11, [0] + [1] * 9 + [0]],
    "none": None,
    "empty": [[1] * 4 + [0] * 7, [0] * 11, [0] * 2 + [1] * 9],
}
BETWEEN = torch.tensor([[1, 0] * 5 + [1], [1] * 11, [0] * 2 + [1] * 4 + [0] * 2 + [1] * 3])


def _classes() -> Iterator[tuple[str, str]]:
    """Every model class of transformers with one of the family's configs: its type and name."""
    for kind in sorted(transformers_patch.FAMILY):
        module = _module(kind)
        for name, found in vars(module).items():
            is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
            if is_model and found.__module__ == module.__name__ and "forward" in vars(found):
                yield kind, name


def _module(kind: str) -> Any:
    config = type(AutoConfig.for_model(kind)).__module__
    return importlib.import_module(config.replace(".configuration_", ".modeling_"))


def _is_decoder(name: str) -> bool:
    return name.endswith(("ForCausalLM", "LMHeadModel", "GenerationDecoder"))


def _model(kind: str, name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **OPTIONS.get(kind, {}))
    config.is_decoder = _is_decoder(name)
    return getattr(_module(kind), name)(config).eval()


def _outputs(model: PreTrainedModel, mask: Tensor | None) -> dict[str, Tensor]:
    """All that a forward pass returns: logits, hidden states, what is pooled."""
    ids = torch.randint(4, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    if "Splinter" in type(model).__name__:
        ids[:, 2] = model.config.question_token_id  # spans are selected for these tokens
    if "MultipleChoice" in type(model).__name__:
        ids = torch.stack([ids, ids.roll(1, 0)], 1)
        mask = None if mask is None else torch.stack([mask, mask], 1)
    cache = {"use_cache": False} if model.config.is_decoder else {}
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **cache)
    flat: dict[str, Tensor] = {}
    for name, value in outputs.items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else [value]):
            flat[f"{name}.{i}"] = tensor
    return flat


@pytest.mark.parametrize(("kind", "name"), list(_classes()))
def test_outputs_of_every_class(kind: str, name: str) -> None:
    model = _model(kind, name)
    masks = {name: None if rows is None else torch.tensor(rows) for name, rows in MASKS.items()}
    if not _is_decoder(name):
        masks["between"] = BETWEEN
    if model.config._attn_implementation == "eager":
        del masks["empty"]  # where eager attention averages what it masks, torch's gives zeros
    expected = {name: _outputs(model, mask) for name, mask in masks.items()}
    accelerate(model)
    for case, mask in masks.items():
        found = _outputs(model, mask)
        assert found.keys() == expected[case].keys()
        assert any(key.startswith("hidden_states") for key in found)
        for key, value in expected[case].items():
            # Two layers of fp32 sums over at most 48 numbers: 1e-5 is a hundred roundings.
            scale = value.abs().max().item()
            torch.testing.assert_close(
                found[key],
                value,
                rtol=1e-5,
                atol=1e-5 * (1 + scale),
                msg=lambda m, case=case: f"{case}: {m}",
            )


def test_the_family_has_heads() -> None:
    names = [name for _, name in _classes()]
    assert len(names) >= 100
    for head in ("QuestionAnswering", "MultipleChoice", "TokenClassification", "MaskedLM"):
        assert sum(name.endswith(head) for name in names) >= 10


def test_predicted_spans_under_right_padding() -> None:
    """The softmax over start positions runs over those of padding, too."""
    torch.manual_seed(3)
    model = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    ids = torch.randint(4, 50, (64, 24))
    mask = (torch.arange(24) < torch.randint(4, 25, (64, 1))).long()

    def spans() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = model(ids, attention_mask=mask)
        return outputs.start_logits.argmax(1), outputs.end_logits.argmax(1)

    expected = spans()
    assert (expected[0] >= mask.sum(1)).any()  # some start at padding
    accelerate(model)
    found = spans()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_padding_between_the_tokens_of_a_decoder_is_refused() -> None:
    model = _model("bert", "BertLMHeadModel")
    accelerate(model)
    with pytest.raises(ValueError, match="attention_mask: padding between tokens"):
        _outputs(model, BETWEEN)
    with pytest.raises(ValueError, match="keys of other lengths"):
        _outputs(model, torch.ones_like(BETWEEN)[:, :9])
