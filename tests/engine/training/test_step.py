"""The whole step against the plain way: K backward passes, literal Algorithm 1, torch's AdamW."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from engine.data.batch_shapes import ShapePlan
from engine.data.collate import pack
from engine.optim.lr_schedule import Schedule

from ...kernels.pcgrad_reference import reference_pcgrad
from ..gradients.test_one_pass_backward import pass_by_pass
from ..small_models import DECAY, SEED, TASKS, build_step, random_split

LR = 1e-3


def flatten(rows: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([rows[name].flatten(1) for name in names], dim=1)


def plain_steps(model, batches, *, clip: float | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Train the plain way; return all weights."""
    model = copy.deepcopy(model).to(dtype)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("heads.cfimdb")}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for number, batch in enumerate(batches):
        seed = torch.tensor((SEED << 32) + number)
        rows = pass_by_pass(model, batch, seed=seed)
        order = kernels.draw_order(len(TASKS), seed)
        combined = reference_pcgrad(flatten(rows, list(trained)), order).to(dtype)
        pieces = combined.split([p.numel() for p in trained.values()])
        for parameter, piece in zip(trained.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_equal_the_plain_way(make_model, make_batch, clip):
    """Five steps with dropout: distances from float64 by the 2x rule, against the plain way's."""
    model = make_model(dropout=0.2).train()
    batches = [make_batch(seed=10 * n) for n in range(5)]
    exact = plain_steps(model, batches, clip=clip, dtype=torch.float64)
    torchs = plain_steps(model, batches, clip=clip, dtype=torch.float32)

    step = build_step(model, clip=clip)
    conflicts = 0
    for number, batch in enumerate(batches):
        report = step(batch, number, LR)
        conflicts += int((report.gram < 0).sum())
    assert conflicts > 0, "no conflict: this would test nothing of surgery"
    names = list(step.parameters.slots)
    ours = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n in names])
    others = [
        torch.cat([weights[n].flatten() for n, _ in model.named_parameters() if n in names])
        for weights in (torchs, exact)
    ]
    error, allowed = (ours - others[1]).norm(), 2 * (others[0] - others[1]).norm()
    assert error <= allowed


def test_batches_with_a_plan_train_the_same(make_model, make_batch):
    weights = []
    for planned in (False, True):
        model = make_model(dropout=0.2).train()
        step = build_step(model)
        for number in range(2):
            batch = make_batch(seed=10 * number)
            step(batch.planned() if planned else batch, number, LR)
        weights.append(step.parameters.master.clone())
    assert torch.equal(*weights)


def test_the_report_is_that_of_the_gradients(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    rows = pass_by_pass(model, batch, seed=torch.tensor(SEED << 32))
    step = build_step(model)
    report = step(batch, 0, LR)
    jacobian = flatten(rows, list(step.parameters.slots)).double()
    gram = jacobian @ jacobian.T
    torch.testing.assert_close(report.gram.double(), gram, rtol=1e-4, atol=1e-6)
    combined = report.weights.double() @ jacobian
    torch.testing.assert_close(report.grad_norm.double(), combined.norm(), rtol=1e-4, atol=0)
    assert report.skipped == 0


def test_a_gradient_that_is_not_finite_skips_the_update(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    step = build_step(model)
    step(batch, 0, LR)
    optimizer = step.optimizer
    state = [step.parameters.master, optimizer.exp_avg, optimizer.exp_avg_sq]
    before = [tensor.clone() for tensor in state]
    batch.labels[2].fill_(torch.inf)  # only one task's loss
    report = step(batch, 1, LR)
    assert report.skipped == 1
    assert optimizer.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_gradient_rows_hold_nothing_of_the_step_before(make_model, make_batch):
    """Other words occur in the next batch; rows of the first must not linger."""
    model = make_model().train()
    step = build_step(model)
    step(make_batch(seed=0), 0, 0.0)
    fresh_model = copy.deepcopy(model)
    step(make_batch(seed=50), 1, 0.0)
    fresh = build_step(fresh_model)
    fresh(make_batch(seed=50), 1, 0.0)
    assert torch.equal(step.parameters.rows, fresh.parameters.rows)


def test_sum_is_the_gradient_of_the_summed_loss(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    rows = pass_by_pass(model, batch, seed=torch.tensor(SEED << 32))
    step = build_step(model, balance="sum")
    report = step(batch, 0, LR)
    total = flatten(rows, list(step.parameters.slots)).sum(0)
    torch.testing.assert_close(report.grad_norm, total.norm(), rtol=1e-4, atol=0)
    assert report.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_weight_multiplies_the_tasks_gradient_not_its_reported_loss(make_model, make_batch):
    plain = build_step(make_model().train())(make_batch(), 0, LR)
    weights = torch.tensor([1.0, 0.25, 2.0])  # powers of two: exact
    weighted = build_step(make_model().train(), loss_weights=tuple(weights.tolist()))
    report = weighted(make_batch(), 0, LR)
    assert torch.equal(report.losses, plain.losses)
    torch.testing.assert_close(
        report.gram, weights[:, None] * plain.gram * weights, rtol=1e-5, atol=1e-7
    )


def test_bf16_weights_are_the_rounded_masters(make_model, make_batch):
    model = make_model().train()
    step = build_step(model, dtype=torch.bfloat16)
    for number in range(3):
        step(make_batch(seed=number), number, LR)
    flat = step.parameters
    assert flat.rows.dtype == flat.compute.dtype == torch.bfloat16
    assert torch.equal(flat.compute, flat.master.bfloat16())


def test_schedules():
    linear = Schedule(peak=1.0, kind="linear", warmup_steps=4, total_steps=14)
    rates = [linear(step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx([1 - n / 10 for n in range(10)])
    assert min(rates) > 0
    constant = Schedule(peak=1.0, kind="constant", warmup_steps=0, total_steps=3)
    assert [constant(step) for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "power", "share"),
    [
        ("cosine", 1.0, lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("polynomial", 3.0, lambda done: (1 - done) ** 3),
        ("polynomial", 0.5, lambda done: (1 - done) ** 0.5),
    ],
)
def test_schedules_that_bend(kind, power, share):
    bent = Schedule(peak=2.0, kind=kind, warmup_steps=4, total_steps=14, power=power)
    rates = [bent(step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[4:] == pytest.approx([2 * share(n / 10) for n in range(10)])
    assert min(rates) > 0
    long = Schedule(peak=1.0, kind=kind, warmup_steps=0, total_steps=2**31 - 1, power=power)
    assert long(2**31 - 2) > 0  # 1 + cos has no digit left there


def test_a_polynomial_of_power_1_is_the_straight_line():
    line, one = (
        Schedule(peak=1e-3, kind=kind, warmup_steps=3, total_steps=17)
        for kind in ("linear", "polynomial")
    )
    assert [line(step) for step in range(17)] == [one(step) for step in range(17)]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_takes_no_part_in_the_gradients(make_model, pooling):
    features = {"sst": "bilstm", "quora": "shared", "sts": "difference"}
    model = make_model(features, pooling=pooling, adapter_width=24).train()
    splits = [random_split(task, 6, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    plan = ShapePlan({TASKS: np.array([[100, 170, 140]])}, 1, [20])
    grams, losses = [], []
    for use in (None, plan):
        step = build_step(copy.deepcopy(model))
        report = step(pack(splits, [np.arange(6)] * 3, 0, use), 0, 1e-3)
        grams.append(report.gram)
        losses.append(report.losses)
    # The same sums, blocked otherwise.
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*grams, rtol=1e-4, atol=1e-5)
