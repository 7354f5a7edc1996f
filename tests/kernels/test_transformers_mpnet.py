"""MPNet on packed tokens: the same numbers, biases of distances and heads included."""

from typing import Any

import pytest
import torch
import transformers
from transformers import MPNetConfig

from kernels import accelerate, restore

from . import family_cases as cases

LONG = 37
"""Distances beyond 8, which share a bias with others, and padding of many rows."""


def _model(**options: Any) -> Any:
    return cases.model_of("mpnet", **options)


@pytest.mark.parametrize("length", [cases.LENGTH, LONG, 1])
@pytest.mark.parametrize("mask", list(cases.MASKS))
def test_same_hidden_states_and_gradients(mask: str, length: int) -> None:
    cases.assert_same(_model(), cases.inputs_of(mask, length))


def test_the_biases_have_a_gradient() -> None:
    model = _model()
    accelerate(model)
    _, gradients = cases.hidden_and_gradients(model, cases.inputs_of("right"))
    assert gradients["encoder.relative_attention_bias.weight"].abs().max() > 0


def test_a_table_of_biases_that_is_watched_is_called() -> None:
    model = _model()
    inputs = cases.inputs_of("right")
    model.encoder.relative_attention_bias.register_forward_hook(lambda _m, _a, output: -2 * output)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        accelerate(model)
        cases.assert_same_hidden(model(**inputs).last_hidden_state, expected, inputs)


def test_positions_and_embedded_inputs() -> None:
    model = _model()
    inputs = cases.inputs_of("both")
    positions = torch.randint(2, 39, (3, cases.LENGTH))
    cases.assert_same(model, {**inputs, "position_ids": positions})
    ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(ids).detach()
    cases.assert_same(model, {**inputs, "inputs_embeds": embedded})


def test_padding_tokens_without_a_mask() -> None:
    """They have a position of their own, and are seen."""
    ids = cases.inputs_of("none")["input_ids"]
    ids[0, 4:] = 1
    cases.assert_same(_model(), {"input_ids": ids})


def test_packed_outputs() -> None:
    cases.assert_same_packed_outputs(_model())


@pytest.mark.parametrize("mask", ["both", "empty"])
def test_hidden_states_of_all_layers(mask: str) -> None:
    cases.assert_same_hidden_states_of_all_layers(_model(), cases.inputs_of(mask))


def test_under_autocast() -> None:
    cases.assert_same_under_autocast(_model(), cases.inputs_of("right"))


def test_copies_stay_accelerated() -> None:
    cases.assert_copies_stay_accelerated(_model(), cases.inputs_of("left"))


def test_dropout_follows_the_mode_of_the_model() -> None:
    """That of probabilities is the only one here."""
    model = _model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3)
    accelerate(model)
    inputs = cases.inputs_of("right")
    with torch.no_grad():
        train = [model.train()(**inputs).last_hidden_state for _ in range(2)]
        evaluation = [model.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*evaluation)


@pytest.mark.parametrize("name", cases.heads_of("mpnet"))
def test_heads(name: str) -> None:
    model = cases.head_of("mpnet", name)
    cases.assert_same_heads(model)


def test_parts_of_an_accelerated_model_are_not_called_alone() -> None:
    model = _model()
    accelerate(model)
    hidden = torch.zeros(3, cases.LENGTH, 32)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder(hidden)
    with pytest.raises(ValueError, match="call the model itself"):
        model.encoder.layer[0](hidden)


def test_the_config_stays() -> None:
    """Since transformers' registry plays no part, others may share it."""
    config = MPNetConfig(**cases.SIZES)
    one, other = transformers.MPNetModel(config), transformers.MPNetModel(config)
    accelerate(one)
    assert one.config is other.config
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(one)
    restore(one)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(one)


def test_task_gradients_of_several_tasks_are_refused() -> None:
    """Those of its positions are no tokens of a task."""
    with pytest.raises((ValueError, NotImplementedError), match="encoder"):
        cases.assert_same_task_gradients(_model())
