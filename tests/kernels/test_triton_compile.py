"""The Triton kernels compile for GPUs that are not there: no spills, memory that fits, and once."""

from collections import defaultdict
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from kernels import Columns, plan_lookups
from kernels.attention import attention_triton
from kernels.attention.attention_options import AttentionOptions
from kernels.dropout import dropout_triton
from kernels.embedding import embedding_triton, lookup_plan_triton
from kernels.embedding.lookup_plan import ALL_TABLES, Layout
from kernels.embedding_layer_norm import embedding_layer_norm_triton
from kernels.gated_activation import gated_activation_triton
from kernels.layer_norm import layer_norm_triton
from kernels.linear import linear_triton
from kernels.rotary import rotary_triton
from kernels.take_rows import take_rows_triton

from .compile_triton import (
    ATTENTION,
    KERNELS,
    RUNS,
    SHARED_LIMIT,
    cases,
    compile_all,
    covering_cases,
    name_of,
    triton_modules,
)


@pytest.mark.long
def test_no_spills_and_shared_memory_within_the_limit() -> None:
    table = compile_all(covering_cases())
    too_much = {case: needs for case, needs in table.items() if not needs.fit(case)}
    assert not too_much


def test_every_kernel_is_in_the_table() -> None:
    named = [x for module in triton_modules() for x in vars(module).items()]
    kernels = {
        name_of(kernel)
        for name, kernel in named
        if isinstance(kernel, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == set(map(name_of, KERNELS.values())), (
        "KERNELS of tests/kernels/compile_triton.py has an entry for each kernel, and _types() and "
        "_other() there what it takes"
    )


def test_the_cases_compiled_here_cover_the_table() -> None:
    def pairs(table: list[tuple]) -> set[tuple]:
        return {(case[part], case[3]) for case in table for part in range(3)}

    every, here = list(cases()), list(covering_cases())
    assert len(here) == len(every) // len(SHARED_LIMIT)
    assert {case[:3] for case in here} == {case[:3] for case in every}
    assert pairs(here) == pairs(every)


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """What Triton would compile, by kernel: it finds a GPU that is not there, and stops short."""
    found = defaultdict(set)

    def note(*, key: str, fn: Any, **_: object) -> bool:
        found[name_of(fn.jit_function)].add(key)
        return True  # neither compiled nor launched

    gpu = SimpleNamespace(
        get_current_device=lambda: "a GPU that is not there",
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compilation_serves_all_token_counts(
    dtype: torch.dtype, variants: dict[str, set[str]]
) -> None:
    for tokens in range(1, 200, 20):
        launch_all(tokens, dtype)
    launched = set(map(name_of, KERNELS.values()))
    assert variants.keys() == launched, (
        "launch_all() of tests/kernels/test_triton_compile.py calls every launcher"
    )
    # Sums with and without one for a bias of x; tiles of sequences that are in no run, and of
    # queries with boundaries of their own; each of these, runs and intervals, with a window, of
    # whatever size, and without.
    several = dict.fromkeys(["intervals", "sum_partials", *RUNS], 2) | dict.fromkeys(ATTENTION, 4)
    several = {name_of(KERNELS[kernel]): count for kernel, count in several.items()}
    for kernel, keys in variants.items():
        assert len(keys) == several.get(kernel, 1), (
            f"{kernel}: numbers that differ from call to call belong in do_not_specialize"
        )


def launch_all(tokens: int, dtype: torch.dtype) -> None:
    """Call every launcher on a stream of two tasks."""
    width, seed, offsets = 64, torch.tensor(1), (0, tokens // 2, tokens)
    cu_seqlens = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    q, k, v = torch.zeros(tokens, 3, 2, 32, dtype=dtype).unbind(1)
    windows = ((-1, -1, False), (-1, -1, True), (tokens - 1, -1, False), (1, 2**40, False))
    windows += ((16, tokens, True),)
    for of_keys, (left, right, causal) in product((cu_seqlens, cu_seqlens.clone()), windows):
        options = AttentionOptions(0.2, causal, 0.1, 1, left, right, seed)
        arguments = (cu_seqlens, of_keys, options)
        out, lse = attention_triton.forward(q, k, v, *arguments)
        grads = torch.empty(tokens, 3, 2, 32, dtype=dtype).unbind(1)
        attention_triton.backward(out, q, k, v, out, lse, *arguments, grads=grads)

    x, weight, bias = torch.zeros(tokens, width, dtype=dtype), *torch.zeros(2, width)
    rows, of_tasks = torch.zeros(3, 2, width).unbind(0), (offsets, False)
    add = (x, bias, 0.1, seed, 1)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, bias, 1e-12, *add)
    layer_norm_triton.backward(x, hidden, weight, mean, rstd, *rows, *of_tasks, *add[2:])
    dropout_triton.dropout(x, 0.1, seed, 1)
    gated = (0, 0.1, seed, 1)
    grad_out = gated_activation_triton.forward(x, *gated)
    gated_activation_triton.backward(grad_out, x, *gated)

    index, table = torch.arange(tokens) % 7, torch.zeros(7, width, dtype=dtype)
    embedded = ((index,) * 3, (table,) * 3)
    norm = embedding_layer_norm_triton
    norm.forward(*embedded, weight, bias, 0.1, 1e-12, seed, 1)
    norm.backward(x, *embedded, weight, mean, rstd, *rows[:2], *of_tasks, 0.1, seed, 1)
    embedding_triton.add_task_gradients_(x, index, torch.zeros(2, 7, width, dtype=dtype), offsets)

    matrix_rows, bias_rows = torch.zeros(2, width, width), torch.zeros(2, width)
    for tasks in (offsets, (0, tokens)):
        own = (matrix_rows[: len(tasks) - 1], bias_rows[: len(tasks) - 1])
        linear_triton.write_gradients_(x, x, *own, tasks, False)
        linear_triton.write_bias_gradients_(x, own[1], tasks, False)

    buffer = torch.zeros(2, 8 * width, dtype=dtype)
    tables = Columns(0, (7, width)), Columns(7 * width, (1, width))
    plan = plan_lookups((index, torch.zeros_like(index)), tables, offsets)
    planned = (plan.data, buffer, Layout.of(plan.entries, offsets))
    lookup_plan_triton.add_planned_gradients_(x, *planned, ALL_TABLES)
    lookup_plan_triton.zero_planned_rows_(buffer, plan.data, planned[2], width)
    heads, tables = torch.zeros(1, tokens, 3, 2, 32, dtype=dtype), torch.zeros(2, tokens, 16)
    placed = (index, None, None, tokens, False, False)
    rotary_triton.rotate(heads, heads, 2, *tables, *placed)
    take_rows_triton.forward(x, index[:7])
    take_rows_triton.backward(x, index, 7)
