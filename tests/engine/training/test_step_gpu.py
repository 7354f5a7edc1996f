"""The step on a GPU: the same training, and no wait for the device."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.data.batch_shapes import ShapePlan
from engine.data.collate import PackedBatch, pack
from engine.data.tokenizer import Tokenizer
from engine.distributed.gradient_sync import ReplicatedSync, ShardedSync
from engine.gradients.balancing import TrainedTasks
from engine.optim.lamb import Lamb
from kernels.gradient_queue import SideStream

from ...device_waits import no_wait_for_the_device
from ..models.heads.cases import OBJECTIVES, TEXTS, batch_of, model_of_objectives
from ..small_models import TASKS, build_step, make_micro_batches, random_split

pytestmark = pytest.mark.gpu


def planned_batch(seed: int) -> PackedBatch:
    """A batch of eight examples a task, all of one shape."""
    plan = ShapePlan({TASKS: np.array([[150, 250, 200]])}, 1, [20])
    splits = [random_split(task, 8, vocab=97, seed=seed + n) for n, task in enumerate(TASKS)]
    return pack(splits, [np.arange(8)] * len(TASKS), 0, plan)


def test_first_losses_and_gram_equal_the_cpus(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    reports = [
        build_step(copy.deepcopy(model), device=device, clip=1.0)(batch.to(device), 0, 1e-3)
        for device in ("cpu", "cuda")
    ]
    (ours, theirs), names = reports, ("losses", "gram", "weights", "grad_norm", "skipped")
    for name in names:
        # One fp32 step of a two-layer model: a few hundred roundings of 6e-8 on either side.
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name).cpu(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(make_model, make_batch, dtype):
    step = build_step(make_model(dropout=0.1).train(), device="cuda", clip=1.0, dtype=dtype)
    batches = [make_batch(seed=n).to("cuda") for n in range(3)]
    step(batches[0], 0, 1e-3)  # compiles
    with no_wait_for_the_device():
        for number, batch in enumerate(batches):
            step(batch, number, 1e-3)


def test_a_step_of_lamb_never_waits_for_the_device(make_model, make_batch):
    step = build_step(make_model(dropout=0.1).train(), device="cuda", clip=1.0)
    step.optimizer = Lamb(step.parameters, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    batch = make_batch().to("cuda")
    step(batch, 0, 1e-3)  # compiles, and brings the tensors' sizes to the device
    with no_wait_for_the_device():
        step(batch, 1, 1e-3)


def test_micro_batches_never_wait_for_the_device(make_model):
    step = build_step(make_model(dropout=0.1).train(), device="cuda", clip=1.0)
    step.model.encoder.checkpoint_layers = True
    batch = [part.to("cuda") for part in make_micro_batches(0, (5, 3, 4), 2)]
    step(batch, 0, 1e-3)  # compiles
    with no_wait_for_the_device():
        step(batch, 1, 1e-3)


def test_steps_repeat_to_the_bit(make_model, make_batch):
    model = make_model(dropout=0.1).train()
    batches = [make_batch(seed=n).to("cuda") for n in range(3)]
    masters = []
    for _ in range(2):
        step = build_step(copy.deepcopy(model), device="cuda", clip=1.0)
        for number, batch in enumerate(batches):
            step(batch, number, 1e-3)
        masters.append(step.parameters.master.clone())
    assert torch.equal(*masters)


@pytest.mark.parametrize("execution", ["compile", "graphs", "compiled_graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_and_recorded_steps_train_as_eager_ones(make_model, execution, dtype):
    model = make_model(dropout=0.1).train()
    batches = [planned_batch(seed).to("cuda") for seed in range(6)]
    curves, steps = [], []
    for kind in ("eager", execution):
        step = build_step(
            copy.deepcopy(model), device="cuda", clip=1.0, dtype=dtype, execution=kind
        )
        # Six steps; from the third on graphs are replayed.
        curves.append(torch.stack([step(b, n, 1e-3).losses.clone() for n, b in enumerate(batches)]))
        steps.append(step)
    assert steps[1].execution.num_graphs == (0 if execution == "compile" else 1)
    if execution == "graphs":  # the same kernels
        assert torch.equal(*curves)
        assert torch.equal(*(step.parameters.master for step in steps))
    # Fused operators round otherwise, and each step builds on the last: some roundings a step.
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(*curves, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("execution", ["graphs", "compiled_graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 8])
def test_the_side_stream_changes_no_bit(make_model, execution, dtype, most, monkeypatch):
    """First steps, recorded ones and replays of two micro-batches, planned or not."""
    submitted = []
    submit = SideStream.submit
    monkeypatch.setattr(
        SideStream, "submit", lambda *given: submitted.append(given[1]) or submit(*given)
    )
    model = make_model({"quora": "shared", "sts": "shared"}, dropout=0.1).train()
    masters, losses = [], []
    for side_stream in (False, True):
        torch._dynamo.reset()
        how = {"dtype": dtype, "execution": execution, "side_stream": side_stream}
        step = build_step(copy.deepcopy(model), device="cuda", **how)
        if side_stream:
            step.execution.gradient_queue._most = most
        for number in range(6):
            seeds = (20 * number, 20 * number + 10)
            batch = [step.model.with_lookup_plan(planned_batch(seed)) for seed in seeds]
            report = step([each.to("cuda") for each in batch], number, 1e-3)
        losses.append(report.losses.clone())
        assert step.execution.num_graphs == 1
        masters.append(step.parameters.master.clone())
        assert bool(submitted) == side_stream
    # In the first step and in the recording, not in replays.
    assert len(submitted) == 2 * 2 * (2 * 4 + 2)
    # Compiled with other options, code may be fused otherwise, and so round otherwise.
    assert execution == "compiled_graphs" or torch.equal(*masters)
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("execution", ["graphs", "compiled_graphs"])
def test_steps_with_a_side_stream_repeat_to_the_bit(make_model, execution):
    model, masters = make_model(dropout=0.1).train(), []
    for _ in range(2):
        step = build_step(copy.deepcopy(model), device="cuda", execution=execution)
        for number in range(8):
            step(planned_batch(10 * number).to("cuda"), number, 1e-3)
        masters.append(step.parameters.master.clone())
    assert torch.equal(*masters)


def test_a_tied_decoder_beside_a_side_stream():
    """The decoder's gradient and the embeddings' are added to the word table in one order."""
    names = ("sst", *OBJECTIVES)
    trained, tokenizer = TrainedTasks(names, (5,) * len(names)), Tokenizer.train(TEXTS, 90)
    plan = ShapePlan({names: np.array([[400, 400, 400, 400]])}, 1, [64])
    masters = []
    for side_stream in (False, True):
        step = build_step(
            model_of_objectives().train(),
            trained=trained,
            device="cuda",
            execution="graphs",
            side_stream=side_stream,
        )
        for number in range(6):
            step(batch_of(tokenizer, names, number, plan).to("cuda"), number, 1e-3)
        masters.append(step.parameters.master.clone())
    assert torch.equal(*masters)


def test_a_recording_that_fails_leaves_nothing_behind(make_model):
    """The side stream is joined, so that the recording ends and the next one succeeds."""
    model, batch = make_model().train(), planned_batch(0).to("cuda")
    step = build_step(model, device="cuda", execution="graphs")
    step(batch, 0, 1e-3)

    def fail(_gradient: Tensor) -> None:
        raise FloatingPointError

    layer = model.encoder.stages()[1].module
    handle = layer.register_forward_pre_hook(lambda _, given: given[0].register_hook(fail) and None)
    with pytest.raises(FloatingPointError):
        step(batch, 1, 1e-3)
    handle.remove()
    assert list(step.execution.gradient_queue.operands) == []
    for number in range(1, 4):
        assert step(batch, number, 1e-3).losses.isfinite().all()
    assert step.execution.num_graphs == 1


@pytest.fixture
def nccl() -> Iterator[None]:
    """A process group of this process alone, as torchrun would make it."""
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sync", [ShardedSync, ReplicatedSync])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanges_are_recorded_with_the_step(make_model, nccl, sync, dtype):
    """NCCL's calls, buckets during the backward pass included, give the bits of the eager step."""
    batches = [planned_batch(seed).to("cuda") for seed in range(6)]
    outcomes = []
    for kind in ("eager", "graphs"):
        step = build_step(
            make_model(dropout=0.1).train(),
            device="cuda",
            clip=1.0,
            dtype=dtype,
            execution=kind,
            sync=sync,
        )
        losses = [step(batch, n, 1e-3).losses.clone() for n, batch in enumerate(batches)]
        outcomes.append([*losses, step.parameters.master.clone()])
        assert step.execution.num_graphs == (1 if kind == "graphs" else 0)
        step.execution.close()  # NCCL would wait for the graph's end
    for eager, recorded in zip(*outcomes, strict=True):
        assert torch.equal(eager, recorded)


