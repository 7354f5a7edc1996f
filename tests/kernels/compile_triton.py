"""Compiles the Triton kernels for GPUs that are not there, and reads what they need.

`python -m tests.kernels.compile_triton` prints the whole table, which takes about five minutes on
two cores, and fails where a kernel spills or takes too much; test_triton_compile.py does a third.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels.attention import attention_plan_triton, attention_runs_triton
from kernels.attention import attention_triton_kernels as attention
from kernels.attention.attention_plan import RUN_TOKENS
from kernels.attention.attention_runs_triton import WARPS
from kernels.attention.attention_tiles_triton import Heads, KernelOptions, padded_width
from kernels.attention.attention_triton import INTERVAL_ROWS, TILES
from kernels.dropout import dropout_triton
from kernels.dropout.philox_triton import DropoutArguments
from kernels.embedding import embedding_triton, lookup_plan_triton
from kernels.embedding.lookup_plan import PIECE
from kernels.embedding_layer_norm import embedding_layer_norm_triton
from kernels.embedding_layer_norm.embedding_layer_norm_triton import Tables
from kernels.gated_activation import gated_activation_triton
from kernels.gated_activation.gated_activation import GELU, GELU_TANH, SILU
from kernels.layer_norm import layer_norm_sums_triton
from kernels.layer_norm import layer_norm_triton_kernels as layer_norm
from kernels.layer_norm.layer_norm_sums_triton import SEGMENTS, GradientRows
from kernels.layer_norm.layer_norm_tiles_triton import Parameters
from kernels.layer_norm.layer_norm_triton import backward_constants_of, constants_of
from kernels.linear import linear_triton
from kernels.rotary import rotary_triton
from kernels.rotary.rotary_triton import Places, Strides
from kernels.take_rows import take_rows_triton

ATTENTION = {
    "forward": attention.forward_kernel,
    "grad_q": attention.grad_q_kernel,
    "grad_kv": attention.grad_kv_kernel,
}
RUNS = {
    "forward_runs": attention_runs_triton.forward_runs_kernel,
    "backward_runs": attention_runs_triton.backward_runs_kernel,
}
NORMS = {
    "layer_norm": layer_norm.layer_norm_forward_kernel,
    "layer_norm_backward": layer_norm.layer_norm_backward_kernel,
    "prenorm": layer_norm.layer_norm_forward_kernel,
    "prenorm_backward": layer_norm.layer_norm_backward_kernel,
    "prenorm_rms": layer_norm.layer_norm_forward_kernel,
    "prenorm_rms_backward": layer_norm.layer_norm_backward_kernel,
    "embedding_layer_norm": embedding_layer_norm_triton._forward_kernel,
    "embedding_layer_norm_backward": embedding_layer_norm_triton._backward_kernel,
}
# Each with dropout, and the first without, too: the activation and the dropout's probability.
GATED_OPTIONS = {
    "geglu": (GELU, 0.1),
    "geglu_tanh": (GELU_TANH, 0.1),
    "swiglu": (SILU, 0.1),
    "geglu_alone": (GELU, 0.0),
}
GATED = {
    f"{name}{suffix}": kernel
    for name in GATED_OPTIONS
    for suffix, kernel in (
        ("", gated_activation_triton.gated_forward_kernel),
        ("_backward", gated_activation_triton.gated_backward_kernel),
    )
}
OTHERS = {
    "intervals": attention.intervals_kernel,
    "plan_bounds": attention_plan_triton.bounds_kernel,
    "plan_runs": attention_plan_triton.runs_kernel,
    "sum_partials": layer_norm_sums_triton.sum_partials_kernel,
    "dropout": dropout_triton._dropout_kernel,
    "embedding_pieces": embedding_triton._pieces_kernel,
    "embedding_long_runs": embedding_triton._long_runs_kernel,
    "planned_pieces": lookup_plan_triton.planned_pieces_kernel,
    "planned_runs": lookup_plan_triton.planned_runs_kernel,
    "zero_planned_rows": lookup_plan_triton.zero_planned_rows_kernel,
    "take_rows": take_rows_triton.take_rows_kernel,
    "write_rows": take_rows_triton.write_rows_kernel,
}
# Halves in place; neighbours of a packed stream; half of the columns, into another tensor.
ROTARY = {
    "rotary": rotary_triton.rotary_kernel,
    "rotary_interleaved": rotary_triton.rotary_kernel,
    "rotary_copied": rotary_triton.rotary_kernel,
}
# Widths are numbers like others to these: one compilation serves all that are multiples of 16, and
# of those that are not, which have small tiles, one each of the rest.
LINEAR = {
    "linear_large": linear_triton.gradients_kernel,
    "linear_narrow": linear_triton.gradients_kernel,
    "linear_thin": linear_triton.gradients_kernel,
    "linear_bias": linear_triton.bias_kernel,
}
MULTIPLES_OF_16 = {
    "linear_large": [
        *("grad_stride", "grad_columns", "x_stride", "x_columns"),
        *("weight_stride", "bias_stride", "outputs", "inputs"),
    ],
}
KERNELS = ATTENTION | RUNS | NORMS | LINEAR | ROTARY | GATED | OTHERS
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_WIDTHS = [32, 64, 96, 128]
# BERT's widths and the largest that is allowed.
ROW_WIDTHS = [384, 768, 1024, 8192]
# Shared memory that one block may have, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Case(NamedTuple):
    """One kernel for one GPU, dropout, a window and all optional parts included."""

    kernel: str
    dtype: str
    width: int
    capability: int


class Needs(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def fit(self, case: Case) -> bool:
        """Whether nothing spills and shared memory is within the GPU's limit."""
        return self.spilled_bytes == 0 and self.shared_bytes <= SHARED_LIMIT[case.capability]


