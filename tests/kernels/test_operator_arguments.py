"""No argument ends the process, is read beyond its end, or is taken for what it is not."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels.surgery.surgery import combine_adamw_reference_

from .argument_fuzz import Case, cases
from .compile_triton import triton_modules
from .layer_cases import LAYERS
from .operator_calls import (
    NO_TENSOR_ARGUMENTS,
    REFUSED,
    layers,
    operator_calls,
    public_calls,
)

RATES = (0.9, 0.999, 1e-8, 0.1)
ROOT = Path(__file__).parents[2]
OPS = torch.ops.superbert


class Told(NamedTuple):
    """What one call of the fuzzer came to."""

    call: str
    argument: str
    kind: str
    outcome: str

    @property
    def operator(self) -> str:
        """The operator's name."""
        return self.call.split()[0]


@pytest.fixture(scope="module")
def told() -> list[Told]:
    """All that the fuzzer tried, in a process of its own."""
    command = [sys.executable, "-m", "tests.kernels.argument_fuzz"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, (lines[-1:], run.stderr[-2000:])
    return [Told(**line) for line in lines if "outcome" in line]


def of_operators(told: list[Told]) -> list[Told]:
    names = operator_calls().keys()
    return [one for one in told if one.call in names]


# Other shapes and dtypes that an argument may have, by its name or the operator's and its own.
ACCEPTED: Mapping[str, str] = {
    "seed|lr|step|scale|skip": r"shape: (a dimension|two) more",
    "lr|scale|skip": r"dtype: torch.(float32|float64|int64|bool)",
    "combine_adamw_(segments_)?.step": r"dtype: torch.(float32|float64|bool)",
    "dropout.x": r"shape: .*",
    "x|qkv|rows|out|low_precision|(weight|bias|x_bias)_rows": r"dtype: torch.(bfloat16|float16)",
    "(geglu|swiglu).x": r"shape: (empty|dimension 1 of 0)",
    "attention.q": r"shape: dimension 0 of 2[35]",
    "attention_qkvpacked.qkv": r"shape: dimension (0 of 2[35]|2 of \d+|3 of (1|15|17))",
    "relative_attention.qkv": r"shape: dimension (0 of 2[35]|3 of (1|15|17))",
    "relative_attention(_backward)?.bias": r"shape: dimension 1 of \d\d",
    "cu_seqlens": r"shape: dimension 0 of [13]",  # fewer sequences, or an empty one more
    "x": r"shape: ((a dimension|two) more|dimension 0 of \d+)",
    "weight|bias|x_bias": r"dtype: torch.(float32|float64|bfloat16|float16)",
    "(weight|bias|x_bias)_rows": r"shape: (empty|dimension \d of 0)",  # not wanted
    r"\w+ alone.(weight|bias|x_bias)_rows": r".*",  # without elements, whatever they are
    "word|position|token_type": r"shape: dimension 0 of (8|10)",
    "embedding_task_gradients_.rows": r"shape: dimension 1 of 4",
    # Tokens behind the last task, narrower and wider tables, columns that the plan does not name.
    "add_planned_gradients_.grad_output": r"shape: dimension (0 of 46|1 of [135])",
    "(add_planned_gradients|zero_planned_rows)_.buffer": r"shape: dimension 1 of 2[02]",
    "zero_planned_rows_.buffer": r"dtype: torch.(bfloat16|float16)",
    # More or wider heads; of whole tensors, or of columns that stay as they are.
    "rotary_?.x": r"shape: dimension ([123] of \d+|4 of [79])",
    "rotary.position_ids|rotary_.seqlen_offsets": r"dtype: torch.int32",
    "take_rows.x": r"shape: dimension [01] of \d",
    "take_rows.index": r"shape: (empty|dimension 0 of \d)",
    "take_rows_backward.grad": r"shape: dimension 1 of \d|dtype: torch.(bfloat16|float16)",
    "gram.rows": r"shape: dimension (0 of \d|1 of 41)|dtype: torch.float64",
    "pcgrad_weights.gram": r"dtype: torch.float64|shape: a dimension more",
    "symmetric_eigen.matrix|solve_(mgda|cagrad|fairgrad).gram": r"shape: a dimension more",
    "combine_adamw_segments_.weights": r"shape: dimension 0 of \d",
    "combine.rows": r"shape: dimension 1 of \d+",
    "dropout_add_layer_norm.rows": r"shape: dimension 1 of 961",
    # Which have no column for a bias of x.
    "(embedding_)?layer_norm.rows": r"shape: dimension 1 of (959|961)",
    "lower": r"shape: dimension 0 of \d",
    "linear_task_gradients_.(weight|bias)_rows": r"dtype: torch.float64",
    # Fewer or more rows of the result, and columns of it.
    "linear_bf16_grad_input.grad_output": r"shape: dimension 0 of \d+",
    "linear_bf16_grad_input.weight": r"shape: dimension 1 of \d",
    "linear_bf16_task_gradients_.(weight|bias)_rows": r"dtype: torch.float32",
    "note_tasks_.reached": r"shape: dimension 0 of 4",  # flags of more parameters
}


def accepts(one: Told) -> bool:
    """Whether the argument may be like that."""
    names = (one.argument, f"{one.operator}.{one.argument}", f"{one.call}.{one.argument}")
    return any(
        re.fullmatch(kind, one.kind) and any(re.fullmatch(f"({name})", each) for each in names)
        for name, kind in ACCEPTED.items()
    )


# ---- operators ----------------------------------------------------------------------------------


def test_every_operator_is_called() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("superbert::")}
    assert {name.split()[0] for name in operator_calls()} | REFUSED == registered, (
        "others() of tests/kernels/test_operators.py has an entry for each operator, its arguments"
    )


