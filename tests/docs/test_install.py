"""What the page about installing shows: messages, variables, names of GPUs, processors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
