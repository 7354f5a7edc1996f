"""Nanoseconds of a call of each operator, for one library: what :mod:`.argument_checks` runs.

A module of its own, since whatever imports this project's operators can load no other's.
"""

import sys
import timeit
from collections.abc import Callable

import torch

from engine.utils.json_text import dump_json

CALLS, REPEATS = 1_000, 15


def calls() -> dict[str, Callable[[], object]]:
    """Return calls of operators on their smallest inputs."""
    ops = torch.ops.superbert
    rows, weights, seed = torch.randn(2, 4), torch.ones(2), torch.tensor(1)
    vector, state = torch.zeros(4), [torch.zeros(4) for _ in range(3)]
    cu_seqlens, q = torch.tensor([0, 1], dtype=torch.int32), torch.randn(1, 1, 4)
    ids, table = torch.zeros(1, dtype=torch.int64), torch.randn(2, 4)
    numbers = (torch.tensor(0.1), seed, None, None, 0.9, 0.999, 1e-8, 0.0)
    by_all = (None, [], [], False)
    flags = [False for _ in ops.layer_norm.default._schema.arguments[8:]]
    norm = (vector, vector, 1e-12, *by_all, *flags)
    # Every library has options of its own; none of them is used.
    unused = {"FloatType": 0.0, "BoolType": False, "IntType": 0, "OptionalType": None}
    options = [unused[a.type.kind()] for a in ops.attention.default._schema.arguments[7:]]
    packed = (cu_seqlens, cu_seqlens, 1, 1, *options)
    embedded = (ids, ids, ids, table, table, table, vector, vector, 0.0, 1e-12, None, 0, *by_all)
    last = {"plan": None, "padding": [-1, -1, -1]}
    last_names = [a.name for a in ops.embedding_layer_norm.default._schema.arguments[16:]]
    embedded = (*embedded, *(last[name] for name in last_names))
    return {
        "dropout": lambda: ops.dropout(rows, 0.1, seed, 0),
        "layer_norm": lambda: ops.layer_norm(rows, *norm),
        "embedding_layer_norm": lambda: ops.embedding_layer_norm(*embedded),
        "attention": lambda: ops.attention(q, q, q, *packed),
        "gram": lambda: ops.gram(rows, [0, 4]),
        "combine": lambda: ops.combine(rows, weights),
        "combine_adamw_": lambda: ops.combine_adamw_(rows, weights, *state, None, *numbers),
    }


def measure(library: str) -> dict[str, float]:
    """Return the fewest nanoseconds that a call of each operator took, with this library."""
    torch.ops.load_library(library)
    torch.set_num_threads(1)
    best = {}
    for name, call in calls().items():
        seconds = min(timeit.repeat(call, number=CALLS, repeat=REPEATS))
        best[name] = 1e9 * seconds / CALLS
    return best


if __name__ == "__main__":
    print(dump_json(measure(sys.argv[1])))