def test_valid_calls_succeed(told: list[Told]) -> None:
    assert [one for one in told if one.kind == "valid" and one.outcome != "ok"] == []


def test_exceptions_name_an_argument(told: list[Told]) -> None:
    def named(one: Told) -> bool:
        names = [a.name for a in getattr(OPS, one.operator).default._schema.arguments]
        message = one.outcome.removeprefix("raised: ")
        return "MemoryError" in message or any(name in message for name in names)

    raised = [one for one in of_operators(told) if one.outcome.startswith("raised")]
    assert [one for one in raised if not named(one)] == []
    assert len(raised) > 3000


def test_results_are_those_of_tensors_apart_and_contiguous(told: list[Told]) -> None:
    assert [one for one in of_operators(told) if one.outcome == "differs"] == []


def test_other_shapes_and_dtypes_are_refused(told: list[Told]) -> None:
    taken = [
        one
        for one in of_operators(told)
        if one.kind.startswith(("shape", "dtype")) and not one.outcome.startswith("raised")
    ]
    assert [one for one in taken if not accepts(one)] == [], (
        "the operator refuses them, or ACCEPTED of tests/kernels/test_operator_arguments.py says "
        "that they are valid"
    )


def test_freed_storages_and_other_devices_are_refused(told: list[Told]) -> None:
    calls = operator_calls()

    def has_others(one: Told) -> bool:
        return sum(isinstance(x, Tensor) for x in calls[one.call]) > 1

    wrong = [
        one
        for one in of_operators(told)
        if one.kind.startswith(("freed", "cut")) or (one.kind == "device: meta" and has_others(one))
    ]
    assert [one for one in wrong if not one.outcome.startswith("raised")] == []
    assert len(wrong) > 300


@pytest.mark.parametrize("step", [0, -1, torch.nan])
def test_adamw_counts_steps_from_one(step: float) -> None:
    state = [torch.ones(5) for _ in range(3)]
    given = (torch.ones(2, 5), torch.ones(2), *state)
    with pytest.raises(ValueError, match="step must be at least 1"):
        kernels.combine_adamw_(*given, lr=0.1, step=torch.tensor(step))
    skip = torch.tensor(True)
    kernels.combine_adamw_(*given, lr=0.1, step=torch.tensor(step), skip=skip)
    combine_adamw_reference_(
        *given, None, torch.tensor(0.1), torch.tensor(step), None, None, *RATES
    )
    assert all(torch.equal(x, torch.ones(5)) for x in state)


@pytest.mark.parametrize("shift", [0, 1, 40, 41, 119])
def test_a_combination_must_not_overlap_the_rows(shift: int) -> None:
    memory, weights = torch.randn(3 * 40 + 80), torch.ones(3)
    rows = memory[: 3 * 40].view(3, 40)
    with pytest.raises(ValueError, match="out: written, and so must not overlap rows"):
        kernels.combine(rows, weights, memory[shift : shift + 40])
    neighbour = memory[120:160]
    expected = kernels.combine(rows, weights)
    assert torch.equal(kernels.combine(rows, weights, neighbour), expected)


def test_columns_of_one_buffer_are_apart() -> None:
    buffer, weights = torch.randn(3, 80), torch.ones(3)
    expected = kernels.combine(buffer[:, 40:], weights)
    assert torch.equal(kernels.combine(buffer[:, 40:], weights, buffer[1, :40]), expected)


# ---- public functions, and hooks ----------------------------------------------------------------


