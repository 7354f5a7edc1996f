"""LAMB and apex's optimizers in the step; apex itself is played by a stand-in."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels
from engine.optim.build import build_optimizer
from engine.optim.torch_optimizer import torch_arguments
from engine.utils.errors import InputError

from ...kernels.pcgrad_reference import reference_pcgrad
from ..gradients.test_one_pass_backward import pass_by_pass
from ..small_models import DECAY, SEED, TASKS, build_step, make_micro_batches
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


def plain_steps(
    model, batches, kind: type, dtype: torch.dtype, clip: float | None = None, **arguments
) -> dict[str, Tensor]:
    """K backward passes, literal Algorithm 1, and the stand-in, or torch's, tensor by tensor."""
    model = copy.deepcopy(model).to(dtype)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("heads.cfimdb")}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    own = {"max_grad_norm": float("inf")} if kind is FusedLAMB else {}
    own |= {} if kind.__module__.startswith("torch.") else {"eps": EPS}
    optimizer = kind(groups, lr=LR, **own, **arguments)
    for number, batch in enumerate(batches):
        seed = torch.tensor((SEED << 32) + number)
        rows = flatten(pass_by_pass(model, batch, seed=seed), list(trained))
        combined = reference_pcgrad(rows, kernels.draw_order(3, seed)).to(dtype)
        pieces = combined.split([p.numel() for p in trained.values()])
        for parameter, piece in zip(trained.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
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


# Those of torch


def use_torchs(step, name: str, factors=None, **options) -> None:
    arguments = torch_arguments(name, options, 0.9, DECAY)
    step.optimizer = build_optimizer(name, step.parameters, factors, arguments, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "kind", "options", "own"),
    [
        ("sgd", "SGD", {"nesterov": True}, {"momentum": 0.9}),
        ("adafactor", "Adafactor", {}, {}),
        ("torch.RAdam", "RAdam", {"betas": [0.8, 0.9]}, {}),
        ("torch.RMSprop", "RMSprop", {"alpha": 0.9}, {}),
        ("torch.AdamW", "AdamW", {"amsgrad": True}, {}),
    ],
)
def test_torchs_step_as_by_themselves(make_model, make_batch, name, kind, options, own):
    """Three steps with dropout and clipping, and one skipped; by the 2x rule from float64."""
    model = make_model(dropout=0.2).train()
    batches = [make_batch(seed=10 * n) for n in range(3)]
    theirs = getattr(torch.optim, kind)
    exact, torchs = (
        plain_steps(model, batches, theirs, dtype, 0.5, **options, **own)
        for dtype in (torch.float64, torch.float32)
    )
    step = build_step(model, clip=0.5)
    use_torchs(step, name, **options)
    bad = make_batch()
    bad.labels[2].fill_(torch.inf)
    for number, batch in enumerate(batches):
        step(batch, number, LR)
        before = [step.parameters.master.clone(), *step.optimizer.state.values()]
        before = [tensor.clone() for tensor in before]
        assert step(bad, 7, LR).skipped == 1
        after = [step.parameters.master, *step.optimizer.state.values()]
        assert all(map(torch.equal, before, after))
    assert step.optimizer.updates == 3
    names = list(step.parameters.slots)
    ours, others, exactly = (
        torch.cat([weights[n].detach().flatten().double() for n in names])
        for weights in (dict(model.named_parameters()), torchs, exact)
    )
    assert (ours - exactly).norm() <= 2 * (others - exactly).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_torchs(make_model, make_batch, dtype):
    step = build_step(make_model().train(), dtype=dtype, surgery="layer")
    use_torchs(step, "sgd")
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(2.0**10)
    before = step.parameters.master.clone()
    step(make_batch(), 0, LR)
    assert not torch.equal(step.parameters.master, before)
    assert torch.equal(step.parameters.compute, step.parameters.master.to(dtype))


def test_torchs_leave_what_takes_no_part_in_a_step(make_model):
    """Weights, momentum and the state in a checkpoint, of the heads of other tasks."""
    step = build_step(make_model().train(), balance="sum", take_turns=True)
    use_torchs(step, "torch.Adam", factors=None)
    for number, task in enumerate(("quora", "sst")):
        before = step.parameters.master.clone()
        place = TASKS.index(task)
        step(make_micro_batches(place, (4,), 1, TASKS[place : place + 1])[0], number, LR)
    moved = dict(step.parameters.named_views(step.parameters.master - before))
    assert moved["heads.sst.output.weight"].any()
    assert not moved["heads.quora.output.weight"].any()
    state = step.optimizer.state
    assert state["heads.sst.output.weight.step"] == state["heads.quora.output.weight.step"] == 1
    other = build_step(make_model().train(), balance="sum", take_turns=True)
    use_torchs(other, "torch.Adam")
    assert other.optimizer.state.keys() == state.keys()
    other.optimizer.load_state(state)
    assert all(torch.equal(other.optimizer.state[name], state[name]) for name in state)


def test_torchs_have_rates_by_stage(make_model, make_batch):
    factors = dict.fromkeys((stage.name for stage in make_model().stages()), 1.0)
    step, other = (build_step(make_model().train()) for _ in range(2))
    use_torchs(step, "sgd", factors | {"encoder.layers.0": 0.5})
    use_torchs(other, "sgd")
    step(make_batch(), 0, LR)
    other(make_batch(), 0, LR / 2)
    names = list(step.parameters.slots)
    one, half = (dict(s.parameters.named_views(s.parameters.master)) for s in (step, other))
    same = {name for name in names if torch.equal(one[name], half[name])}
    assert {"encoder.layers.0.qkv.weight"} <= same
    assert all(name.startswith("encoder.layers.0.") for name in same)


def test_optimizers_without_decay_that_need_more_than_gradients():
    with pytest.raises(ValueError, match=r"optimizer = torch\.LBFGS: cannot be used"):
        torch_arguments("torch.LBFGS", {}, 0.9, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch.Adamw", {}, "torch.optim has no such optimizer; known: "),
        ("torch.LBFGS", {}, "weight_decay = 0.1: torch.LBFGS has none; set it to 0"),
        ("torch.SparseAdam", {}, "weight_decay = 0.1: torch.SparseAdam has none; set it to 0"),
        ("torch.Muon", {}, "cannot be used"),
        ("sgd", {"lr": 0.1}, "optimizer_options.lr: the recipe has a field for it"),
        ("sgd", {"momentum": 0.1}, "optimizer_options.momentum: the recipe has a field for it"),
        ("torch.Adam", {"capturable": True}, "optimizer_options.capturable: steps of torch's"),
        ("torch.Adam", {"maximize": True}, "optimizer_options.maximize: losses are minimized"),
        ("torch.Adam", {"alpha": 1.0}, "torch.Adam has no such argument; known: betas, eps"),
        ("torch.RMSprop", {"alpha": "x"}, "cannot be used"),
        ("torch.Adam", {"eps": -1.0}, r"cannot be used \(Invalid epsilon value: -1.0\)"),
    ],
)
def test_what_torchs_refuse(name, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        torch_arguments(name, options, 0.9, DECAY)
    assert "\n" not in str(refused.value)
