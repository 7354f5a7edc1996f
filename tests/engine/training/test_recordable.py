"""Everything in a step can be recorded in a CUDA graph: shown on a CPU, for every method.

On a GPU the same is shown by recording (tests/engine/training/test_step_gpu.py); here each call of
torch is looked at.
"""

import sys

import pytest
import torch

from engine.gradients.balancing import METHODS, BalanceSettings
from engine.gradients.groups import GRANULARITIES
from engine.optim.lamb import Lamb

from ...device_waits import NotRecordableError, RecordableOnly
from ..small_models import TASKS, build_step, make_micro_batches

SETTINGS = {
    "plain": BalanceSettings(),
    "set": BalanceSettings(
        fixed={"sts": 0.25},
        main="quora",
        cagrad_c=1.0,
        preferences={"quora": 2.0},
        aligned_mtl_scale_mode="median",
        nash_mtl_max_norm=0.5,
        fairgrad_alpha=2.0,
        dwa_window=1,
        stch_warmup=1,
    ),
}
VIEWS = {"view", "slice", "select", "expand", "unsqueeze", "squeeze", "squeeze_", "t", "diagonal"}
VIEWS |= {"detach", "alias", "unbind", "empty", "new_empty", "empty_like", "_unsafe_view"}


@pytest.fixture(autouse=True)
def _values_are_not_looked_at(monkeypatch):
    """As on a GPU: the checks of values on a CPU are left out."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and hasattr(module, "may_look"):
            monkeypatch.setattr(module, "may_look", lambda _: False)


def launches_of_update(step, batch) -> list[str]:
    """The operators after the backward pass that a GPU would launch something for."""
    losses = step._task_gradients((batch,))
    with RecordableOnly() as seen:
        step._update(losses, batch.tasks)
    names = [name.removeprefix("aten.").removeprefix("superbert.") for name in seen.calls]
    return [name for name in names if name.partition(".")[0] not in VIEWS]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method(make_model, make_batch, name, settings, granularity):
    step = build_step(
        make_model().train(),
        balance=name,
        settings=SETTINGS[settings],
        surgery=granularity,
        clip=1.0,
    )
    batch = make_batch()
    for _ in range(2):  # the second step has a state
        launches_of_update(step, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_whole_step(make_model, dtype, optimizer):
    """Forward and backward too, of two micro-batches, with what ends the step."""
    step = build_step(make_model(dropout=0.1).train(), surgery="layer", clip=1.0, dtype=dtype)
    if optimizer == "lamb":
        step.optimizer = Lamb(step.parameters, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    batches = make_micro_batches(0, (5, 3, 4), 2)
    step(batches, 0, 1e-3)  # brings the sizes of LAMB's tensors to the device
    with RecordableOnly():
        step._on_device(batches)


def test_steps_of_one_task(make_model):
    step = build_step(make_model().train(), balance="sum", surgery="layer", take_turns=True)
    (batch,) = make_micro_batches(0, (4,), 1, TASKS[:1])
    with RecordableOnly():
        step._on_device([batch])


def test_the_update_is_a_few_launches(make_model, make_batch):
    """However many groups there are: one operator each for surgery, summary and optimizer."""
    expected = ["gram.default", "draw_order.default", "pcgrad_weights.default"]
    expected += ["update_summary.default", "bitwise_not.default", "add_.Tensor"]
    expected.append("combine_adamw_segments_.default")
    for granularity in GRANULARITIES:
        step = build_step(make_model().train(), surgery=granularity, clip=1.0)
        launches = launches_of_update(step, make_batch())
        assert [name for name in launches if name in expected] == expected
        # At most four to add up a group's segments, and seven for groups that one task uses.
        assert len(launches) <= len(expected) + 11, (granularity, launches)
        assert granularity != "model" or launches == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.tensor([0.0, 1.0]) + x,
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.repeat_interleave(x.long()),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
    ],
)
def test_what_a_graph_cannot_hold_is_found(call):
    x = torch.ones(2)
    with RecordableOnly(), pytest.raises(NotRecordableError):
        call(x)
