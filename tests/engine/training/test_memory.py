"""Micro-batches and checkpointed layers save memory.  The training is the same."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from engine.models.bert import BertLayer

from ..small_models import build_step, make_micro_batches
from .test_step import LR, plain_steps

SIZES = (5, 3, 4)


@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_train_as_the_whole_batch(make_model, make_batch, count):
    """Distances from float64 on whole batches, by the 2x rule against the plain way's."""
    model = make_model().train()
    batches = [make_batch(seed=10 * n, sizes=SIZES) for n in range(3)]
    exact = plain_steps(model, batches, clip=0.5, dtype=torch.float64)
    torchs = plain_steps(model, batches, clip=0.5, dtype=torch.float32)
    whole, parted = (build_step(copy.deepcopy(model), clip=0.5) for _ in range(2))
    for number, batch in enumerate(batches):
        expected = whole(batch, number, LR)
        report = parted(make_micro_batches(10 * number, SIZES, count), number, LR)
        # Means over 3 to 5 examples, after at most two updates that differ by rounding.
        torch.testing.assert_close(report.losses, expected.losses, rtol=1e-5, atol=1e-6)
    names = list(parted.parameters.slots)
    ours, others, exactly = (
        torch.cat([weights[name].flatten().double() for name in names])
        for weights in (dict(parted.model.named_parameters()), torchs, exact)
    )
    assert (ours - exactly).norm() <= 2 * (others - exactly).norm()


def test_micro_batches_drop_by_random_numbers_of_their_own(make_model):
    """Twice the same examples: with one seed for both, the two gradients would be equal."""
    model = make_model(dropout=0.3).train()
    (batch,) = make_micro_batches(0, SIZES, 1)
    once = build_step(copy.deepcopy(model))(batch, 0, LR)
    twice, again = (build_step(copy.deepcopy(model))([batch, batch], 0, LR) for _ in range(2))
    assert not torch.allclose(once.losses, twice.losses)
    assert torch.equal(twice.losses, again.losses)
    assert torch.equal(twice.gram, again.gram)


def test_checkpointed_layers_give_the_same_numbers(make_model, make_batch):
    masters, calls = [], []
    for checkpointed in (False, True):
        model = make_model(dropout=0.2).train()
        model.encoder.checkpoint_layers = checkpointed
        step = build_step(model, clip=0.5)
        layers = 0

        def count(module, _inputs):
            nonlocal layers
            layers += isinstance(module, BertLayer)

        with register_module_forward_pre_hook(count):
            for number in range(3):
                step(make_micro_batches(number, SIZES, 2), number, LR)
        masters.append(step.parameters.master)
        calls.append(layers)
    assert torch.equal(*masters)
    assert calls == [2 * 2 * 3, 2 * 2 * 3 * 2]
