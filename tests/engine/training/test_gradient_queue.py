"""Weight gradients that are computed as late as possible: the same steps, to the bit."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from engine.data.collate import PackedBatch
from engine.data.tokenizer import Tokenizer
from engine.distributed.gradient_sync import NoSync
from engine.gradients.balancing import TrainedTasks
from engine.models.multitask import MultitaskModel
from engine.training.step import MultitaskStep
from kernels import gradient_queue

from ...gradient_queues import InOrder, UntilJoined
from ..models.heads.cases import OBJECTIVES, TEXTS, batch_of, model_of_objectives
from ..small_models import build_step, make_micro_batches

FEATURES = {"quora": "shared", "sts": "shared"}  # two heads add to the rows of one linear layer
NAMES = ("sst", *OBJECTIVES)
LR = 1e-3


def weights_after(
    step: MultitaskStep, batches: Sequence[Sequence[PackedBatch]], *, in_order: bool = True
) -> Tensor:
    """Train; return the weights."""
    for number, micro_batches in enumerate(batches):
        with InOrder() if in_order else nullcontext():
            step(micro_batches, number, LR)
    return step.parameters.master.clone()


def micro_batches_of(model: MultitaskModel, planned: bool) -> list[list[PackedBatch]]:
    """Three batches of two."""
    batches = [make_micro_batches(10 * n, (6, 4, 4), 2) for n in range(3)]
    if planned:
        batches = [[model.with_lookup_plan(b) for b in micro_batches] for micro_batches in batches]
    return batches


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_steps_are_the_same(make_model, dtype, planned, checkpointed):
    model = make_model(FEATURES, dropout=0.1, adapter_width=12).train()
    model.encoder.checkpoint_layers = checkpointed
    masters, queue = [], UntilJoined()
    for each in (None, queue):
        step = build_step(copy.deepcopy(model), dtype=dtype, gradient_queue=each, clip=1.0)
        masters.append(weights_after(step, micro_batches_of(step.model, planned)))
    assert queue.overwritten == 0
    assert torch.equal(*masters)
    # Of each micro-batch two layers' four, and the two heads' one; nothing is left.
    assert queue.launched == 3 * 2 * (2 * 4 + 2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps_are_the_same_if_operands_are_left_alone(make_model):
    model, masters, queue = make_model(FEATURES, dropout=0.1).train(), [], UntilJoined()
    for each in (None, queue):
        torch._dynamo.reset()
        step = build_step(copy.deepcopy(model), execution="compile", gradient_queue=each)
        masters.append(weights_after(step, micro_batches_of(step.model, True), in_order=False))
    assert queue.launched == 3 * 2 * (2 * 4 + 2)
    assert queue.overwritten == 0
    assert torch.equal(*masters)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_overwrites_operands_unless_it_is_told_not_to(make_model, monkeypatch):
    """So the test above would notice."""
    torch._dynamo.reset()
    monkeypatch.setattr(gradient_queue, "UNCHANGED_OPERANDS", {})
    queue = UntilJoined()
    step = build_step(make_model().train(), execution="compile", gradient_queue=queue)
    step(make_micro_batches(0, (6, 4, 4), 1), 0, LR)
    assert queue.overwritten > 0


def steps_of_objectives(queue: UntilJoined | None, *, in_order: bool) -> Tensor:
    """Train a model whose decoder is the word table; return the weights."""
    tokenizer, trained = Tokenizer.train(TEXTS, 90), TrainedTasks(NAMES, (5,) * len(NAMES))
    step = build_step(model_of_objectives().train(), trained=trained, gradient_queue=queue)
    batches = [[batch_of(tokenizer, NAMES, 2 * n + m) for m in range(2)] for n in range(2)]
    return weights_after(step, batches, in_order=in_order)


def test_a_tied_decoder_comes_before_the_embeddings():
    """Both add to the word table's rows, in the order in which the backward pass reaches them."""
    expected = steps_of_objectives(None, in_order=False)
    queue = UntilJoined()
    assert torch.equal(expected, steps_of_objectives(queue, in_order=True))
    assert queue.launched > 0
    # The method sees another order.
    assert not torch.equal(expected, steps_of_objectives(UntilJoined(), in_order=False))


def test_a_backward_pass_that_fails_leaves_no_queue_open(make_model, make_batch, monkeypatch):
    model, queue = make_model().train(), UntilJoined()
    step = build_step(model, gradient_queue=queue)

    def fail(_gradient: Tensor) -> None:
        assert len(queue.operands) > 0
        raise FloatingPointError

    with monkeypatch.context() as patch:
        patch.setattr(
            model.encoder.stages()[1].module,
            "forward",
            lambda hidden, _context: hidden.register_hook(fail) and hidden,
        )
        with pytest.raises(FloatingPointError):
            step(make_batch(), 0, LR)
    assert gradient_queue._open == {}
    assert list(queue.operands) == []
    launched = queue.launched
    step(make_batch(), 1, LR)
    assert queue.launched > launched


class Exchange(NoSync):
    """Stands for one that sends gradients during the backward pass."""


def test_gradients_that_are_exchanged_are_not_queued(make_model, make_batch):
    queue = UntilJoined()
    step = build_step(
        make_model().train(), gradient_queue=queue, sync=lambda _model, _parameters: Exchange()
    )
    step(make_batch(), 0, LR)
    assert queue.launched == 0
