"""DeBERTa on packed tokens: the same numbers, for every kind of relative position."""

from typing import Any

import pytest
import torch

from kernels import accelerate

from . import family_cases as cases

OPTIONS: dict[str, dict[str, Any]] = {
    # Version 3's, with fewer buckets than there are distances.
    "v3": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "own keys": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 6,
        "type_vocab_size": 2,
    },
    "absolute": {"relative_attention": False, "pos_att_type": [], "embedding_size": 16},
    "convolution": {
        "relative_attention": True,
        "pos_att_type": ["c2p"],
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _model(kind: str = "v3", **options: Any) -> Any:
    return cases.model_of("deberta-v2", **{**OPTIONS[kind], **options})


@pytest.mark.parametrize("mask", list(cases.MASKS))
@pytest.mark.parametrize("kind", list(OPTIONS))
def test_same_hidden_states_and_gradients(kind: str, mask: str) -> None:
    cases.assert_same(_model(kind), cases.inputs_of(mask))


def test_a_batch_of_single_tokens() -> None:
    cases.assert_same(_model(), cases.inputs_of("none", 1))


def test_positions_types_and_embedded_inputs() -> None:
    model = _model("own keys")
    inputs = cases.inputs_of("both")
    positions = torch.randint(0, 39, (3, cases.LENGTH))
    types = torch.randint(0, 2, (3, cases.LENGTH))
    cases.assert_same(model, {**inputs, "position_ids": positions, "token_type_ids": types})
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    cases.assert_same(model, {**inputs, "inputs_embeds": embedded})


@pytest.mark.parametrize("kind", ["v3", "convolution"])
def test_packed_outputs(kind: str) -> None:
    cases.assert_same_packed_outputs(_model(kind))


@pytest.mark.parametrize("mask", ["both", "empty"])
def test_hidden_states_of_all_layers(mask: str) -> None:
    cases.assert_same_hidden_states_of_all_layers(_model("convolution"), cases.inputs_of(mask))


def test_under_autocast() -> None:
    cases.assert_same_under_autocast(_model(), cases.inputs_of("right"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant: bool) -> None:
    """Their norm of relative positions is no leaf, whose gradient all layers add to."""
    model = _model(**NO_DROPOUT)
    cases.assert_same_with_checkpointed_layers(model, cases.inputs_of("both"), use_reentrant)


def test_copies_stay_accelerated() -> None:
    cases.assert_copies_stay_accelerated(_model(), cases.inputs_of("left"))


@pytest.mark.parametrize("name", list(NO_DROPOUT))
def test_dropout_follows_the_mode_of_the_model(name: str) -> None:
    model = _model(**{**NO_DROPOUT, name: 0.3})
    accelerate(model)
    inputs = cases.inputs_of("right")
    with torch.no_grad():
        train = [model.train()(**inputs).last_hidden_state for _ in range(2)]
        evaluation = [model.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*evaluation)


@pytest.mark.parametrize("name", cases.heads_of("deberta-v2"))
def test_heads(name: str) -> None:
    cases.assert_same_heads(cases.head_of("deberta-v2", name, **OPTIONS["v3"]))


def test_parts_of_an_accelerated_model_are_not_called_alone() -> None:
    model = _model()
    accelerate(model)
    hidden, mask = torch.zeros(3, cases.LENGTH, 32), torch.ones(3, cases.LENGTH)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder(hidden, mask)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder.layer[0](hidden, mask)


def test_task_gradients_of_several_tasks_are_refused() -> None:
    """Those of its positions are no tokens of a task."""
    with pytest.raises((ValueError, NotImplementedError), match="encoder"):
        cases.assert_same_task_gradients(_model())
