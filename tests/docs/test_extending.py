"""The examples of the page on extending run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.gradients import balancing as recipe_methods
from kernels import balancing
from tests.conftest import REPOSITORY
from tests.docs.extending import files, section
from tests.kernels.balancing import methods, test_edges, test_every_method

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("title", ["Add an encoder", "Add a head", "Add a balancing method"])
def test_files_are_formatted_and_linted(title: str) -> None:
    found = files(section(title))
    assert len(found) == 2  # the file and its test
    ours = 'lint.isort.known-first-party=["engine","kernels","tests"]'  # that are not there, too
    for path, code in found.items():
        for command in (("check", "--config", ours), ("format", "--diff")):
            run = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--stdin-filename", path, "-"],
                cwd=REPOSITORY,
                input=code,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            assert run.returncode == 0, run.stdout + run.stderr


def test_a_balancing_method(monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.split("\n## Add a balancing method\n")[1].split("\n## ")[0]
    method, test, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)

    file: dict[str, object] = {"__package__": "kernels.balancing"}
    exec(compile(method, "kernels/balancing/equal_norms.py", "exec"), file)
    monkeypatch.setattr(balancing, "equal_norms", file["equal_norms"], raising=False)
    monkeypatch.setitem(methods.METHODS, "equal_norms", file["equal_norms"])
    monkeypatch.setitem(methods.VARIANTS, "equal_norms", file["equal_norms"])

    tests: dict[str, object] = {"__package__": "tests.kernels.balancing"}
    exec(compile(test, "tests/kernels/balancing/test_equal_norms.py", "exec"), tests)
    ran = [run() for name, run in tests.items() if name.startswith("test_") and callable(run)]
    assert ran
    for dtype in (torch.float32, torch.float64):
        test_every_method.test_free_of_scale("equal_norms", dtype)
        for case in test_every_method.ugly_gradients():
            test_every_method.test_ugly_gradients_give_finite_updates("equal_norms", case, dtype)
    test_every_method.test_tasks_can_be_permuted("equal_norms")
    for count in (1, 4):
        test_edges.test_weights_are_finite_where_the_gram_matrix_is("equal_norms", count)
        test_edges.test_a_gradient_that_is_not_finite_makes_all_weights_nan("equal_norms", count)

    (build,) = eval(line, vars(recipe_methods)).values()
    tasks = recipe_methods.TrainedTasks(("a", "b"), (1, 1))
    gram = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    others = (torch.zeros(2, 2), torch.ones(2), {}, torch.tensor(0))
    inputs = recipe_methods.BalancerInput(gram, *others)
    weights: Tensor = build(tasks, recipe_methods.BalanceSettings()).decide(inputs).weights
    torch.testing.assert_close(weights, torch.tensor([2.0, 2 / 3]))


def test_a_kernel(tmp_path: Path) -> None:
    section = PAGE.split("\n## Add a kernel\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    files = (
        "kernels/squared_relu/squared_relu.py",
        "kernels/squared_relu/squared_relu_triton.py",
        "tests/kernels/test_squared_relu.py",
        "tests/kernels/triton_cases/squared_relu.py",
        "tests/kernels/triton_interpreter/test_squared_relu.py",
    )
    for folder in ("kernels", "tests/kernels"):
        without_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=without_caches)
    for file in (
        "pyproject.toml",
        "tests/__init__.py",
        "tests/conftest.py",
        "tests/device_waits.py",
    ):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    (tmp_path / "kernels" / "squared_relu").mkdir(exist_ok=True)
    (tmp_path / "kernels" / "squared_relu" / "__init__.py").write_text('"""Squared ReLU."""\n')
    for name, block in zip(files, blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")

    for name, block in zip(files, blocks, strict=True):
        for command in (["check"], ["format", "--diff"]):
            _run("ruff", *command, "--stdin-filename", name, "-", cwd=tmp_path, input=block)
    function = _run("pytest", "-q", files[2], cwd=tmp_path)
    kernels = _run("pytest", "-q", files[3], cwd=tmp_path, interpreted=True)
    every_file = "tests/kernels/triton_interpreter/test_every_file.py"
    _run("pytest", "-q", files[4], every_file, cwd=tmp_path)
    assert re.search(r"\b16 passed", function), function
    assert re.search(r"\b13 passed", kernels), kernels


def _run(
    module: str, *arguments: str, cwd: Path, input: str = "", interpreted: bool = False
) -> str:
    """Run a module as a command; Triton kernels run by its interpreter where ``interpreted``."""
    variables = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=variables,
        input=input,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
