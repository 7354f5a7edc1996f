"""The loops of the page on several processes do on two what one process does with all examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import REPOSITORY
from tests.docs.pages import Page
from tests.docs.test_pcgrad_loop import Model, assert_close, batches_of, gradients, joined, trained

PAGE = Page("pcgrad-processes")

ON_RANK = """
import os, sys
sys.path.insert(0, {repository!r})
import torch
from torch.distributed.tensor import DTensor
from tests.docs.test_pcgrad_loop import Model, batches_of

rank = int(os.environ["RANK"])

def whole(tensor):
    # Every rank takes part, as shards are gathered.
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def keep(name):
    weights = {{name: whole(value) for name, value in model.state_dict().items()}}
    gradients = [whole(parameter.grad) for parameter in model.parameters()]
    torch.save((weights, gradients), f"{{name}}-{{rank}}.pt")

model, batches = Model(), batches_of(6, (4, 4))[rank::2]
{ddp}
keep("ddp")
model = Model()
{fsdp}
"""


def test_two_processes_do_what_one_does_with_the_examples_of_both(tmp_path: Path) -> None:
    ddp, fsdp = PAGE.blocks("python")
    end = "dist.destroy_process_group()\n"
    assert fsdp.endswith(end)
    fsdp = fsdp.removesuffix(end) + 'keep("fsdp")\n' + end
    script = tmp_path / "on_rank.py"
    script.write_text(ON_RANK.format(repository=str(REPOSITORY), ddp=ddp, fsdp=fsdp))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script)]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]

    batches = batches_of(6, (4, 4))
    alone = trained([joined(batches[i : i + 2]) for i in range(0, 6, 2)])
    for name in ("ddp", "fsdp"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        weights, last_gradients = first
        torch.testing.assert_close(last_gradients, gradients(alone), rtol=1e-3, atol=1e-5)
        found = Model()
        found.load_state_dict(weights)
        # Sums in another order, of which AdamW makes steps of 1e-3 each at most.
        assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_the_commands_are_those_of_examples_that_the_tests_run() -> None:
    tested = (REPOSITORY / "tests/examples/test_examples.py").read_text(encoding="utf-8")
    commands = PAGE.commands()
    assert len(commands) >= 2
    examples = re.findall(r"-m examples\.(\w+)", PAGE.text)
    assert len(set(examples)) == 6
    for example in examples:
        assert f'"{example}": (' in tested, example
