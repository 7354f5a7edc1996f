"""Memory that runs out inside an operator is a MemoryError, in the caller's thread or another."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.linear.linear import MULTIPLIES_BF16

SCRIPT = """
import resource
import torch
import kernels
from kernels.linear.linear import MULTIPLIES_BF16

torch.set_num_threads(2)
ops = torch.ops.superbert
big = torch.ones(40_000, 512)  # 80 MB
small = torch.ones(4, 512)
seed, weight = torch.tensor(1), torch.ones(512)
bf16_stream, bf16_weight = big.bfloat16(), torch.ones(512, 512).bfloat16()
matrix, lower = torch.eye(2500).double(), torch.zeros(8, 2500).double()
kernels.layer_norm(small, weight)  # starts the threads
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2)
calls = {
    "dropout": lambda: ops.dropout(big, 0.1, seed, 0),
    "geglu": lambda: kernels.geglu(big),
    "layer_norm": lambda: kernels.layer_norm(big, weight),
    "non-contiguous": lambda: kernels.layer_norm(big.t()[:, :39_000], None),
    "draw_order": lambda: kernels.draw_order(5_000, 1),
    "in a thread": lambda: ops.project_onto_dual_cone(matrix, lower),
}
if MULTIPLIES_BF16:
    calls["product"] = lambda: ops.linear_bf16(bf16_stream, bf16_weight, None)
    odd = bf16_stream[:, 1:], bf16_weight[:1, 1:]  # copied into whole pairs
    calls["product of a copy"] = lambda: ops.linear_bf16(*odd, None)
for name, call in calls.items():
    try:
        call()
        print(name, "ended well")
    except BaseException as error:
        print(name, type(error).__name__)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells how much memory is used")
def test_memory_that_runs_out_is_a_memory_error() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    names = ["dropout", "geglu", "layer_norm", "non-contiguous", "draw_order", "in a thread"]
    if MULTIPLIES_BF16:
        names += ["product", "product of a copy"]
    assert run.stdout.splitlines() == [f"{name} MemoryError" for name in names]
