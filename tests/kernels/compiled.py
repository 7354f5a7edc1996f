"""Compiles the Triton kernels of attention for GPUs that are not there, and reads what they need.

`python -m tests.kernels.compiled` prints the whole table; test_triton_compile.py holds a part of it
to the limits.
"""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention_triton as kernels
from kernels.attention_triton import TILES, Heads, Intervals
from kernels.philox_triton import DropoutArguments

KERNELS = {
    "forward": kernels._forward_kernel,
    "grad_q": kernels._grad_q_kernel,
    "grad_kv": kernels._grad_kv_kernel,
}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
WIDTHS = [32, 64, 96, 128]
# Shared memory that one block may have, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Needs(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def _types(dtype: str) -> dict[str, Any]:
    heads = Heads(f"*{dtype}", "i32", "i32")
    intervals = Intervals("*i32", "*i32")
    return {
        **dict.fromkeys(["q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"], heads),
        **dict.fromkeys(["keys_of_queries", "queries_of_keys"], intervals),
        **dict.fromkeys(["lse", "delta"], "*fp32"),
        **dict.fromkeys(["total_q", "total_k", "stream"], "i32"),
        "scale": "fp32",
        "dropout": DropoutArguments("*i64", "i64", "fp32"),
    }


def _divisible(signature: dict[str, Any]) -> dict[tuple[int, ...], list[list[object]]]:
    """Pointers and strides are multiples of 16, as those of real tensors are."""
    paths = []
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, Heads):
            paths += [(i, 0), (i, 1), (i, 2)]
        elif isinstance(kind, Intervals):
            paths += [(i, 0), (i, 1)]
        elif isinstance(kind, str) and kind.startswith("*"):
            paths.append((i,))
    return {path: [["tt.divisibility", 16]] for path in paths}


def compile_kernel(name: str, dtype: str, width: int, capability: int) -> Needs:
    """Compile one kernel, dropout included."""
    kernel = KERNELS[name]
    block_d = max(32, triton.next_power_of_2(width))
    tiles = TILES[name, ELEMENT_BYTES[dtype], block_d]
    constants = {
        "DROPOUT": True,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "D": width,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
    }
    types = _types(dtype)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, _divisible(signature)),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Needs(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    for case in product(KERNELS, ELEMENT_BYTES, WIDTHS, SHARED_LIMIT):
        print(*case, compile_kernel(*case), flush=True)
