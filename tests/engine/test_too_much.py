"""Memory that runs out, and files that have no end: one line, wherever it happens."""

import os
import shutil

import pytest
import torch

from engine import evaluate, export, predict, report, train
from engine.cli.common import run_cli

from .conftest import TINY

_HOLE = 1 << 40
"""Bytes of a file that takes no room on the disk, and more than a machine has memory for."""


def _ended(capsys, main) -> tuple[int, str]:
    """The status of a command, and what it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
    ids=["Python", "a GPU", "a CPU", "oneDNN", "threads"],
)
def test_memory_that_runs_out_anywhere(capsys, error):
    def main():
        raise error

    status, line = _ended(capsys, main)
    assert status == 2
    assert line == ("error: out of memory: free some, or take a smaller model or less input\n")


def test_other_errors_of_torch_are_told_whole():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run_cli(main)


@pytest.mark.parametrize("program", [evaluate, export, predict, report, train])
def test_files_of_a_run_that_are_too_large(capsys, tiny_run, tmp_path, program):
    """Every file in turn: those that a command reads, it refuses."""
    whole, run = tiny_run("whole", "--max-steps", "1"), tmp_path / "run"
    rows, new = tmp_path / "rows.tsv", str(tmp_path / "new")
    rows.write_text("id\tsentence\n1\tfine\n")
    arguments = {
        evaluate: [str(run)],
        export: [str(run), "--to", new],
        predict: [str(run), "--task", "sst", "--input", str(rows), "--output", new, "--force"],
        report: [str(run), "--out", new],
        train: ["demo", "--out", str(run), "--resume", "--max-steps", "1", "--set", *TINY],
    }[program]
    refused = set()
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(whole, run)
        os.truncate(run / path.relative_to(whole), _HOLE)
        status, said = _ended(capsys, lambda: program.main(arguments))
        if status != 0:
            assert status == 2
            assert f"has {_HOLE:,} bytes" in said.splitlines()[-1]
            refused.add(path.name)
    assert {"recipe.toml", "config.json", "tokenizer.json", "manifest.json"} <= refused
    assert any(name.endswith(".safetensors") for name in refused)


def test_input_that_is_too_large(capsys, tiny_run, tmp_path):
    run, rows = tiny_run("run", "--max-steps", "1"), tmp_path / "rows.tsv"
    rows.touch()
    os.truncate(rows, _HOLE)
    options = ["--task", "sst", "--input", str(rows), "--output", str(tmp_path / "new")]
    status, line = _ended(capsys, lambda: predict.main([str(run), *options]))
    assert status == 2
    assert "a line of more than 67,108,864 characters" in line
    assert not (tmp_path / "new").exists()
