"""Layers of any kind within `task(k)`: autograd's gradient of a task is the task's row."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointError, checkpoint

from kernels import FusedLayerNorm, PCGrad, TaskGradients, dropout_add_layer_norm

from .test_task_gradients import SIZES, assert_equals_k_passes

LENGTH, WIDTH = 7, 8
INPUT = torch.randn(sum(SIZES), LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))


class Use(nn.Module):
    """A module, or parameters, and what is done with them: ``[B, 7, 8]`` to any shape."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def parameters(*shapes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.randn(shape) / 2) for shape in shapes])


def ids(x: Tensor) -> Tensor:
    return torch.arange(len(x) * LENGTH).view(-1, LENGTH) % 20


class Product(torch.autograd.Function):
    """An autograd function of a user's own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, (x.transpose(1, 2) @ grad).sum(0)


def step_by_step(cell: nn.LSTMCell, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = cell(step, state)
    return state[0]


def post_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return dropout_add_layer_norm(x, x.flip(1), norm.weight, norm.bias)


def pooled(query: nn.ParameterList, x: Tensor) -> Tensor:
    return ((x @ query[0]).softmax(1)[..., None] * x).sum(1)


def with_first_token(token: nn.ParameterList, x: Tensor) -> Tensor:
    return torch.cat([token[0].expand(len(x), 1, -1), x], 1)


def first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def channels(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(1, 2))


def itself(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


# What is within `task`: a function that makes the module, and one that calls it.
USES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "scale": (lambda: parameters(()), lambda p, x: x * p[0]),
    "pooling": (lambda: parameters((WIDTH,)), pooled),
    "token": (lambda: parameters((1, WIDTH)), with_first_token),
    "stack": (lambda: parameters((WIDTH,), (WIDTH,)), lambda p, x: x @ torch.stack([*p], 1)),
    "einsum": (lambda: parameters((WIDTH, 3)), lambda p, x: torch.einsum("bsi,io->bso", x, p[0])),
    "transposed": (lambda: parameters((3, WIDTH)), lambda p, x: x @ p[0].T + p[0].mT.sum()),
    "penalty": (lambda: parameters((3, WIDTH)), lambda p, x: x.mean() + p[0].norm()),
    "twice": (
        lambda: parameters((WIDTH, WIDTH)),
        lambda p, x: F.linear(torch.tanh(F.linear(x, p[0]) @ p[0]), p[0].T) * p[0].mean(),
    ),
    "own function": (
        lambda: parameters((WIDTH, 3)),
        lambda p, x: Product.apply(x, p[0].view_as(p[0])),
    ),
    "vector": (lambda: nn.Linear(WIDTH, 3), lambda layer, x: layer(x.mean((0, 1)))),
    "one index": (lambda: nn.Embedding(20, WIDTH), lambda e, x: x + e(torch.tensor(3))),
    "lstm": (lambda: nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True), first),
    "gru": (lambda: nn.GRU(WIDTH, 5), first),
    "rnn": (lambda: nn.RNN(WIDTH, 5), first),
    "lstm cell": (lambda: nn.LSTMCell(WIDTH, 5), step_by_step),
    "conv": (lambda: nn.Conv1d(WIDTH, 4, 3), channels),
    "transposed conv": (lambda: nn.ConvTranspose1d(WIDTH, 4, 3), channels),
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda layer, x: layer(x, x, x, need_weights=False)[0],
    ),
    "attention with weights": (
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=WIDTH, vdim=WIDTH, add_bias_kv=True),
        lambda layer, x: torch.cat([part.flatten() for part in layer(x, x.flip(0), x)]),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True),
        itself,
    ),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), itself),
    "batch norm": (lambda: nn.BatchNorm1d(WIDTH), channels),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), channels),
    "norm of two dimensions": (lambda: nn.LayerNorm((LENGTH, WIDTH)), itself),
    "norm": (lambda: nn.LayerNorm(WIDTH), itself),
    "fused norm": (lambda: FusedLayerNorm(WIDTH), itself),
    "post-norm": (lambda: nn.LayerNorm(WIDTH), post_norm),
    "prelu": (lambda: nn.PReLU(), itself),
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, 3), lambda layer, x: layer(x, x.flip(1))),
    "bag": (lambda: nn.EmbeddingBag(20, WIDTH), lambda e, x: x.mean(1) + e(ids(x))),
    "max_norm": (lambda: nn.Embedding(20, WIDTH, max_norm=1.0), lambda e, x: x + e(ids(x))),
    "max_norm bag": (
        lambda: nn.EmbeddingBag(20, WIDTH, max_norm=1.0),
        lambda e, x: x.mean(1) + e(ids(x)),
    ),
    "frequency": (
        lambda: nn.Embedding(20, WIDTH, scale_grad_by_freq=True),
        lambda e, x: x + e(ids(x)),
    ),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 3)), itself),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, 3)).eval(), itself),
}


class Multitask(nn.Module):
    """A layer on the joined batch, one that each task uses twice by itself, and one of a task."""

    def __init__(self, use: str) -> None:
        super().__init__()
        make, call = USES[use]
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.shared, self.own = Use(make(), call), Use(make(), call)

    def losses(self, collector: TaskGradients | None = None, apply: Any = None) -> list[Tensor]:
        run = apply or (lambda layer, x: layer(x))
        with nullcontext() if collector is None else collector.batch(SIZES):
            hidden = self.embed(INPUT.to(self.embed.weight.dtype))
            losses = []
            for task, x in enumerate(hidden.split(SIZES)):
                with nullcontext() if collector is None else collector.task(task):
                    out = run(self.shared, x).square().mean()
                    out = out + run(self.shared, 2 * x).sin().mean()
                    losses.append(out + run(self.own, x).cos().mean() if task == 1 else out)
        return losses


def losses_of(model: Multitask, collector: TaskGradients | None = None) -> list[Tensor]:
    return model.losses(collector)


def test_every_use_computes_a_differentiable_result() -> None:
    for use in USES:
        torch.manual_seed(0)
        assert all(loss.requires_grad for loss in Multitask(use).losses()), use


@pytest.mark.parametrize("use", USES)
def test_rows_equal_k_backward_passes(use: str) -> None:
    torch.manual_seed(0)
    model = Multitask(use)
    buffers = copy.deepcopy(model)
    for _ in range(2):  # once by assert_equals_k_passes without a collector, once with it
        buffers.losses()
    collector = assert_equals_k_passes(model, losses_of)
    for parameter in model.own.parameters():
        assert collector.tasks_reaching(parameter) == {1}
    for parameter in model.shared.parameters():
        assert collector.tasks_reaching(parameter) == {0, 1, 2}
    for (name, buffer), expected in zip(model.named_buffers(), buffers.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


@pytest.mark.parametrize("use", [use for use in USES if len(list(USES[use][0]().parameters())) > 1])
def test_frozen_parameters(use: str) -> None:
    torch.manual_seed(0)
    for start in (0, 1):
        model = Multitask(use)
        for layer in (model.shared, model.own):
            for parameter in list(layer.parameters())[start::2]:
                parameter.requires_grad_(False)
        collector = assert_equals_k_passes(model, losses_of)
        assert len(collector.parameters) < len(list(model.parameters()))


# Torch's own product and bilinear layer take no bfloat16 beside float32, and its RMS norm warns.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("use", [use for use in USES if use not in ("own function", "bilinear")])
def test_under_autocast(use: str) -> None:
    def losses(model: Multitask, collector: TaskGradients | None = None) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return model.losses(collector)

    torch.manual_seed(0)
    assert_equals_k_passes(Multitask(use), losses)


@pytest.mark.parametrize("use", ["lstm", "attention", "batch norm", "scale"])
def test_micro_batches_and_pcgrad(use: str) -> None:
    torch.manual_seed(0)
    model = Multitask(use).double()
    plain = copy.deepcopy(model)
    collector = TaskGradients(model, 3)
    one_pass = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    k_passes = PCGrad(torch.optim.SGD(plain.parameters(), lr=0.1))
    for _ in range(2):
        one_pass.zero_grad()
        k_passes.zero_grad()
        for _ in range(2):
            one_pass.pc_backward(model.losses(collector))
            k_passes.pc_backward(plain.losses())
        torch.testing.assert_close(one_pass.gram, k_passes.gram)
        one_pass.step()
        k_passes.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_parameter_of_the_batch_and_of_a_task() -> None:
    """One weight, used by a linear layer on all tasks and by a product in task 2."""
    model = nn.Linear(WIDTH, WIDTH)

    def losses(model: nn.Linear, collector: TaskGradients | None = None) -> list[Tensor]:
        with nullcontext() if collector is None else collector.batch(SIZES):
            parts = list(model(INPUT.to(model.weight.dtype)).split(SIZES))
            with nullcontext() if collector is None else collector.task(2):
                parts[2] = parts[2] @ model.weight + model.bias
        return [part.square().mean() for part in parts]

    assert_equals_k_passes(model, losses)


@pytest.mark.parametrize("use", ["lstm", "conv", "scale"])
def test_activation_checkpointing(use: str) -> None:
    model = Multitask(use)
    collectors = [TaskGradients(model, 3) for _ in range(3)]
    torch.autograd.backward(model.losses(collectors[0]))
    again = partial(checkpoint, use_reentrant=False)
    contexts = {"context_fn": collectors[1].checkpoint_contexts}
    torch.autograd.backward(model.losses(collectors[1], partial(again, **contexts)))
    torch.testing.assert_close(collectors[1].rows, collectors[0].rows)
    with pytest.raises(CheckpointError):
        torch.autograd.backward(model.losses(collectors[2], again))


def test_penalty_on_the_gradient_of_an_input() -> None:
    model = Multitask("conv")

    def losses(model: Multitask, collector: TaskGradients | None = None) -> list[Tensor]:
        losses = []
        for task, part in enumerate(INPUT.split(SIZES)):
            x = part.to(model.embed.weight.dtype).requires_grad_()
            with nullcontext() if collector is None else collector.task(task):
                out = model.shared(x).square().mean()
                (gradient,) = torch.autograd.grad(out, x, create_graph=True)
                losses.append(out + gradient.square().sum())
        return losses

    assert_equals_k_passes(model, losses)


def test_what_concerns_a_parameter_as_an_object() -> None:
    layer = nn.Conv1d(WIDTH, 4, 3)
    collector = TaskGradients(layer, 2)
    seen: list[Tensor] = []
    with collector.task(1):
        copied = copy.deepcopy(layer)
        layer.weight.register_hook(seen.append)
        assert layer.weight.is_leaf
        assert layer.weight.grad is None
        layer.weight.grad = torch.ones_like(layer.weight)
        assert layer.weight.grad.sum() == layer.weight.numel()
        layer.weight.grad = None
        with pytest.raises(RuntimeError, match=r"in-?place"):
            layer.weight.mul_(2)
        with torch.no_grad():
            layer.weight.mul_(2)
    assert torch.equal(layer.weight, 2 * copied.weight)
    collector.clear()
    layer.weight.sum().backward()  # outside, ordinary training: the hook is the parameter's
    assert len(seen) == 1


def test_an_autograd_function_of_ones_own_is_named() -> None:
    weight = nn.ParameterDict({"weight": nn.Parameter(torch.ones(WIDTH, 3))})
    collector = TaskGradients(weight, 2)
    with collector.task(0):
        out = Product.apply(INPUT, weight["weight"])
    with pytest.raises(RuntimeError, match=r"weight: .*view_as\(parameter\)` within `task`"):
        out.sum().backward()


@pytest.mark.parametrize(
    "use", [use for use in USES if use not in ("norm", "rms norm", "fused norm", "post-norm")]
)
def test_on_all_tasks_refused_by_name(use: str) -> None:
    torch.manual_seed(0)
    model = Multitask(use)
    before = copy.deepcopy(model.state_dict())
    collector = TaskGradients(model, 3)
    if use in ("vector", "one index"):
        expected, message = ValueError, "expected 9 examples|an index of one"
    else:
        expected, message = NotImplementedError, r"shared.* used by .*within `task\(k\)` any layer"
    with pytest.raises(expected, match=message), collector.batch(SIZES):
        model.shared(model.embed(INPUT))
    if use == "max_norm":
        torch.testing.assert_close(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", ["lstm", "conv", "scale", "attention"])
def test_compiled(use: str) -> None:
    torch.manual_seed(0)
    model = Multitask(use)
    expected = TaskGradients(model, 3)
    torch.autograd.backward(model.losses(expected))
    found = TaskGradients(model, 3)
    compiled = torch.compile(lambda layer, x: layer(x), backend="aot_eager")
    torch.autograd.backward(model.losses(found, compiled))
    torch.testing.assert_close(found.rows, expected.rows)
    assert found.tasks_reaching(next(model.shared.parameters())) == {0, 1, 2}
