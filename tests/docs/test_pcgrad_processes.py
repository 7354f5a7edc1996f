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
from tests.launch import free_port

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
{code}
dist.destroy_process_group()
"""

END = "dist.destroy_process_group()\n"


def scripts() -> dict[str, str]:
    """The page's code for DDP and for FSDP2, which begins with the function of the former."""
    ddp, fsdp = (block.removesuffix(END) for block in PAGE.blocks("python"))
    function = ddp[: ddp.index("dist.init_process_group")]
    codes = {"ddp": ddp, "fsdp": function + fsdp}
    return {
        name: ON_RANK.format(repository=str(REPOSITORY), code=f'{code}keep("{name}")')
        for name, code in codes.items()
    }


def run_on_two(script: Path) -> None:
    """Run a file on two ranks, as torchrun starts them, and wait for both."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            cwd=script.parent,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for rank in ranks:
            _, printed = rank.communicate(timeout=120)
            assert rank.returncode == 0, printed[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_two_processes_do_what_one_does_with_the_examples_of_both(tmp_path: Path) -> None:
    assert all(block.endswith(END) for block in PAGE.blocks("python"))
    for name, code in scripts().items():
        (tmp_path / f"{name}.py").write_text(code)
        run_on_two(tmp_path / f"{name}.py")

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
