"""Rates by layer: against torch's AdamW and a stand-in for LAMB with a group for each rate."""

from pathlib import Path

import pytest
import torch

from engine.config import recipe as recipes
from engine.gradients.flat_parameters import FlatParameters
from engine.gradients.groups import ParamGroups
from engine.optim.build import build_optimizer
from engine.optim.lr_factors import lr_factors
from engine.runs.run import begin
from engine.utils.errors import InputError

from ...device_waits import RecordableOnly
from ..small_models import DECAY, TASKS, build_step, make_micro_batches

LR, HEAD_LR = 1e-3, 4e-3
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}
RATES = {"lr": LR, "head_lr": HEAD_LR, "layer_lr_decay": 0.5}
EXPECTED = {"encoder.embeddings": 0.25, "encoder.layers.0": 0.5, "encoder.layers.1": 1.0}


def factor_of(name: str) -> float:
    return next((f for stage, f in EXPECTED.items() if name.startswith(f"{stage}.")), 4.0)


def test_factors_of_stages(make_model):
    factors = lr_factors(make_model({"sts": "shared"}, adapter_width=12), **RATES)
    assert {name: factors[name] for name in EXPECTED} == EXPECTED
    assert {"pair", "heads.sst", "adapters.quora"} <= factors.keys() - EXPECTED.keys()
    assert {factors[name] for name in factors.keys() - EXPECTED.keys()} == {4.0}


def test_a_last_norm_belongs_to_the_last_layer():
    tiny = ["encoder.model_type=modernbert", "encoder.num_hidden_layers=2"]
    model = begin(recipes.load("demo", tiny), Path("not-written")).new_model()
    factors = lr_factors(model, lr=LR, head_lr=0.0, layer_lr_decay=0.5)
    assert factors["encoder.final_norm"] == factors["encoder.layers.1"] == factors["heads.sst"] == 1
    assert factors["encoder.embeddings"] == 0.25


@pytest.mark.parametrize("head_lr", [0.0, LR])
def test_equal_rates_are_no_factors(make_model, head_lr):
    assert lr_factors(make_model(), lr=LR, head_lr=head_lr, layer_lr_decay=1.0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_each_stage_moves_as_at_its_own_rate(make_model, make_batch, name, granularity, dtype):
    """The same bits as an optimizer with that rate for all, moments too."""
    batches = [make_batch(seed=n) for n in range(2)]
    factors = lr_factors(make_model(adapter_width=12), **RATES)
    step = build_step(make_model(adapter_width=12).train(), surgery=granularity, dtype=dtype)
    step.optimizer = build_optimizer(name, step.parameters, factors, **SETTINGS)
    step(batches[0], 0, LR)
    moved = dict(step.parameters.named_views(step.parameters.master))
    assert torch.equal(step.parameters.compute, step.parameters.master.to(dtype))
    for factor in (0.25, 0.5, 1.0, 4.0):
        other = build_step(make_model(adapter_width=12).train(), surgery=granularity, dtype=dtype)
        other.optimizer = build_optimizer(name, other.parameters, **SETTINGS)
        other(batches[0], 0, LR * factor)
        for part, tensor in other.parameters.named_views(other.parameters.master):
            if factor_of(part) == factor:
                assert torch.equal(moved[part], tensor), part
        for key, vector in other.optimizer.vectors.items():
            assert torch.equal(vector, step.optimizer.vectors[key])
    with RecordableOnly():
        step._on_device([batches[1]])


def test_shards_have_the_rates_of_the_whole(make_model):
    """Ranges of two ranks, put together, are those of one."""
    model = make_model(adapter_width=12)
    factors = lr_factors(model, **RATES)
    values = torch.zeros(0)
    for rank in range(2):
        flat = FlatParameters(
            make_model(adapter_width=12),
            TASKS,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            shard=(rank, 2),
        )
        optimizer = build_optimizer("adamw", flat, factors, **SETTINGS)
        if rank == 0:
            values = torch.zeros(flat.numel)
        before = flat.master.clone()
        flat.own.rows.fill_(1.0)
        segments = ParamGroups(flat, TASKS, "layer").segments
        weights = torch.ones(max(s.group for s in segments) + 1, len(TASKS))
        flat.master.zero_()
        one, no = torch.ones(()), torch.tensor(False)
        optimizer.step(weights, segments, lr=one, scale=one, skip=no)
        assert before.shape == flat.master.shape
        for piece in flat.own.pieces:
            own = flat.master[piece.own : piece.own + piece.size]
            values[piece.start : piece.start + piece.size] = own
    for name, slot in flat.slots.items():
        torch.testing.assert_close(
            slot.view(values), torch.full(tuple(slot.shape), -factor_of(name)), msg=name
        )


def test_a_turn_leaves_other_heads(make_model):
    model = make_model()
    step = build_step(model.train(), balance="sum", take_turns=True)
    factors = lr_factors(model, **RATES)
    step.optimizer = build_optimizer("adamw", step.parameters, factors, **SETTINGS)
    before = step.parameters.master.clone()
    step(make_micro_batches(0, (4,), 1, TASKS[:1])[0], 0, LR)
    views = dict(step.parameters.named_views(step.parameters.master - before))
    assert views["heads.sst.output.weight"].any()
    assert not views["heads.quora.output.weight"].any()


def test_apex_has_one_rate(make_model):
    with pytest.raises(InputError, match="optimizer = apex_adam: has one learning rate for all"):
        build_optimizer("apex_adam", build_step(make_model()).parameters, {"pair": 2.0}, **SETTINGS)
