"""Models that cannot run packed, or not in the form that is asked for, are left as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertModel, PreTrainedModel
from transformers.models.bert import modeling_bert
from transformers.models.mpnet import modeling_mpnet

from kernels import accelerate, restore
from kernels.integrations.class_exchange import is_exchanged
from kernels.integrations.transformers_models import FAMILIES, PackedOutput

from .transformers_cases import KINDS, base_model, batch, config_of, head_model, mask_of


def assert_refused(model: nn.Module, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(model, **options)
    assert not any(map(is_exchanged, model.modules()))


class OwnForward(BertModel):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


class OwnAttention(modeling_mpnet.MPNetSelfAttention):
    pass


def with_own_attention() -> PreTrainedModel:
    model = base_model("mpnet")
    model.encoder.layer[1].attention.attn.__class__ = OwnAttention
    return model


def with_forward_set() -> PreTrainedModel:
    model = base_model("bert")
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OwnForward(config_of("bert")), "OwnForward has a forward pass of its own"),
        (with_own_attention, "has a OwnAttention of its own code"),
        (with_forward_set, "a forward pass that was set on it"),
        (
            lambda: BertModel(config_of("bert", chunk_size_feed_forward=8)),
            "chunk_size_feed_forward = 8",
        ),
    ],
)
def test_code_of_other_kinds(make: Callable[[], nn.Module], message: str) -> None:
    assert_refused(make(), message)


def test_heads_that_share_an_encoder() -> None:
    """One reads first places, the other tokens; two alike may share it."""
    first = head_model("roberta", "RobertaForSequenceClassification")
    second = head_model("roberta", "RobertaForTokenClassification")
    second.roberta = first.roberta
    assert_refused(nn.ModuleList([first, second]), "share an encoder, but need different forms")
    alike = head_model("roberta", "RobertaForSequenceClassification")
    alike.roberta = first.roberta
    accelerate(nn.ModuleList([first, alike]))
    assert first.roberta.packed_output is PackedOutput.NEVER


def test_packed_outputs_stay_so() -> None:
    encoder = base_model("bert")
    accelerate(encoder, packed=True)
    accelerate(nn.ModuleDict({"encoder": encoder, "norm": nn.LayerNorm(4)}))
    assert encoder(**batch(encoder, "right")).last_hidden_state.shape[0] == 1
    head = head_model("bert", "BertForSequenceClassification")
    head.bert = encoder
    with pytest.raises(ValueError, match=r"was accelerated with packed=True; restore it first"):
        accelerate(head)


class OwnOutput(modeling_bert.BertOutput):
    """A layer of somebody's own, by transformers' name."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states, input_tensor)


OwnOutput.__name__ = "BertOutput"


def test_layers_of_own_code_are_called() -> None:
    model = base_model("bert")
    model.encoder.layer[0].output.__class__ = OwnOutput
    model.encoder.layer[1].output.dense.forward = lambda x: x[..., :32] * 3
    expected = model(**batch(model, "right")).last_hidden_state
    accelerate(model)
    found = model(**batch(model, "right")).last_hidden_state
    where = mask_of("right").bool()
    torch.testing.assert_close(found[where], expected[where], rtol=1e-5, atol=1e-5)
    restore(model)
    assert type(model.encoder.layer[0].output) is OwnOutput


def test_wrapped_layers_of_spans() -> None:
    """As PEFT wraps the layers of a head that it trains."""
    model = head_model("bert", "BertForQuestionAnswering")
    assert isinstance(model, BertForQuestionAnswering)
    model.qa_outputs = nn.Sequential(model.qa_outputs)
    accelerate(model)
    logits = model(**batch(model, "left")).start_logits
    assert (logits[mask_of("left") == 0] == torch.finfo(torch.float32).min).all()


def test_probabilities_by_the_config() -> None:
    """Heads of models with an attention of their own give None as the argument."""
    model = head_model("mpnet", "MPNetForTokenClassification")
    model.config.output_attentions = True
    accelerate(model)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch(model, "right"))


def test_classes_given_since() -> None:
    model = base_model("bert")
    accelerate(model)
    kind = type(model)
    model.__class__ = type("Sharded", (kind,), {})
    with pytest.raises(ValueError, match="got another class since it was accelerated"):
        restore(model)
    model.__class__ = kind
    restore(model)


# ---- what is set since --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not FAMILIES[kind].own_attention])
def test_another_attention_since(kind: str) -> None:
    """NomicBERT's layers would take it, and let sentences see each other."""
    model = base_model(kind)
    accelerate(model)
    for implementation in ("sdpa", "eager"):
        model.config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"names the attention '{implementation}' since"):
            model(**batch(model, "right"))
    accelerate(model)
    model(**batch(model, "right"))


def test_a_last_layer_taken_out_since() -> None:
    """NomicBERT's pads."""
    model = base_model("nomic_bert")
    accelerate(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="its last layer is another since"):
        model(**batch(model, "right"))


def test_noise_by_the_length_of_padded_rows() -> None:
    model = base_model("bert")
    accelerate(model)
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    model(**batch(model, "right"))
    with pytest.raises(ValueError, match="neftune_noise_alpha: the noise depends"):
        model.train()(**batch(model, "right"))


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it deprecates and what is constant
def test_traces_of_a_mask() -> None:
    model = base_model("bert", return_dict=False)
    accelerate(model)
    ids = torch.full((3, 11), 7)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace would keep"):
        torch.jit.trace(model, (ids, torch.ones(3, 11)), check_trace=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_k": torch.tensor([0, 4, 8])}, "cu_seq_lens_k: expected cu_seq_lens_q"),
        ({"seq_idx": torch.zeros(1, 8)}, "seq_idx: expected cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 4, 8])}, "got torch.float32"),
        ({"cu_seq_lens_q": torch.tensor([[0, 4, 8]])}, r"got torch.int64 \[1, 3\]"),
        ({"cu_seq_lens_q": torch.tensor([0])}, r"got torch.int64 \[1\]"),
        ({"cu_seq_lens_q": [0, 4, 8]}, "got list"),
    ],
)
def test_boundaries_of_other_kinds(arguments: dict[str, Any], message: str) -> None:
    model = base_model("bert")
    accelerate(model)
    with pytest.raises(ValueError, match=message):
        model(torch.full((1, 8), 7), **arguments)
