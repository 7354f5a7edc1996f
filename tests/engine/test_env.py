"""``engine.env`` says what a report needs, whatever is missing, and nothing private."""

import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import env
from engine.runtime import environment
from kernels import backend

from ..conftest import REPOSITORY

TOPICS = ["project", "system", "processor", "torch", "gpus", "tools", "packages", "kernels"]


def as_json(capsys: pytest.CaptureFixture[str]) -> environment.Facts:
    assert env.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_says_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys)
    assert [*facts] == TOPICS
    assert not any("failed" in topic for topic in facts.values())
    assert facts["system"]["python"] == platform.python_version()
    assert facts["torch"]["torch"] == torch.__version__
    assert facts["processor"]["usable"] == len(os.sched_getaffinity(0))
    on_torch = facts["kernels"]["torch operations on cpu"]
    assert on_torch
    assert {backend(op, "cpu") for op in on_torch} == {"torch"}
    assert sum(facts["kernels"]["cpu"].values()) > len(on_torch)


def test_the_text_has_a_line_for_each_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == TOPICS
    assert f"  torch: {torch.__version__}" in lines
    assert all(len(line) < 300 for line in lines)


def test_it_names_no_user_host_or_folder(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    shown = capsys.readouterr().out.split()
    private = {getpass.getuser(), socket.gethostname(), str(REPOSITORY), str(Path.home())}
    assert not private & {*shown}
    assert not [word for word in shown if word.startswith(("/", "~"))]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot open /home/ann/secret/lib/kernels/a.so: none", "cannot open …/a.so: none"),
        ("'/home/ann/x.so' or /a", "'…/x.so' or /a"),
        ("CUDA 13.0/12.8", "CUDA 13.0/12.8"),
    ],
)
def test_messages_lose_the_folders_of_a_path(text: str, left: str) -> None:
    assert environment.without_folders(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("not a folder: '/home/ann smith'", "not a folder: '~'"),
        ("/home/ann smith/lib/a.so: none", "~…/a.so: none"),
        ("/home/ann smithson", "/home/ann smithson"),
    ],
)
def test_messages_lose_the_name_of_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, text: str, left: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ann smith")
    assert environment.without_folders(text) == left.replace("/home/", "…/")


def test_nothing_needs_to_be_there(tmp_path: Path) -> None:
    """In a copy without the extension, without git, compilers, NVIDIA's tools."""
    shutil.copytree(REPOSITORY / "engine", tmp_path / "engine")
    ignored = shutil.ignore_patterns("*.so")
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "kernels", ignore=ignored)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={"PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    process = run("engine.env", "--json")
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout)
    assert "libsuperbert.so is not built: run `make setup`" in facts["kernels"]["failed"]
    assert facts["tools"]["nvcc"] == facts["gpus"]["driver"] == "not found"
    assert facts["torch"]["torch"] == torch.__version__
    for command in (("train", "demo"), ("--completion", "bash")):
        process = run("engine", *command)
        assert (process.returncode, process.stdout) == (2, "")
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: libsuperbert.so is not built: run `make setup`")


def test_a_fact_that_fails_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no such device: /very/private/place/of/mine")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    facts = as_json(capsys)
    assert facts.pop("gpus") == {"failed": "OSError: no such device: …/mine"}
    assert not any("failed" in topic for topic in facts.values())
