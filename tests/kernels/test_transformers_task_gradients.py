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
            pytest.raises(NotImplementedError, match=f"model: {family} has layers that see more"),
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


def test_many_tasks_of_any_sizes() -> None:
    """The product of the sizes is beyond what a tensor's shape holds."""
    layer = torch.nn.Linear(4, 4)
    for sizes in ([3_000_000] * 3, [8192] * 5, [1000] * 7, [100] * 16, [1] * 40, [0, 7] * 20):
        with TaskGradients(layer, len(sizes)).batch(sizes, tokens=sizes):
            pass


def test_as_many_tokens_of_a_language_as_examples() -> None:
    """X-MOD's adapters are refused by name, not by their number of rows."""
    model = base_model("xmod")
    accelerate(model)
    collector = TaskGradients(model, 2)
    languages = torch.tensor([0, 0, 1, 1])
    with pytest.raises(NotImplementedError, match="model: xmod"), collector.batch((2, 2)):
        model(torch.full((4, 2), 7), lang_ids=languages)