def test_every_public_function_is_called() -> None:
    called = {re.split(r"[ .]", name)[0] for name in public_calls()}
    assert called - {"balancing"} == set(kernels.__all__) - NO_TENSOR_ARGUMENTS, (
        "tests/kernels/operator_calls.py has a call of each public function, of a layer in layers()"
    )


def test_every_layer_runs_on_a_stream() -> None:
    called = {re.split(r"[ .]", name)[0] for name in layers(torch.float32)}
    assert called - {"zero_rows_"} == {name.split()[0] for name in LAYERS}, (
        "LAYERS of tests/kernels/layer_cases.py has an entry for each function in layers() of "
        "tests/kernels/operator_calls.py"
    )


def test_public_functions_refuse_freed_storages(told: list[Told]) -> None:
    freed = [one for one in told if one.call.startswith("kernels.") and "freed" in one.kind]
    reading = [one for one in freed if one.call != "kernels.new_task_rows"]  # a shape will do

    def named(one: Told) -> bool:
        # An operator that a function calls may have another name for it: x for x0.
        return f"Error: {one.argument.rstrip('0')}" in one.outcome.replace("rows.buffer", "buffer")

    assert [one for one in reading if not named(one)] == []
    assert len(freed) > 140


# Saved tensors of which a backward pass may take other shapes or dtypes, since it reads their
# numbers, or their shapes alone.
HARMLESS = r"a dimension more|two more|torch.float16|torch.float64|freed|meta|dimension 0 of [12]"


def test_hooks_on_saved_tensors_end_in_exceptions(told: list[Told]) -> None:
    hooked = [one for one in told if one.argument.startswith("saved tensor")]
    taken = [one for one in hooked if one.outcome == "ok" and one.kind != "valid"]
    assert [one for one in taken if not re.fullmatch(HARMLESS, one.kind)] == []
    assert len(hooked) > 1000


# ---- operators whose CUDA side is Python --------------------------------------------------------


class LaunchedError(Exception):
    """Raised in place of a launch."""


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an exception in the place of every launcher: the functions of modules ``*_triton``."""

    def launch(*_: Any, **__: Any) -> None:
        raise LaunchedError

    for module in triton_modules():
        for name, function in list(vars(module).items()):
            is_own = isinstance(function, FunctionType) and function.__module__ == module.__name__
            if is_own and not name.startswith("_"):
                monkeypatch.setattr(module, name, launch)


def _is_triton(name: str) -> bool:
    try:
        return kernels.backend(name, "cuda") == "triton"
    except ValueError:
        return False


CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
LAUNCHED_FROM_PYTHON = sorted(
    name for name in operator_calls() if " " not in name and _is_triton(name)
)
# What a GPU is not asked for, since looking would wait for it, and what a forward pass there only
# hands on to its backward pass.
UNSEEN = r"expected (to start|ascending|to end within)|<= index <|^(rows|columns|offsets):"


def refusal(function: Callable[..., Any], case: Case) -> str | None:
    """The message of the exception that a call raises."""
    try:
        function(*(x.detach() if isinstance(x, Tensor) else x for x in case.arguments))
    except LaunchedError:
        return None
    except Exception as error:
        return str(error)
    return None


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", LAUNCHED_FROM_PYTHON)
def test_what_the_cpu_refuses_is_not_launched(name: str) -> None:
    operator = getattr(OPS, name).default
    names = [argument.name for argument in operator._schema.arguments]
    arguments = list(operator_calls()[name])
    disagreed, refused = [], 0
    for case in cases(names, arguments):
        on_cpu = refusal(operator, case)
        if case.kind.startswith("overlap") or (on_cpu and re.search(UNSEEN, on_cpu)):
            continue
        on_cuda = refusal(partial(operator.redispatch, CUDA), case)
        refused += on_cuda is not None
        if (on_cuda is None) != (on_cpu is None):
            disagreed.append((case.argument, case.kind, on_cpu, on_cuda))
    assert disagreed == []
    assert refused > 10 * sum(isinstance(x, Tensor) for x in arguments)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("name", LAUNCHED_FROM_PYTHON)
def test_launches_on_the_device_of_the_first_argument(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_within = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        try:
            yield
        except LaunchedError:
            launched_within.append(index)
            raise

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Tensor, "get_device", Tensor.data_ptr)  # each on a device of its own
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in operator_calls()[name]]
    with pytest.raises(LaunchedError):
        getattr(OPS, name).default.redispatch(CUDA, *arguments)
    assert launched_within == [arguments[0].data_ptr()], (
        "register_cuda() registers what launches kernels from Python"
    )