@pytest.mark.parametrize("execution", ["eager", "compile", "graphs", "compiled_graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_steps_are_the_same_and_never_wait(make_model, execution, dtype):
    """To the bit, since the device sorts as the host does; each replay has a plan of its own.

    Code that is compiled twice may be fused otherwise, and so round otherwise.
    """
    model = make_model(dropout=0.1).train()
    losses, masters = [], []
    for is_planned in (False, True):
        step = build_step(copy.deepcopy(model), device="cuda", dtype=dtype, execution=execution)
        batches = []
        for seed in range(6):
            batch = planned_batch(seed)
            batches.append(step.model.with_lookup_plan(batch) if is_planned else batch)
        batches = [batch.to("cuda") for batch in batches]
        for number, batch in enumerate(batches[:3]):  # compiles and records
            step(batch, number, 1e-3)
        with no_wait_for_the_device():
            for number, batch in enumerate(batches[3:], 3):
                report = step(batch, number, 1e-3)
        losses.append(report.losses.clone())
        rows = [table.rows.weight for table in step.model.encoder.planned]
        assert not any(row.any() for row in rows)
        masters.append(step.parameters.master.clone())
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    assert "compile" in execution or torch.equal(*masters)


def test_a_replayed_step_never_waits_for_the_device(make_model):
    batch = planned_batch(0).to("cuda")
    step = build_step(make_model(dropout=0.1).train(), device="cuda", clip=1.0, execution="graphs")
    for number in range(2):
        step(batch, number, 1e-3)
    with no_wait_for_the_device():
        for number in range(2, 5):
            step(batch, number, 1e-3)
