"""Surgery by layer and by tensor against Algorithm 1, run on each group by itself."""

import pytest
import torch

import kernels
from engine.gradients.flat_parameters import FlatParameters
from engine.gradients.groups import GRANULARITIES, ParamGroups

from ...kernels.pcgrad_reference import reference_pcgrad
from ..small_models import SEED, TASKS, build_step


def group_columns(groups: ParamGroups) -> list[torch.Tensor]:
    columns = [[] for _ in groups.names]
    for segment in groups.segments:
        columns[segment.group].append(torch.arange(segment.columns.start, segment.columns.stop))
    return [torch.cat(pieces) for pieces in columns]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parts_cover_every_column_once(make_model, granularity):
    flat = FlatParameters(
        make_model(), TASKS, device=torch.device("cpu"), compute_dtype=torch.float32
    )
    groups = ParamGroups(flat, TASKS, granularity)
    columns = torch.cat(group_columns(groups))
    assert torch.equal(columns.sort().values, torch.arange(flat.numel))
    for name, slot in flat.slots.items():
        of_slot = {
            groups.names[segment.group]
            for segment in groups.segments
            if segment.columns.start <= slot.offset < segment.columns.stop
        }
        (group,) = of_slot
        assert granularity == "model" or name.startswith(group)


def test_layers_are_the_embeddings_each_layer_and_each_head(make_model):
    flat = FlatParameters(
        make_model(), TASKS, device=torch.device("cpu"), compute_dtype=torch.float32
    )
    groups = ParamGroups(flat, TASKS, "layer")
    assert set(groups.names) == {
        "encoder.embeddings",
        "encoder.layers.0",
        "encoder.layers.1",
        "heads.sst",
        "heads.quora",
    }
    sole_tasks = dict(zip(groups.names, groups.sole_tasks, strict=True))
    assert sole_tasks["heads.quora"] == 1
    assert sole_tasks["encoder.layers.0"] is None


def test_a_part_belongs_to_the_one_task_that_reaches_it(make_model):
    model = make_model({"quora": "shared", "sts": "shared"}, adapter_width=24)
    flat = FlatParameters(model, TASKS, device=torch.device("cpu"), compute_dtype=torch.float32)
    for granularity in ("layer", "tensor"):
        groups = ParamGroups(flat, TASKS, granularity)
        for name, owner in zip(groups.names, groups.sole_tasks, strict=True):
            path = name.split(".")
            expected = TASKS.index(path[1]) if path[0] in ("heads", "adapters") else None
            assert owner == expected, name
    assert "pair" in ParamGroups(flat, TASKS, "layer").names
    assert ParamGroups(flat, TASKS, "model").sole_tasks == (None,)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_an_update_is_algorithm_1_on_each_part(make_model, make_batch, granularity, clip):
    """The first moment after one step holds a tenth of the combined gradient."""
    step = build_step(make_model().train(), surgery=granularity, clip=clip)
    report = step(make_batch(), 0, 1e-3)
    # The step zeroes the word rows at its end; the same step again, without that, keeps them.
    again = build_step(make_model().train(), surgery=granularity, clip=clip)
    again.model.zero_sparse_rows = lambda *_: None
    again(make_batch(), 0, 1e-3)
    rows = again.parameters.rows.double()

    order = kernels.draw_order(3, torch.tensor(SEED << 32))
    exact = torch.zeros(rows.shape[1], dtype=torch.float64)
    for columns in group_columns(step.groups):
        exact[columns] = reference_pcgrad(rows[:, columns], order)
    torch.testing.assert_close(report.grad_norm.double(), exact.norm(), rtol=1e-5, atol=0)
    if clip is not None:
        exact *= clip / exact.norm()
    # fp32: Gram products of 1e4 terms, weights and one sum; 1e-5 of the gradient's size.
    torch.testing.assert_close(
        step.optimizer.exp_avg.double() * 10, exact, rtol=0, atol=1e-5 * float(exact.abs().max())
    )
    torch.testing.assert_close(report.gram.double(), rows @ rows.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["mgda", "mean", "pcgrad"])
def test_a_head_trains_on_its_own_tasks_gradient(make_model, make_batch, method):
    """By layer, a balancing method must not weigh a head's gradient against others' zeros."""
    step = build_step(make_model().train(), balance=method, surgery="layer")
    weights = []
    balance = step.balancer
    step.balancer = lambda *inputs: weights.append(balance(*inputs)) or weights[-1]
    step(make_batch(), 0, 1e-3)
    for group, name in enumerate(step.groups.names):
        if name.startswith("heads."):
            own = TASKS.index(name.removeprefix("heads."))
            assert weights[0][group].tolist() == [float(task == own) for task in range(3)]
