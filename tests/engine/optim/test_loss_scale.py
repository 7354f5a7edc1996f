"""fp16: the loss scale by itself, and in the step."""

import copy

import pytest
import torch

from engine.optim.loss_scale import LossScale
from engine.runtime.precision import set_matmul_precision
from engine.utils.errors import InputError

from ..small_models import build_step

LR = 1e-3
NO, YES = torch.tensor(False), torch.tensor(True)


def test_scale_is_halved_by_overflow_and_doubled_by_patience():
    scale = LossScale(torch.device("cpu"), growth_interval=3)
    seen = []
    for overflow in (NO, YES, NO, NO, NO, NO, NO, NO, YES, NO):
        scale.update(overflow)
        seen.append(int(scale.scale.log2()))
    assert seen == [16, 15, 15, 15, 16, 16, 16, 17, 16, 16]
    for _ in range(30):
        scale.update(YES)
    assert scale.scale == 1.0
    for _ in range(90):
        scale.update(NO)
    assert scale.scale == 2.0**24


def test_reports_are_those_of_fp32(make_model, make_batch):
    model, batch = make_model(dropout=0.1).train(), make_batch()
    exact = build_step(copy.deepcopy(model), clip=0.5)(batch, 0, LR)
    step = build_step(model, dtype=torch.float16, clip=0.5)
    step.loss_scale.scale.fill_(2.0**10)
    report = step(batch, 0, LR)
    assert report.skipped == 0
    # Halves keep 11 bits; norms and losses of a two-layer model come through some thirty roundings.
    for ours, theirs in zip(report[:2], exact[:2], strict=True):
        scale = theirs.diagonal().max() if theirs.dim() == 2 else theirs.max()
        assert (ours - theirs).abs().max() <= 30 * 2**-11 * scale
    assert report.grad_norm == pytest.approx(float(exact.grad_norm), rel=30 * 2**-11)
    assert step.parameters.rows.dtype == torch.float16
    assert step.parameters.master.dtype == step.optimizer.exp_avg.dtype == torch.float32
    assert torch.equal(step.parameters.compute, step.parameters.master.half())


def test_overflow_skips_until_the_scale_fits(make_model, make_batch):
    step = build_step(make_model().train(), dtype=torch.float16, loss_weights=(1e4, 1.0, 1.0))
    before = step.parameters.master.clone()
    skipped = 0
    while step(make_batch(), 0, LR).skipped:
        skipped += 1
        assert torch.equal(step.parameters.master, before)
        assert step.optimizer.updates == 0
        assert step.state["loss_scale.scale"] == 2.0 ** (16 - skipped)
        assert skipped < 16
    assert skipped > 0, "nothing overflowed: this would test nothing"
    assert torch.isfinite(step.parameters.master).all()
    assert not torch.equal(step.parameters.master, before)
    assert step.optimizer.updates == step.state["loss_scale.good_steps"] == 1


def test_small_gradients_survive(make_model, make_batch):
    """Without the scale most of these would be below the smallest half, 6e-8."""
    weights = (1e-6, 1e-6, 1e-6)
    exact = build_step(make_model().train(), loss_weights=weights)(make_batch(), 0, LR)
    step = build_step(make_model().train(), dtype=torch.float16, loss_weights=weights)
    step.loss_scale.scale.fill_(2.0**24)
    report = step(make_batch(), 0, LR)
    assert report.grad_norm == pytest.approx(float(exact.grad_norm), rel=30 * 2**-11)


def test_tf32_needs_a_gpu():
    with pytest.raises(InputError, match="precision = tf32: needs a GPU"):
        set_matmul_precision("tf32", torch.device("cpu"))
    set_matmul_precision("fp32", torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_tf32_rounds_products():
    torch.manual_seed(0)
    x = torch.randn(256, 256, device="cuda")
    exact = x.double() @ x.double()
    errors = []
    try:
        for precision in ("fp32", "tf32"):
            set_matmul_precision(precision, x.device)
            errors.append((x @ x - exact).norm() / exact.norm())
    finally:
        set_matmul_precision("fp32", x.device)
    # Inputs of 11 bits instead of 24
    assert errors[0] < 1e-6 < 1e-4 < errors[1] < 2**-10
