"""LAMB and apex's optimizers in the step; apex itself is played by a stand-in."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels
from engine.optim.build import build_optimizer
from engine.utils.errors import InputError

from ...kernels.pcgrad_reference import reference_pcgrad
from ..gradients.test_one_pass_backward import pass_by_pass
from ..small_models import DECAY, SEED, build_step
from ..training.test_step import flatten

LR, EPS = 1e-3, 1e-6
SETTINGS = {"betas": (0.9, 0.999), "eps": EPS, "weight_decay": DECAY}


class Stateful(torch.optim.Optimizer):
    """What apex's two have in common: the step's number lies in the group, moments in the state."""

    def step(self, closure=None, **_unsupported):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter)
                self.update(parameter.data, parameter.grad, state, group)


def direction(x: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
    """Adam's, moments updated in place, and the decay."""
    (beta1, beta2), step = group["betas"], group["step"]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    ratio = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    return ratio + group["weight_decay"] * x


class FusedAdam(Stateful):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert bias_correction
        assert adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def update(self, x, gradient, state, group):
        x.sub_(group["lr"] * direction(x, gradient, state, group))


class FusedLAMB(Stateful):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        assert max_grad_norm == float("inf")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def update(self, x, gradient, state, group):
        u = direction(x, gradient, state, group)
        norms = x.norm(), u.norm()
        x.sub_(group["lr"] * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * u)


@pytest.fixture
def apex(monkeypatch) -> None:
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam, optimizers.FusedLAMB = FusedAdam, FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def plain_steps(model, batches, kind: type, dtype: torch.dtype) -> dict[str, Tensor]:
    """K backward passes, literal Algorithm 1, and the stand-in tensor by tensor."""
    model = copy.deepcopy(model).to(dtype)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("heads.cfimdb")}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    own = {"max_grad_norm": float("inf")} if kind is FusedLAMB else {}
    optimizer = kind(groups, lr=LR, eps=EPS, **own)
    for number, batch in enumerate(batches):
        seed = torch.tensor((SEED << 32) + number)
        rows = flatten(pass_by_pass(model, batch, seed=seed), list(trained))
        combined = reference_pcgrad(rows, kernels.draw_order(3, seed)).to(dtype)
        pieces = combined.split([p.numel() for p in trained.values()])
        for parameter, piece in zip(trained.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "kind"), [("lamb", FusedLAMB), ("apex_lamb", FusedLAMB), ("apex_adam", FusedAdam)]
)
def test_steps_equal_the_plain_way(apex, make_model, make_batch, name, kind):
    """Four steps with dropout, the third skipped; distances from float64 by the 2x rule."""
    model = make_model(dropout=0.2).train()
    batches = [make_batch(seed=10 * n) for n in range(3)]
    exact = plain_steps(model, batches, kind, torch.float64)
    torchs = plain_steps(model, batches, kind, torch.float32)
    step = build_step(model)
    step.optimizer = build_optimizer(name, step.parameters, **SETTINGS)
    bad = make_batch()
    bad.labels[2].fill_(torch.inf)
    for number, batch in enumerate(batches):
        step(batch, number, LR)
        if number == 1:
            assert step(bad, 7, LR).skipped == 1
    assert step.optimizer.updates == 3
    names = list(step.parameters.slots)
    ours, others, exactly = (
        torch.cat([weights[n].detach().flatten().double() for n in names])
        for weights in (dict(model.named_parameters()), torchs, exact)
    )
    assert (ours - exactly).norm() <= 2 * (others - exactly).norm()


@pytest.mark.parametrize("name", ["lamb", "apex_adam", "apex_lamb"])
def test_low_precision_weights_follow_the_masters(apex, make_model, make_batch, name):
    step = build_step(make_model().train(), dtype=torch.bfloat16, surgery="layer")
    step.optimizer = build_optimizer(name, step.parameters, **SETTINGS)
    before = step.parameters.master.clone()
    for number in range(2):
        step(make_batch(seed=number), number, LR)
    assert not torch.equal(step.parameters.master, before)
    assert torch.equal(step.parameters.compute, step.parameters.master.bfloat16())


def test_without_apex(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    parameters = build_step(make_model()).parameters
    with pytest.raises(InputError, match="optimizer = apex_adam: NVIDIA's apex is not installed"):
        build_optimizer("apex_adam", parameters, **SETTINGS)
