"""The step on a GPU: the same training, and no wait for the device."""

import copy

import pytest
import torch

from engine.multitask.balance import METHODS
from engine.multitask.flat_parameters import FlatParameters
from engine.multitask.optimizer import AdamW
from engine.multitask.step import MultitaskStep

from .conftest import TASKS

pytestmark = pytest.mark.gpu


def step_on(device: str, model, dtype=torch.float32) -> MultitaskStep:
    flat = FlatParameters(model, TASKS, device=torch.device(device), compute_dtype=dtype)
    optimizer = AdamW(flat, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    return MultitaskStep(model, TASKS, flat, optimizer, METHODS["pcgrad"], clip_norm=1.0, seed=3)


def test_first_losses_and_gram_equal_the_cpus(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    reports = [
        step_on(device, copy.deepcopy(model))(batch.to(device), 0, 1e-3)
        for device in ("cpu", "cuda")
    ]
    for ours, theirs in zip(*reports, strict=True):
        # One fp32 step of a two-layer model: a few hundred roundings of 6e-8 on either side.
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(make_model, make_batch, dtype):
    step = step_on("cuda", make_model(dropout=0.1).train(), dtype)
    batches = [make_batch(seed=n).to("cuda") for n in range(3)]
    step(batches[0], 0, 1e-3)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches):
            step(batch, number, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_repeat_to_the_bit(make_model, make_batch):
    model = make_model(dropout=0.1).train()
    batches = [make_batch(seed=n).to("cuda") for n in range(3)]
    masters = []
    for _ in range(2):
        step = step_on("cuda", copy.deepcopy(model))
        for number, batch in enumerate(batches):
            step(batch, number, 1e-3)
        masters.append(step.parameters.master.clone())
    assert torch.equal(*masters)