def triton_modules() -> list[ModuleType]:
    """Import every module below ``kernels`` that has Triton kernels or their launchers."""
    paths = sorted(Path(kernels.__file__).parent.glob("*/*_triton*.py"))
    return [importlib.import_module(f"kernels.{path.parent.name}.{path.stem}") for path in paths]


def name_of(kernel: Any) -> str:
    """Return a kernel's name with its module's: two kernels may have one name."""
    return f"{kernel.__module__}.{kernel.__name__}"


def cases() -> Iterator[Case]:
    """Every kernel, dtype and width that matters, for every GPU generation."""
    widths = dict.fromkeys(ATTENTION | RUNS | ROTARY, HEAD_WIDTHS) | dict.fromkeys(
        NORMS, ROW_WIDTHS
    )
    for kernel in KERNELS:
        for dtype, width, capability in product(
            ELEMENT_BYTES, widths.get(kernel, [768]), SHARED_LIMIT
        ):
            has_settings = (kernel, ELEMENT_BYTES[dtype], padded_width(width)) in WARPS
            if kernel not in RUNS or has_settings:  # wide heads of float32 have no runs
                yield Case(kernel, dtype, width, capability)


def covering_cases() -> Iterator[Case]:
    """A third of them: every kernel, dtype and width on one GPU generation, these in turn.

    Each generation meets every kernel, every dtype and every width, and nearly every pair of them;
    code for float16 and bfloat16 differs in the type of the products alone, so that the kernels in
    16 bits are compiled for two generations of three.
    """
    orders = [list(KERNELS), list(ELEMENT_BYTES), HEAD_WIDTHS + ROW_WIDTHS]
    capabilities = list(SHARED_LIMIT)
    for case in cases():
        places = (order.index(part) for order, part in zip(orders, case[:3], strict=True))
        if case.capability == capabilities[sum(places) % len(capabilities)]:
            yield case


