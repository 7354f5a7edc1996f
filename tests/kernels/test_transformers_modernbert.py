"""ModernBERT on packed tokens: layers with a window, and what its configs and heads ask for."""

import pytest
import torch

from kernels import accelerate
from kernels.integrations import transformers_layers

from .transformers_cases import (
    SEQUENCES,
    VARIANTS,
    assert_accelerated_runs_are_the_same,
    base_model,
    batch,
    head_model,
)


# Five places see each other through the window, six do not.
@pytest.mark.parametrize("length", [5, 6, 23])
def test_rows_of_other_lengths(length: int) -> None:
    assert_accelerated_runs_are_the_same(base_model("modernbert"), length=length)


@pytest.mark.parametrize(("name", "is_window"), [("wide", False), ("narrower", True)])
def test_a_window_wider_than_the_batch(
    name: str, is_window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is no window: ten places to each side of eleven."""
    calls: list[int] = []
    windowed = transformers_layers.windowed_attention
    monkeypatch.setattr(
        transformers_layers,
        "windowed_attention",
        lambda *arguments: calls.append(1) or windowed(*arguments),
    )
    kind, options = VARIANTS[f"ModernBERT of {name} windows"]
    model = base_model(kind, **options)
    accelerate(model)
    model(**batch(model, "both"))
    assert bool(calls) == is_window


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_inputs_under_a_head_that_pools(pooling: str) -> None:
    """A mean needs a mask, which they do not have."""
    name = "ModernBertForSequenceClassification"
    model = head_model("modernbert", name, classifier_pooling=pooling)
    accelerate(model)
    boundaries = torch.tensor((0, *SEQUENCES)).cumsum(0).int()
    given = {
        "input_ids": torch.full((1, sum(SEQUENCES)), 7),
        "cu_seq_lens_q": boundaries,
        "max_length_q": max(SEQUENCES),
    }
    if pooling == "mean":
        with pytest.raises(ValueError, match="packed inputs are refused under this head"):
            model(**given)
    else:
        assert model(**given).logits.shape == (len(SEQUENCES), 2)


def test_masks_of_the_callers_own_are_refused() -> None:
    model = base_model("modernbert")
    accelerate(model)
    mask = {"full_attention": None}
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(**batch(model, "none") | {"attention_mask": mask})
