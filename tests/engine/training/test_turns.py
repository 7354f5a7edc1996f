"""Steps in which the tasks take turns: one gradient row, and the others' parameters rest."""

import torch

from engine.training.step import MultitaskStep

from ..small_models import TASKS, build_step, make_micro_batches

LR = 1e-3
SHARING = {"quora": "shared", "sts": "shared"}


def build_turns(model, **settings) -> MultitaskStep:
    return build_step(
        model, balance="sum", loss_weights=(1.0, 2.0, 1.0), take_turns=True, **settings
    )


def batch_of(task: str):
    return make_micro_batches(TASKS.index(task), (5,), 1, tasks=(task,))[0]


def test_a_turn_moves_what_its_task_reaches_and_nothing_else(make_model):
    model = make_model(SHARING, adapter_width=12)
    step = build_turns(model)
    for number, task in enumerate(("sst", "sts", "quora", "sst")):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(batch_of(task), number, LR)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= {n for n in before if task in step.parameters.tasks_using(n)}
        assert {f"heads.{task}.output.weight", "encoder.layers.0.qkv.weight"} <= moved
        assert ("pair.weight" in moved) == (task != "sst")
        assert f"adapters.{task}.down.weight" in moved


def test_a_turn_has_the_norm_of_its_own_gradient(make_model):
    """What an earlier turn left in the row must not count."""
    model = make_model(SHARING)
    step = build_turns(model)
    step(batch_of("quora"), 0, LR)
    report = step(batch_of("sst"), 1, LR)
    assert report.tasks == ("sst",)
    own = [n for n in step.parameters.slots if "sst" in step.parameters.tasks_using(n)]
    views = dict(step.parameters.named_views(step.parameters.rows[0]))
    # The word table's row is zeroed after the step, so its part is missing on the right-hand side.
    others = torch.stack([views[n].norm() for n in own]).norm()
    assert not views["pair.weight"].any()
    assert not views["heads.quora.output.weight"].any()
    assert report.grad_norm >= others > 0


def test_a_frozen_encoder_stays(make_model):
    model = make_model(SHARING, adapter_width=12)
    step = build_turns(model, freeze_encoder=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, task in enumerate(TASKS):
        step(batch_of(task), number, LR)
    resting = ("encoder.", "heads.cfimdb.", "adapters.cfimdb.")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(resting), name
    assert "encoder.layers.0.qkv.weight" not in step.parameters.slots
