"""Task gradients of an accelerated model under torch.compile, and where it waits for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BertModel

from kernels import PackingCollator, TaskGradients, accelerate
from kernels.registration import validation
from kernels.task_gradients import task_layers

from ..compilations import Compilations
from ..device_waits import RecordableOnly
from .test_transformers_compile import SIZES, BertConfig, packed, padded
from .test_transformers_compile import pytestmark as marks

# Of a graph's inputs torch.compile reads `.grad`, and hides the warning unless it is an error.
pytestmark = [
    *marks,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Multitask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bert = BertModel(BertConfig(**SIZES)).train()
        accelerate(self.bert)
        self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(2))


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    torch._dynamo.reset()


def step(
    model: Multitask,
    tasks: TaskGradients,
    run: Any,
    heads: Any,
    examples: tuple[int, ...],
    tokens: list[int] | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, list[frozenset[int]]]:
    tasks.clear()
    with tasks.batch(examples, tokens):
        pooled = run(**arguments).pooler_output.split(list(examples))
        losses = []
        for k, own in enumerate(pooled):
            with tasks.task(k):
                losses.append(heads[k](own).square().mean())
    torch.autograd.backward(losses)
    return tasks.rows.clone(), [tasks.tasks_reaching(p) for p in tasks.parameters]


@pytest.mark.parametrize("make", [packed, padded])
def test_in_graphs_of_any_size(make: Any) -> None:
    """The same bits as eager; few compilations, and none for other numbers of tokens."""
    model = Multitask()
    tasks = TaskGradients(model, 2)
    compilations = Compilations()
    options: dict[str, Any] = {
        "dynamic": True,
        "backend": compilations,
        "fullgraph": make is packed,
    }
    compiled = torch.compile(model.bert, **options)
    counts = []
    sizes = [((2, 3), 20), ((4, 3), 13), ((3, 5), 9), ((2, 6), 17), ((5, 7), 23), ((3, 9), 30)]
    for examples, length in sizes:
        arguments = make(sum(examples), length)
        tokens = None
        if make is packed:
            tokens = PackingCollator.token_counts(arguments, examples)
        batch = (examples, tokens, arguments)
        found = step(model, tasks, compiled, model.heads, *batch)
        counts.append(len(compilations))
        expected = step(model, tasks, model.bert, model.heads, *batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
        assert found[1] == expected[1]
    assert counts[2] == counts[-1]
    # More than one, since sizes that are equal by chance are one to torch.compile at first.
    assert counts[-1] <= (3 if make is packed else 5)


def test_checkpointed_layers_run_eagerly() -> None:
    model = Multitask()
    # Of two names, transformers 5.17 has the second and later versions warn of it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    tasks, batch = TaskGradients(model, 2), ((2, 3), None, packed(5, 9))
    expected = step(model, tasks, model.bert, model.heads, *batch)
    getattr(model.bert, next(name for name in names if hasattr(model.bert, name)))()
    compiled = torch.compile(model.bert, dynamic=True, backend="aot_eager")
    found = step(model, tasks, compiled, model.heads, *batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert found[1] == expected[1]


def test_heads_within_task() -> None:
    model = Multitask()
    tasks = TaskGradients(model, 2)
    heads = [torch.compile(head, dynamic=True, backend="aot_eager") for head in model.heads]
    batch = ((2, 3), None, packed(5, 9))
    expected = step(model, tasks, model.bert, model.heads, *batch)
    found = step(model, tasks, model.bert, heads, *batch)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]


class Waits(TorchFunctionMode):
    """Counts the calls that on a GPU wait for the device."""

    count = 0
    reads = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.reads or func in (Tensor.nonzero, torch.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "collects", "gives_tokens", "expected"),
    [
        (padded, False, False, 1),
        (padded, True, False, 1),
        (packed, False, False, 0),
        (packed, True, True, 0),
        (packed, True, False, 1),
    ],
)
def test_waits(
    make: Any, collects: bool, gives_tokens: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (validation, task_layers):  # as on a GPU, where nothing is checked by values
        monkeypatch.setattr(module, "may_look", lambda _: False)
    model = Multitask()
    tasks = TaskGradients(model, 2)
    arguments = make(5, 9)
    tokens = PackingCollator.token_counts(arguments, (2, 3)) if gives_tokens else None
    with Waits() as waits, RecordableOnly():
        if collects:
            with tasks.batch((2, 3), tokens):
                model.bert(**arguments)
        else:
            model.bert(**arguments)
    assert waits.count == expected


def test_tokens_that_are_not_the_models_are_an_error() -> None:
    model = Multitask()
    tasks = TaskGradients(model, 2)
    arguments = packed(5, 9)
    right = PackingCollator.token_counts(arguments, (2, 3))
    wrong = [right[0] - 1, right[1] + 1]
    with (
        pytest.raises(ValueError, match="tokens: tasks of the model's"),
        tasks.batch((2, 3), wrong),
    ):
        model.bert(**arguments)
