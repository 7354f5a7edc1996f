"""Operators and public layers called with one, two or three wrong arguments, each in a child.

Tensors end where a page ends that nobody may touch, so that what reads or writes behind one dies of
it.  An exception is right, and so is a result; a signal is not.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import balancing

from ..kernels.balancing.methods import SOLVERS
from ..kernels.layer_cases import LAYERS, Stream
from ..kernels.test_operators import SAMPLES
from ..kernels.test_surgery_weights import operator_samples
from .base import Base
from .cases import Case, Tried, try_cases
from .checks import outcome_of, problems_of_end
from .children import call
from .wrong_arguments import corrupted, guarded

Call = tuple[str, Callable[..., object], Sequence[Any]]
"""Name, what is called, and arguments that are right."""

_OPS = torch.ops.superbert
_CALLS = 20
"""Calls in a child."""


_OF_TORCH = ("linear", "feed_forward", "feed_forward by task", "embedding")
"""Layers with a backward pass of torch's, which looks at nothing; so are all in float64."""


def try_operators(
    _base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` children with some calls each: :func:`.try_cases`."""
    found = try_cases("operators", folder, _attempt, count, seed, only)
    return found | {"calls": _CALLS * found["cases"]}


def _attempt(case: Case) -> Tried:
    work = _layers if case.draw.random() < 0.4 else _operators
    notes = case.folder / "call"  # written before each call: a crash tells nothing
    seed = case.draw.getrandbits(64)
    ended = call(partial(work, random.Random(seed), notes), case.folder, seconds=60.0)
    what = notes.read_text() if notes.exists() else work.__name__
    return Tried(what, outcome_of(ended), list(problems_of_end(ended)), ended.last_line)


def _operators(draw: random.Random, notes: Path) -> None:
    torch.manual_seed(draw.getrandbits(31))
    calls = [*_operator_calls(), *_function_calls()]
    for _ in range(_CALLS):
        name, function, arguments = draw.choice(calls)
        wrong = list(arguments)
        chosen = draw.sample(range(len(wrong)), min(len(wrong), draw.choice([1, 1, 2, 2, 3])))
        said = []
        for place in chosen:
            wrong[place], how = corrupted(wrong[place], draw)
            said.append(f"{place} {how}")
        wrong = [guarded(value) if draw.random() < 0.7 else value for value in wrong]
        notes.write_text(f"{name}: {'; '.join(said)}")
        _run(partial(function, *wrong))


def _operator_calls() -> Iterator[Call]:
    """Yield every operator with arguments that are right."""
    made = [make() for make in SAMPLES.values()]
    solvers = {name: (torch.eye(4).double(), *rest) for name, rest in SOLVERS.items()}
    for samples in (*made, operator_samples(), solvers):
        for name, arguments in samples.items():
            yield name, getattr(_OPS, name).default, arguments


def _function_calls() -> Iterator[Call]:
    """Yield the public functions that are no layers."""
    rows, weights, one = torch.randn(3, 40), torch.ones(3), torch.tensor(1.0)
    gram, state = rows @ rows.T, [torch.zeros(40) for _ in range(3)]
    order, third = kernels.draw_order(3, 1), torch.ones(3) / 3
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    arguments = {
        "gram": (rows, [0, 10, 40]),
        "draw_order": (3, torch.tensor(1), torch.tensor(0)),
        "pcgrad_weights": (gram, order, None, "sum", False),
        "combine": (rows, weights, torch.zeros(40)),
        "update_guard": (gram, weights),
        "update_summary": (gram[None], weights[None], weights, torch.ones(1)),
        "check_cu_seqlens": ("x", torch.tensor([0, 3, 5], dtype=torch.int32), 5),
        "unpad_input": (hidden, mask, None),
        "pad_input": (hidden.flatten(0, 1), torch.arange(10), 2, 5),
    }
    for name, given in arguments.items():
        yield name, getattr(kernels, name), given
    settings = {"lr": 1e-3, "step": torch.tensor(1)}
    yield "combine_adamw_", partial(kernels.combine_adamw_, **settings), (rows, weights, *state)
    segments = {"ends": (10, 40), "groups": (0, -1)}
    update = partial(kernels.combine_adamw_segments_, **settings, **segments)
    yield "combine_adamw_segments_", update, (rows, weights, *state)
    yield "lamb_update_", partial(kernels.lamb_update_, **settings), (*state, [0, 10, 40])
    methods = {
        **dict.fromkeys(("sum", "mean", "mgda", "imtl_g", "dual_projection", "upgrad"), ()),
        **{"main_aux": (0, 0.3), "cagrad": (0.5,), "nash_mtl": (1.0,), "fairgrad": (1.0,)},
        **{"config": (third,), "aligned_mtl": (third, "min"), "krum": (0, 1)},
        **{"gradvac": (order, torch.zeros(3, 3), 0.5), "gradnorm": (weights, one.expand(3))},
        "proportional": (torch.tensor([3, 4, 5]),),
        **dict.fromkeys(("gls", "db_mtl", "uw", "dwa", "imtl_l", "imtl", "stch", "famo"), (third,)),
        "rlw": (torch.tensor(1), torch.tensor(0)),
    }
    for name, rest in methods.items():
        yield f"balancing.{name}", getattr(balancing, name), (gram, *rest)


def _layers(draw: random.Random, notes: Path) -> None:
    torch.manual_seed(draw.getrandbits(31))
    for _ in range(_CALLS):
        name = draw.choice(list(LAYERS))
        stream = Stream.of(21)
        fields = draw.sample(
            [
                "x",
                "ids",
                "cu_seqlens",
                "longest",
                "seed",
                "weight",
                "bias",
                "matrix",
                "table",
                "buffer",
                "columns",
            ],
            draw.choice([0, 1, 1, 2]),
        )
        said = []
        changed = {}
        for field in fields:
            changed[field], how = corrupted(getattr(stream, field), draw)
            said.append(f"{field} {how}")
        stream = stream._replace(**changed)
        of_torch = name in _OF_TORCH or any(
            isinstance(part, Tensor) and part.dtype == torch.float64 for part in stream
        )
        late = "" if of_torch else draw.choice(["", "", "freed", "hooks"])
        notes.write_text(f"{name}: {'; '.join(said)} {late and f'{late} before backward'}")
        _run(partial(_forward_backward, LAYERS[name], stream, late, draw))


def _forward_backward(
    layer: Callable[[Stream], Tensor], stream: Stream, late: str, draw: random.Random
) -> None:
    """Call a layer and its backward, with storages freed or saved tensors changed between."""

    def unpack(saved: Tensor) -> Tensor:
        return corrupted(saved, draw)[0] if draw.random() < 0.5 else saved

    if late == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            out = layer(stream)
    else:
        out = layer(stream)
    if late == "freed":
        for leaf in draw.sample(
            [stream.x, stream.weight, stream.table, stream.buffer, stream.ids], 2
        ):
            if isinstance(leaf, Tensor):
                leaf.untyped_storage().resize_(0)
    out.float().square().sum().backward()


def _run(work: Callable[[], object]) -> None:
    """Call it; whatever it raises is an answer."""
    with contextlib.suppress(Exception):
        work()
