"""Task gradients of each family: two tasks in one accelerated batch, and each by itself."""

import pytest
import torch
from torch import Tensor

from kernels import TaskGradients, accelerate

from .transformers_cases import (
    KINDS,
    VARIANTS,
    assert_same_gradients,
    base_model,
    batch,
    gradients_of,
)

REFUSED = ("deberta-v2", "mpnet", "xmod")
"""Relative positions are no tokens of a task, and X-MOD's adapters see those of a language."""
EXAMPLES = (1, 2)


def losses(hidden: Tensor) -> list[Tensor]:
    return [part[:, 0].square().sum() for part in hidden.split(EXAMPLES)]


@pytest.mark.parametrize("mask", ["right", "none"])
@pytest.mark.parametrize("kind", [*KINDS, "ModernBERT with biases"])
def test_task_gradients(kind: str, mask: str) -> None:
    family, options = VARIANTS.get(kind, (kind, {}))
    model = base_model(family, **options)
    expected = []
    for task in range(2):
        model.zero_grad()
        losses(model(**batch(model, mask)).last_hidden_state)[task].backward()
        expected.append(gradients_of(model))
    model.zero_grad()
    accelerate(model)
    collector = TaskGradients(model, 2)
    if family in REFUSED:
        with (
            pytest.raises((ValueError, NotImplementedError), match="encoder"),
            collector.batch(EXAMPLES),
        ):
            model(**batch(model, mask))
        return
    with collector.batch(EXAMPLES):
        hidden = model(**batch(model, mask)).last_hidden_state
    torch.autograd.backward(losses(hidden))
    views = dict(collector.named_views())
    for task, gradients in enumerate(expected):
        assert_same_gradients({name: views[name][task] for name in gradients}, gradients, str(task))
