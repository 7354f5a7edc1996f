"""Steps with a plan of the batch's lookups are those without, to the bit."""

import copy
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.batch_shapes import ShapePlan
from engine.data.collate import PackedBatch, pack
from engine.data.loader import TrainingLoader
from engine.data.sampler import TaskSampler
from engine.gradients.balancing import TrainedTasks
from engine.models import layers
from engine.models.context import Context
from engine.runtime.execution import Recorded
from engine.training.precompute import precompute_hidden_states
from engine.training.step import MultitaskStep

from ..models.heads.cases import SEED
from ..runtime.test_execution import Tape
from ..small_models import TASKS, build_step, make_micro_batches, random_split

LR = 1e-3
SHAPES = ShapePlan({TASKS: np.array([[150, 250, 200]])}, 1, [20])


def weights_after(
    step: MultitaskStep, batches: Sequence[Sequence[PackedBatch]], planned: bool
) -> Tensor:
    """Train; return the weights, and see that no gradient row of a table is left."""
    for number, micro_batches in enumerate(batches):
        given = [step.model.with_lookup_plan(b) if planned else b for b in micro_batches]
        assert all((batch.lookup_plan is not None) == planned for batch in given)
        step(given, number, LR)
        for table in step.model.encoder.planned:
            assert table.rows.weight.count_nonzero() == 0
    return step.parameters.master.clone()


def padded(seed: int) -> PackedBatch:
    splits = [random_split(task, 8, vocab=97, seed=seed + n) for n, task in enumerate(TASKS)]
    return pack(splits, [np.arange(8)] * len(TASKS), 0, SHAPES)


def no_search(*_: object) -> None:
    raise AssertionError("a planned step does not look for the order itself")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_are_the_same(make_model, micro_batches, dtype, monkeypatch):
    model = make_model(dropout=0.1).train()
    batches = [make_micro_batches(10 * n, (50, 30, 40), micro_batches) for n in range(3)]
    found = [weights_after(build_step(copy.deepcopy(model), dtype=dtype), batches, False)]
    module = sys.modules["kernels.embedding_layer_norm.embedding_layer_norm"]
    monkeypatch.setattr(module, "embedding_task_gradients_", no_search)
    monkeypatch.setattr(layers.Embedding, "zero_rows", no_search)
    found.append(weights_after(build_step(copy.deepcopy(model), dtype=dtype), batches, True))
    assert torch.equal(*found)


def test_steps_of_one_task_are_the_same(make_model):
    model = make_model().train()
    batches = [[make_micro_batches(n, (6,), 1, (TASKS[n],))[0]] for n in range(3)]
    found = []
    for planned in (False, True):
        step = build_step(copy.deepcopy(model), take_turns=True, balance="sum")
        found.append(weights_after(step, batches, planned))
    assert torch.equal(*found)


def test_a_task_without_tokens_and_padding(make_model):
    model = make_model().train()
    splits = [random_split(task, 8, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    picks = [np.arange(8), np.arange(0), np.arange(3)]
    batches = [[pack(splits, picks)], [padded(0)]]
    found = [weights_after(build_step(copy.deepcopy(model)), batches, p) for p in (False, True)]
    assert torch.equal(*found)


def test_a_recorded_step_takes_the_plans_of_other_batches(make_model):
    """A replay reads the tensors that it was recorded with: each plan is copied there."""
    model = make_model().train()
    batches = [padded(10 * n) for n in range(5)]
    expected = weights_after(build_step(copy.deepcopy(model)), [[b] for b in batches], True)
    step, tape = build_step(copy.deepcopy(model)), Tape()

    def losses(micro_batches: Sequence[PackedBatch]) -> Tensor:
        return step._on_device(micro_batches).losses.sum()

    step._run = Recorded(losses, tape, limit=1)
    found = weights_after(step, [[b] for b in batches], True)
    assert tape.log == ["run", "record", "replay", "replay", "replay", "replay"]
    plans = [model.with_lookup_plan(batch).lookup_plan for batch in batches]
    assert all(plan is None for plan in plans), "without gradient rows there is nothing to plan"
    plans = [step.model.with_lookup_plan(batch).lookup_plan for batch in batches]
    assert len({plan.shape for plan in plans}) == 1
    assert not torch.equal(plans[0], plans[1])
    assert torch.equal(found, expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_takes_plans(make_model):
    """One compilation serves all token counts, as without a plan."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(dropout=0.1).train()
    steps = [build_step(copy.deepcopy(model), execution=kind) for kind in ("eager", "compile")]
    for number in range(4):
        (batch,) = make_micro_batches(10 * number, (40 + number, 5, 4), 1)
        rows = []
        for step in steps:
            planned = step.model.with_lookup_plan(batch)
            step._task_gradients([planned])
            rows.append(step.parameters.rows.clone())
            step.model.zero_sparse_rows(planned)
        # Fused operators round otherwise: some roundings of each of a few layers.
        torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_is_planned_without_the_encoder(make_model, make_batch):
    model = make_model().train()
    frozen = build_step(copy.deepcopy(model), freeze_encoder=True).model
    assert frozen.with_lookup_plan(make_batch()).lookup_plan is None
    trained = build_step(model).model
    splits = [random_split(task, 4, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    states = [precompute_hidden_states(trained, split) for split in splits]
    batch = pack(states, [np.arange(4)] * len(TASKS))
    assert trained.with_lookup_plan(batch).lookup_plan is None


def test_only_tables_that_are_simple_are_planned(make_model, make_batch, monkeypatch):
    model = build_step(make_model().train()).model
    encoder, batch = model.encoder, make_batch()
    assert len(encoder.planned) == 3
    lookups = type(encoder).lookups

    def twice(self, input_ids: Tensor, context: Context):
        yield from lookups(self, input_ids, context)
        yield self.embeddings.word, input_ids

    monkeypatch.setattr(type(encoder), "lookups", twice)
    encoder.choose_planned()
    assert encoder.planned == ()
    assert model.with_lookup_plan(batch).lookup_plan is None


def test_evaluation_takes_no_plan(make_model, make_batch):
    model = build_step(make_model().train()).model.eval()
    batch = make_batch()
    found = [model(b, TASKS, seed=SEED) for b in (batch, model.with_lookup_plan(batch))]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_an_index_beyond_its_table_is_refused_by_the_host(make_model, make_batch):
    model, batch = build_step(make_model().train()).model, make_batch()
    batch.input_ids[3] = 97
    with pytest.raises(ValueError, match=r"indices\[0\]: expected 0 <= index < 97, got 97"):
        model.with_lookup_plan(batch)


def test_the_loader_plans(make_model):
    model = build_step(make_model().train(), trained=TrainedTasks(TASKS, (20, 20, 20))).model
    splits = [random_split(task, 20, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    samplers = [TaskSampler(task, 20, 4, seed=5) for task in TASKS]
    with TrainingLoader(splits, samplers, 0, 3, plan_lookups=model.with_lookup_plan) as loader:
        batches = list(loader)
    for batch in batches:
        assert torch.equal(batch.lookup_plan, model.with_lookup_plan(batch).lookup_plan)
        assert batch.lookup_plan is batch.tensors[-1]
        assert batch.map(Tensor.clone).signature == batch.signature
