"""Calls operators with arguments that are wrong in every way of a list; a process of its own.

``python -m tests.kernels.argument_fuzz`` prints one JSON line before each call, since the
call may be the process's last, and one with its outcome after.  Every tensor lies against a page
that may be neither read nor written, so that a step beyond its end, or before its beginning, ends
the process.
"""

import ctypes
import json
import math
import mmap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPS = torch.ops.superbert
INTS = (-1, 0, 2**31, 2**62, -(2**63))
FLOATS = (-1.0, 0.0, 1.0, math.nan, math.inf, -math.inf)
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
)


class Case(NamedTuple):
    """One call.

    Attributes:
        kind: of what is wrong.
        argument: whose name the exception is to have.
        arguments: of the call.
    """

    kind: str
    argument: str
    arguments: list[Any]


# ---- memory -------------------------------------------------------------------------------------

_numbers = count()
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor, at_end: bool | None = None) -> Tensor:
    """A contiguous copy that ends where forbidden memory begins, or begins where it ends.

    Without a choice, the calls take turns.
    """
    if x.numel() == 0 or x.device.type == "meta":
        return x.clone(memory_format=torch.contiguous_format)
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        place = ctypes.c_void_p(start + page * mmap.PAGESIZE)
        assert _libc.mprotect(place, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    if at_end is None:
        at_end = next(_numbers) % 2 == 0
    offset = mmap.PAGESIZE * (pages + 1) - size if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return copy.view(x.shape).copy_(x).requires_grad_(x.requires_grad)


# ---- what may be wrong --------------------------------------------------------------------------


def freed(x: Tensor, kept: int = 0) -> Tensor:
    """The tensor after somebody took its memory away, but for some bytes."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    x.untyped_storage().resize_(kept)
    return x


def reshaped(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other shapes; the values are those of x, over and over."""
    shapes = {"empty": [0], "a dimension more": [1, *x.shape], "two more": [1, 1, *x.shape]}
    for fewer in range(x.dim()):
        shapes[f"{x.dim() - fewer} dimensions fewer"] = list(x.shape[:fewer])
    for d, size in enumerate(x.shape):
        for wrong in {0, 1, size - 1, size + 1} - {size}:
            shapes[f"dimension {d} of {wrong}"] = [*x.shape[:d], wrong, *x.shape[d + 1 :]]
    flat = x.detach().reshape(-1)
    for kind, shape in shapes.items():
        wanted = math.prod(shape)
        if flat.numel() or not wanted:
            repeated = flat.repeat(-(-wanted // max(1, flat.numel())))[:wanted]
            yield kind, repeated.view(shape)


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, or those of the first row, with other strides."""
    if x.numel() > 1:
        yield "every other element", torch.stack([x, x], -1).detach()[..., 0]
    if x.dim() > 1:
        yield "transposed", x.detach().mT.contiguous().mT
    for d in range(x.dim()):
        if x.shape[d] > 1:
            yield f"dimension {d} expanded", x.detach().narrow(d, 0, 1).expand(x.shape)


def freed_all_ways(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Without memory: contiguous, and with the strides of what torch copies to work on."""
    if x.numel():
        yield "freed", freed(x)
        for kind, view in list(strided(x.detach().clone())):
            view.untyped_storage().resize_(0)
            yield f"freed: {kind}", view.requires_grad_(x.requires_grad)


def valued(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other values at the two ends."""
    wrong = INTS if not x.is_floating_point() else (math.nan, math.inf, 0.0, -1.0)
    for value in wrong if x.dtype != torch.bool else ():
        for place in {0, x.numel() - 1} if x.numel() else ():
            changed = x.detach().clone(memory_format=torch.contiguous_format)
            low, high = (-(2**31), 2**31 - 1) if x.dtype == torch.int32 else (-(2**63), 2**63 - 1)
            number = value if x.is_floating_point() else min(max(value, low), high)
            changed.view(-1)[place] = number
            yield f"{value} at {place}", changed


def inside(x: Tensor, like: Tensor) -> Tensor | None:
    """A tensor like ``like`` in the memory of x, if that suffices."""
    held, wanted = x.numel() * x.element_size(), like.numel() * like.element_size()
    if not 0 < wanted <= held or not x.is_contiguous():
        return None
    return x.detach().view(-1).view(torch.uint8)[:wanted].view(like.dtype).view(like.shape)


def wrong_numbers(value: Any) -> Iterator[tuple[str, Any]]:
    """Other numbers and lists of numbers."""
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, int):
        yield from ((str(wrong), wrong) for wrong in INTS)
    elif isinstance(value, float):
        yield from ((str(wrong), wrong) for wrong in FLOATS)
    elif isinstance(value, list):
        lists = [[], value[:-1], [*value, value[-1] if value else 0], value[::-1]]
        for place in range(len(value)):
            lists += [[*value[:place], wrong, *value[place + 1 :]] for wrong in INTS]
        yield from ((str(wrong), wrong) for wrong in lists if wrong != value)


def cases(names: list[str], arguments: list[Any]) -> Iterator[Case]:
    """A valid call, and every one with a single wrong argument."""

    def fresh() -> list[Any]:
        return [guarded(x) if isinstance(x, Tensor) else x for x in arguments]

    yield Case("valid", "", fresh())
    for i, (name, value) in enumerate(zip(names, arguments, strict=True)):

        def case(kind: str, wrong: Any, i: int = i, name: str = name) -> Case:
            given = fresh()
            given[i] = wrong
            return Case(kind, name, given)

        if not isinstance(value, Tensor):
            yield from (case(kind, wrong) for kind, wrong in wrong_numbers(value))
            continue
        yield from (case(kind, wrong) for kind, wrong in freed_all_ways(value))
        if value.numel():
            bytes_held = value.numel() * value.element_size()
            yield case("cut", freed(value, bytes_held - value.element_size()))
        for kind, wrong in reshaped(value):
            yield case(f"shape: {kind}", guarded(wrong))
        for dtype in DTYPES:
            if dtype != value.dtype:
                yield case(f"dtype: {dtype}", guarded(value.detach().to(dtype)))
        yield from (case(f"strides: {kind}", wrong) for kind, wrong in strided(value))
        yield from (case(f"values: {kind}", guarded(wrong)) for kind, wrong in valued(value))
        yield case("device: meta", value.detach().to("meta"))
        for j, other in enumerate(arguments):
            if j != i and isinstance(other, Tensor):
                given = fresh()
                shared = inside(given[j], value)
                if shared is not None:
                    given[i] = shared
                    yield Case(f"overlap: {names[j]}", name, given)


# ---- the calls ----------------------------------------------------------------------------------


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of an operator's result."""
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if isinstance(x, Tensor)]


def call(operator: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """All that a call leaves: its results, the tensors that it was given, and their gradients."""
    outputs = tensors_of(operator(*arguments))
    given = [x for x in arguments if isinstance(x, Tensor)]
    leaves = [x for x in given if x.requires_grad]
    grads: list[Tensor] = []
    if leaves and outputs and outputs[0].requires_grad:
        loss = outputs[0].float().square().sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [grad for grad in found if grad is not None]
    return [x.detach().clone() for x in (*outputs, *given, *grads)]


def apart(arguments: list[Any]) -> list[Any]:
    """The same values, each tensor by itself and contiguous."""
    return [
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor)
        else x
        for x in arguments
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two calls left the same, but for the order in which torch's products add up."""
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def outcome(operator: Callable[..., Any], case: Case) -> str:
    """``raised: …``, or ``ok`` where tensors apart and contiguous give the same, or ``differs``."""
    without_values = case.kind.startswith(("freed", "cut", "device"))
    expected = None if without_values else apart(case.arguments)
    try:
        result = call(operator, case.arguments)
    except Exception as error:
        return f"raised: {type(error).__name__}: {error}"
    if expected is None:
        return "took it"
    return "ok" if same(result, call(operator, expected)) else "differs"


def told(name: str, case: Case, run: Callable[[], str]) -> None:
    """Print what is called, and what came of it."""
    line = {"call": name, "argument": case.argument, "kind": case.kind}
    print(json.dumps(line), flush=True)
    print(json.dumps({**line, "outcome": run()}), flush=True)


def fuzz_operators() -> None:
    """Every operator, with every argument wrong in turn."""
    from .operator_calls import operator_calls

    for name, arguments in operator_calls().items():
        operator = getattr(OPS, name.split()[0]).default
        names = [argument.name for argument in operator._schema.arguments]
        for case in cases(names, list(arguments)):
            told(name, case, partial(outcome, operator, case))


def fuzz_functions() -> None:
    """Every public function, with every tensor freed in turn."""
    from .operator_calls import public_calls

    for name, (function, arguments) in public_calls().items():
        told(f"kernels.{name}", Case("valid", "", []), partial(attempt, function, arguments))
        for argument, value in arguments.items():
            for kind, wrong in freed_all_ways(value) if isinstance(value, Tensor) else ():
                case = Case(kind, argument, [])
                run = partial(attempt, function, {**arguments, argument: wrong})
                told(f"kernels.{name}", case, run)


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """What comes of a call."""
    try:
        function(**arguments)
    except Exception as error:
        return f"raised: {type(error).__name__}: {error}"
    return "ok"


def changed(x: Tensor, *, of_torch: bool) -> Iterator[tuple[str, Tensor]]:
    """What a hook may make of a saved tensor; torch's own functions crash on freed ones."""
    if not of_torch:
        yield from freed_all_ways(x.detach())
    if not of_torch and x.is_floating_point():
        negative = torch._neg_view(x.detach().clone())
        negative.untyped_storage().resize_(0)
        yield "freed: negative", negative
    yield from reshaped(x)
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool):
        if dtype != x.dtype:
            yield str(dtype), x.detach().to(dtype)
    yield "meta", x.detach().to("meta")


def saved_by(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What a forward pass saves for its backward pass."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return saved


OF_TORCH = ("linear", "embedding")
"""Layers whose backward pass is torch's where there are no task rows."""


def fuzz_hooks() -> None:
    """Every layer's backward pass, with every saved tensor changed in turn."""
    from .operator_calls import backward_calls

    for name, forward in backward_calls().items():
        for number, tensor in enumerate(saved_by(forward)):
            for kind, wrong in [("valid", tensor), *changed(tensor, of_torch=name in OF_TORCH)]:
                case = Case(kind, f"saved tensor {number} of {list(tensor.shape)}", [])
                told(f"backward of {name}", case, partial(backward_with, forward, number, wrong))


def backward_with(forward: Callable[[], Tensor], number: int, wrong: Tensor) -> str:
    """A backward pass that gets ``wrong`` for one of the saved tensors."""
    numbers = count()

    def pack(x: Tensor) -> Any:
        return wrong if next(numbers) == number else x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    return attempt(lambda: out.float().sum().backward(), {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    fuzz_operators()
    fuzz_functions()
    fuzz_hooks()
