"""ModernBERT on packed tokens: the same numbers, in layers with a window and without."""

from typing import Any

import pytest
import torch

from kernels import accelerate
from kernels.integrations import transformers_layers

from . import family_cases as cases

# A global layer and two local ones, whose window reaches 4 places to each side.
OPTIONS: dict[str, Any] = {
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout")


def _model(**options: Any) -> Any:
    return cases.model_of("modernbert", **{**OPTIONS, **options})


# Five places see each other through the window, six do not.
@pytest.mark.parametrize("length", [cases.LENGTH, 5, 6])
@pytest.mark.parametrize("mask", list(cases.MASKS))
def test_same_hidden_states_and_gradients(mask: str, length: int) -> None:
    cases.assert_same(_model(), cases.inputs_of(mask, length))


@pytest.mark.parametrize("mask", ["both", "empty"])
def test_with_biases(mask: str) -> None:
    cases.assert_same(_model(**BIASES), cases.inputs_of(mask))


def test_a_window_wider_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no window: ten places to each side of eleven."""
    monkeypatch.delattr(transformers_layers, "windowed_attention")
    cases.assert_same(_model(local_attention=20), cases.inputs_of("both"))
    with pytest.raises(NameError):
        cases.assert_same(_model(local_attention=18), cases.inputs_of("both"))


def test_positions_and_embedded_inputs() -> None:
    model = _model()
    inputs = cases.inputs_of("both")
    positions = torch.randint(0, 39, (3, cases.LENGTH))
    cases.assert_same(model, {**inputs, "position_ids": positions})
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    cases.assert_same(model, {**inputs, "inputs_embeds": embedded})


def test_packed_outputs() -> None:
    cases.assert_same_packed_outputs(_model())


@pytest.mark.parametrize("mask", ["both", "empty"])
def test_hidden_states_of_all_layers(mask: str) -> None:
    cases.assert_same_hidden_states_of_all_layers(_model(), cases.inputs_of(mask))


def test_under_autocast() -> None:
    cases.assert_same_under_autocast(_model(), cases.inputs_of("right"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant: bool) -> None:
    cases.assert_same_with_checkpointed_layers(_model(), cases.inputs_of("both"), use_reentrant)


def test_copies_stay_accelerated() -> None:
    cases.assert_copies_stay_accelerated(_model(), cases.inputs_of("left"))


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_follows_the_mode_of_the_model(name: str) -> None:
    model = _model(**{name: 0.3})
    accelerate(model)
    inputs = cases.inputs_of("right")
    with torch.no_grad():
        train = [model.train()(**inputs).last_hidden_state for _ in range(2)]
        evaluation = [model.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*evaluation)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", cases.heads_of("modernbert"))
def test_heads(name: str, pooling: str) -> None:
    options = {**OPTIONS, **BIASES, "classifier_pooling": pooling}
    cases.assert_same_heads(cases.head_of("modernbert", name, **options))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_inputs_under_a_head_that_pools(pooling: str) -> None:
    """A mean needs a mask, which they do not have."""
    name = "ModernBertForSequenceClassification"
    model = cases.head_of("modernbert", name, **OPTIONS, classifier_pooling=pooling)
    accelerate(model)
    ids = cases.inputs_of("none")["input_ids"].view(1, -1)
    given = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 11, 33]).int()}
    if pooling == "mean":
        with pytest.raises(ValueError, match="packed inputs are refused under this head"):
            model(**given)
    else:
        assert model(**given).logits.shape == (2, 2)


def test_masks_of_the_callers_own_are_refused() -> None:
    model = _model()
    accelerate(model)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(**cases.inputs_of("none"), attention_mask={"full_attention": None})


def test_task_gradients() -> None:
    cases.assert_same_task_gradients(_model(**BIASES))
