"""What the page about installing shows: messages, variables, names of GPUs, processors."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from kernels import _extension, backend
from tests.conftest import REPOSITORY
from tests.docs.pages import Page

PAGE = Page("install")
TOOLS = ("sh", "cat", "uname", "touch", "rm", "mkdir")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, without the code: each try ends before it."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "Makefile"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "requirements.txt", folder)
    (folder / "engine").mkdir()
    (folder / "engine" / "__init__.py").write_text('__version__ = "0"\n')
    return folder


def build(source: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as `make setup` does, after other code; PATH has no compiler unless given."""
    path = source.parent / "bin"
    path.mkdir(exist_ok=True)
    for tool in TOOLS:
        if not (path / tool).exists():
            (path / tool).symlink_to(shutil.which(tool) or "")
    run = f"import runpy, sys; sys.argv[1:] = ['-q', 'build_ext', '--inplace']; {code}\n"
    run += "runpy.run_path('setup.py', run_name='__main__')"
    kept = {name: os.environ[name] for name in ("HOME", "VIRTUAL_ENV") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", run],
        cwd=source,
        env={**kept, "PATH": str(path), **environment},
        text=True,
        capture_output=True,
    )


def last_line(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("superbert-engine: "), ended.stderr
    return line


def told(line: str) -> None:
    """The page has the line, or its beginning up to what differs."""
    words = re.sub(r"\s+", " ", PAGE.text)
    assert line.removeprefix("superbert-engine: ").removesuffix(" (docs/install.md)") in words


def test_no_compiler(source: Path) -> None:
    told(last_line(build(source)))
    assert not (source / "build").exists()


def test_no_torch(source: Path) -> None:
    hidden = "import importlib.util as u; u.find_spec = lambda name: None"
    told(last_line(build(source, hidden)).split(" (pip")[0])


def test_the_setuptools_of_a_new_environment(source: Path) -> None:
    """Python 3.11's own has no wheels, which ends in a traceback otherwise."""
    line = last_line(build(source, "import setuptools as s; s.__version__ = '65.5.0'"))
    told(line.replace("65.5.0", "65.5"))


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_another_system(source: Path, system: str) -> None:
    line = last_line(build(source, f"import setuptools; sys.platform = {system!r}"))
    assert system in line
    told(line.replace(system, "win32"))


def test_a_compiler_that_fails_is_not_kept(source: Path) -> None:
    ended = build(source, CXX="/bin/false")
    told(last_line(ended))
    assert "/bin/false" in ended.stderr
    assert "no C++ compiler" in build(source).stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on this machine")
def test_an_old_compiler(source: Path) -> None:
    old = source / "old-g++"
    old.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=9 "$@"\n')
    old.chmod(0o755)
    ended = build(source, CXX=str(old), PATH=os.environ["PATH"])
    told(last_line(ended))
    words = re.sub(r"\s+", " ", ended.stderr)
    (line,) = re.findall(r"GNU 9\S+ (does not compile this: .*? in CXX)", words)
    told(line)


def test_an_old_python(source: Path) -> None:
    old = source / "python3.10"
    version = "import sys; sys.version_info = (3, 10, 0); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{version}" "$2"\n')
    old.chmod(0o755)
    ended = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=source, capture_output=True, text=True
    )
    assert ended.returncode
    told(ended.stderr.splitlines()[0])
    assert not (source / ".venv").exists()


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    for name in ("__init__.py", "_extension.py"):
        shutil.copy(REPOSITORY / "kernels" / "_extension.py", tmp_path / name)
    code = "import _extension"
    (tmp_path / "__init__.py").unlink()
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    told(ended.stderr.decode().splitlines()[-1].removeprefix("ImportError: "))
    (tmp_path / "libsuperbert.so").write_bytes(b"no library")
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    line = ended.stderr.decode().splitlines()[-1]
    assert f"torch {torch.__version__}" in line
    assert "libsuperbert.so" in line
    told(line.removeprefix("ImportError: ").split(torch.__version__)[0].strip())


def test_the_variables_and_targets() -> None:
    """Those of the table are read somewhere, and the default targets are CMake's."""
    source = "".join(
        (REPOSITORY / name).read_text()
        for name in ("setup.py", "CMakeLists.txt", "engine/data/cache.py", "engine/__init__.py")
    )
    names = re.findall(r"^\| `(\w+)` \| (?:build|run) \|", PAGE.section("Variables"), re.M)
    ours = [name for name in names if name.startswith("SUPERBERT_")]
    assert ours == ["SUPERBERT_CUDA", "SUPERBERT_CUDA_ARCHITECTURES", "SUPERBERT_CACHE"]
    assert all(name in source for name in [*ours, "THP_MEM_ALLOC_ENABLE"])
    (default,) = re.findall(r'SUPERBERT_CUDA_ARCHITECTURES "(.*?)"', source)
    assert f"`{default}`" in PAGE.section("Variables")


def test_the_versions() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert {"torch>=2.11,<2.14", "setuptools>=77"} <= set(project["build-system"]["requires"])
    assert "pip install 'torch>=2.11,<2.14' 'setuptools>=77' cmake ninja" in PAGE.text
    extras = project["project"]["optional-dependencies"]
    assert all(f"`{extra}`" in PAGE.text for extra in extras if extra != "test")


def test_what_runs_without_cuda_code() -> None:
    """The methods that need the solvers of the CUDA code, and the operators that fall back."""
    folder = REPOSITORY / "kernels" / "balancing"
    needing = {
        path.stem
        for path in folder.glob("*.py")
        if "from .solvers import" in path.read_text() and path.stem != "solvers"
    }
    (told_of,) = re.findall(r"slower\.((?: `\w+`,?| and)+)", re.sub(r"\s+", " ", PAGE.text))
    assert set(re.findall(r"`(\w+)`", told_of)) == needing
    if not _extension.has_kernel("gram", "CUDA"):
        for op in ("gram", "pcgrad_weights", "combine", "combine_adamw_"):
            assert backend(op, "cuda") == "torch"
    for op in ("linear_task_gradients_", "attention_plan", "dropout"):
        assert backend(op, "cuda") == "triton"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    PAGE.run_python()
    printed = capsys.readouterr().out.strip()
    assert f"# {printed}" in PAGE.text or f"or {printed}" in PAGE.text


def test_the_processors() -> None:
    """Each unit of the table is one that the library can be limited to, in the same order."""
    rows = re.findall(r"^\| (.*?) \|", PAGE.section("Processors"), re.M)[2:]
    source = (REPOSITORY / "csrc" / "cpu_isa.h").read_text()
    units = re.findall(
        r"\bk(\w+)", re.findall(r"enum class VectorUnit.*?\{(.*?)\}", source, re.S)[0]
    )
    assert len(rows) == len(units) == 5
    for row, unit in zip(rows[1:], units[1:], strict=True):
        assert unit.lower() in re.sub(r"[- ]", "", row).lower()