def compile_all(wanted: Iterable[Case]) -> dict[Case, Needs]:
    """Compile the cases, one on each core at a time."""
    wanted = list(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        return dict(zip(wanted, pool.map(compile_kernel, wanted), strict=True))


def compile_kernel(case: Case) -> Needs:
    """Compile one kernel."""
    kernel = KERNELS[case.kernel]
    if case.kernel in ATTENTION:
        constants, options = _attention(case)
    elif case.kernel in RUNS:
        constants, options = _runs(case)
    elif case.kernel in NORMS:
        constants, options = _norm(case)
    elif case.kernel in LINEAR:
        constants, options = _linear(case)
    elif case.kernel in ROTARY:
        constants, options = _rotary(case)
    elif case.kernel in GATED:
        own = GATED_OPTIONS[case.kernel.removesuffix("_backward")]
        constants, options = gated_activation_triton.constants_of(case.width, *own), {}
    else:
        constants, options = _other(case)
    types = _types(case.dtype, in_heads=case.kernel in ATTENTION | RUNS)
    signature = {
        argument: "constexpr" if argument in constants else types[argument]
        for argument in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, _divisible(signature, case.kernel)),
        target=GPUTarget("cuda", case.capability, 32),
        options=options,
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Needs(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def _attention(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    block_d = padded_width(case.width)
    tiles = TILES[case.kernel, ELEMENT_BYTES[case.dtype], block_d]
    constants = {
        "LONGER_THAN": RUN_TOKENS,
        "PRECISION": "ieee" if case.dtype == "fp32" else "tf32",
        "D": case.width,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return constants, options


def _runs(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    block_d = padded_width(case.width)
    constants = {
        "PRECISION": "ieee" if case.dtype == "fp32" else "tf32",
        "D": case.width,
        "BLOCK_D": block_d,
        "BLOCK": RUN_TOKENS,
    }
    return constants, {"num_warps": WARPS[case.kernel, ELEMENT_BYTES[case.dtype], block_d]}


def _norm(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    constants, is_rms_norm = constants_of(case.width, 0.1), "_rms" in case.kernel
    if case.kernel == "embedding_layer_norm":
        constants = constants_of(case.width, 0.1, embedding_layer_norm_triton.TILE_ELEMENTS)
    if case.kernel.endswith("backward"):
        some, none = torch.empty(1), torch.empty(0)
        bias = none if is_rms_norm else some
        x_bias = none if case.kernel.startswith("embedding") or is_rms_norm else some
        constants = backward_constants_of(case.width, 0.1, GradientRows(some, bias, x_bias))
    options = {"num_warps": constants.pop("num_warps")}
    values = dict.fromkeys(["HAS_RESIDUAL", "HAS_X_BIAS", "HAS_WEIGHT", "HAS_BIAS"], True)
    values |= dict.fromkeys(["PRENORM", "HAS_GRAD_SUM"], case.kernel.startswith("prenorm"))
    values["IS_RMS_NORM"] = is_rms_norm
    arguments = NORMS[case.kernel].arg_names
    return constants | {flag: values[flag] for flag in values if flag in arguments}, options


def _linear(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    element_bytes, kind = ELEMENT_BYTES[case.dtype], case.kernel.removeprefix("linear_")
    constants = {
        "ACCUMULATE": True,
        "MAX_TASKS": linear_triton.MAX_TASKS,
        "BIAS_O": linear_triton.BIAS_COLUMNS,
    }
    if kind == "bias":
        warps = linear_triton.BIAS_WARPS
        tokens = linear_triton.bias_tokens(warps, element_bytes)
        return constants | {"BIAS_T": tokens}, {"num_warps": warps}
    tiles = linear_triton.TILES[element_bytes, kind]
    constants |= {
        "PRECISION": "ieee" if case.dtype == "fp32" else "tf32",
        "GROUP": linear_triton.GROUP,
        "BLOCK_O": tiles.outputs,
        "BLOCK_I": tiles.inputs,
        "BLOCK_T": tiles.tokens,
        "BIAS_T": linear_triton.bias_tokens(tiles.num_warps, element_bytes),
    }
    if kind == "thin":  # Triton compiles 1 into a kernel
        constants |= dict.fromkeys(["outputs", "grad_stride", "grad_columns"], 1)
    return constants, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _rotary(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    is_copied, is_packed = (case.kernel.endswith(kind) for kind in ("copied", "interleaved"))
    half = case.width // 4 if is_copied else case.width // 2
    constants = {
        **{"INTERLEAVED": is_packed, "KIND": "packed" if is_packed else "ids"},
        **{"OFFSETS": is_packed, "COPY": is_copied},
        **rotary_triton.constants_of(case.width, half),
    }
    return constants, {"num_warps": rotary_triton.NUM_WARPS}


def _other(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    width = case.width
    of_rows = {"WIDTH": width, "BLOCK": take_rows_triton.BLOCK}
    of_table = {"WIDTH": width, "PIECE": PIECE, "COLUMNS": embedding_triton.COLUMNS}
    constants = {
        "intervals": {"BLOCK": INTERVAL_ROWS},
        "sum_partials": {
            **dict.fromkeys(["ACCUMULATE", "HAS_WEIGHT", "HAS_BIAS", "HAS_X_BIAS"], True),
            **{"SUMS": 3, "N": width, "SEGMENTS": SEGMENTS},
            "BLOCK_P": layer_norm_sums_triton.SUMMED_PROGRAMS,
            "BLOCK_N": layer_norm_sums_triton.SUMMED_COLUMNS,
        },
        "plan_bounds": {"BLOCK": attention_plan_triton.BLOCK},
        "plan_runs": {"BLOCK": attention_plan_triton.BLOCK},
        "dropout": {"BLOCK": dropout_triton._BLOCK},
        "embedding_pieces": {"N": 30_522, **of_table},
        "embedding_long_runs": {"N": 30_522, **of_table},
        "planned_pieces": of_table,
        "planned_runs": of_table,
        "take_rows": of_rows,
        "write_rows": of_rows,
        "zero_planned_rows": {
            "WIDTH": width,
            "RECORDS": lookup_plan_triton.ZEROED_RECORDS,
            "COLUMNS": lookup_plan_triton.ZEROED_COLUMNS,
        },
    }
    return constants[case.kernel], {}


def _types(dtype: str, in_heads: bool) -> dict[str, Any]:
    """Types of all arguments that any of the kernels has."""
    row = f"*{dtype}"
    heads = Heads(row, "i32", "i32")
    rows = ["x", "residual", "hidden", "grad_hidden", "grad_x", "grad_sum", "grad", "rows"]
    rows += ["weight_rows", "bias_rows", "x_bias_rows"]
    of_plan = ["first_record", "num_tokens", "num_places", "num_records", "first_slot"]
    return {
        **dict.fromkeys(["q", "k", "v", "grad_q", "grad_k", "grad_v"], heads),
        **dict.fromkeys(["out", "grad_out"], heads if in_heads else row),
        **dict.fromkeys([*rows, "buffer"], row),
        **dict.fromkeys(["keys_of_queries", "queries_of_keys", "intervals"], "*i32"),
        **dict.fromkeys(["cu_seqlens", "runs", "bounds", "following"], "*i32"),
        **dict.fromkeys(["lse", "delta", "norm"], "*fp32"),
        **dict.fromkeys(["mean", "rstd", "weight", "partials", "pieces", "slots"], "*fp32"),
        **dict.fromkeys(["keys", "tokens", "run_starts", "plan", "index"], "*i64"),
        **dict.fromkeys([*of_plan, "num_slots", "num_columns"], "i32"),
        **dict.fromkeys(["cu_own", "cu_other"], "*i32"),
        **dict.fromkeys(["total_q", "total_k", "total", "total_other", "num_rows"], "i32"),
        **dict.fromkeys(["num_sequences", "search_steps", "count", "rng_offset"], "i32"),
        **dict.fromkeys(["log_rows", "first_segment", "first_task"], "i32"),
        **dict.fromkeys(["weight_stride", "bias_stride", "x_bias_stride"], "i32"),
        **dict.fromkeys(["num_heads", "num_runs", "before", "after"], "i32"),
        **dict.fromkeys(["row_stride", "num_keys"], "i32"),
        "boundaries": ("i32",) * (SEGMENTS + 1),
        **dict.fromkeys(["grad_stride", "grad_columns", "x_stride", "x_columns"], "i32"),
        **dict.fromkeys(["outputs", "inputs", "tasks"], "i32"),
        "offsets": ("i32",) * (linear_triton.MAX_TASKS + 1),
        **dict.fromkeys(["cos", "sin"], "*fp32"),
        **dict.fromkeys(["x_strides", "out_strides"], Strides("i32", "i32", "i32")),
        "places": Places("*i64", "*i32", "*i64"),
        **dict.fromkeys(["sequence", "positions", "heads", "of_token", "offset"], "i32"),
        **dict.fromkeys(["x_batch", "out_batch"], "i32"),
        **dict.fromkeys(["eps", "sign"], "fp32"),
        "parameters": Parameters("*fp32", "*fp32", "*fp32"),
        "tables": Tables(row, row, row),
        "sizes": Tables("i32", "i32", "i32"),
        "ids": Tables("*i64", "*i64", "*i64"),
        "dropout": DropoutArguments("*i64", "i64", "fp32"),
        "kernel_options": KernelOptions("fp32", *DropoutArguments("*i64", "i64", "fp32")),
    }


def _divisible(
    signature: dict[str, Any], case_kernel: str
) -> dict[tuple[int, ...], list[list[object]]]:
    """Pointers and strides are multiples of 16, as those of real tensors are."""
    paths: list[tuple[int, ...]] = []
    for i, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, Heads):
            paths += [(i, 0), (i, 1), (i, 2)]
        elif isinstance(kind, tuple):
            paths += [(i, j) for j, part in enumerate(kind) if part.startswith("*")]
        elif kind.startswith("*") or name in MULTIPLES_OF_16.get(case_kernel, []):
            paths.append((i,))
    return {path: [["tt.divisibility", 16]] for path in paths}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    table = compile_all(cases())
    for case, needs in table.items():
        print(*case, needs, "" if needs.fit(case) else "TOO MUCH")
    sys.exit(not all(needs.fit(case) for case, needs in table.items()))
