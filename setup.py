"""Builds the C++/CUDA extension through CMake; everything else stands in pyproject.toml.

The library speaks LibTorch's stable ABI and knows nothing of CPython, so that one build serves
every Python and every torch from 2.11 on.  In the repository the packages stand at the top
(``engine``, ``kernels``); installed they are ``superbert.engine`` and ``superbert.kernels``.

CUDA code is built when the installed torch has CUDA and nvcc is at hand; ``SUPERBERT_CUDA=ON`` or
``OFF`` in the environment of the build decides otherwise.  ``SUPERBERT_CUDA_ARCHITECTURES`` names
the targets, as CMake does: ``90-real`` for an H100 or H200 alone builds three times as fast.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import setuptools


def stop(problem: str) -> NoReturn:
    """End with one line that says what is missing."""
    raise SystemExit(f"superbert-engine: {problem} (docs/install.md)")


if sys.platform != "linux":
    stop(f"builds on Linux, not on {sys.platform}: take WSL2 or a Linux container")
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libsuperbert.so"
COMPILERS = ("c++", "g++")


def find_tool(name: str) -> str | None:
    """Path of a build tool: beside this Python (a virtual environment's own) or on PATH."""
    return shutil.which(name, path=os.pathsep.join([sys.prefix + "/bin", os.environ["PATH"]]))


def cuda_wanted() -> bool:
    """Whether to build the CUDA code, as the module's docstring says."""
    choice = os.environ.get("SUPERBERT_CUDA", "")
    if choice not in ("", "ON", "OFF"):
        raise SystemExit(f"SUPERBERT_CUDA must be ON or OFF, not {choice!r}")
    if choice:
        return choice == "ON"
    import torch

    if torch.version.cuda is None:
        return False
    if find_tool("nvcc") is None:
        print(
            "torch has CUDA, but nvcc is not on PATH: building without CUDA code", file=sys.stderr
        )
        return False
    return True


def needed_tools() -> tuple[str, str]:
    """Return the paths of cmake and of the torch package; end where something is missing."""
    cmake, torch = find_tool("cmake"), importlib.util.find_spec("torch")
    if cmake is None or torch is None or torch.origin is None:
        stop(
            "building needs cmake and an installed torch (pip install --no-build-isolation); "
            "`make setup` does all of it"
        )
    if not os.environ.get("CXX") and not any(map(find_tool, COMPILERS)):
        stop("no C++ compiler on PATH: install g++ 12 or later, or name one in CXX")
    if not find_tool("ninja") and not find_tool("make"):
        stop("building needs ninja or make: pip install ninja")
    return cmake, str(Path(torch.origin).parent)


def run_cmake(arguments: list[str]) -> None:
    """Run CMake, whose own message says what went wrong."""
    if subprocess.run(arguments).returncode:
        stop("the C++ extension was not built: see the first error above")


class CMakeBuild(build_ext):
    """Runs CMake and puts the library into the package ``kernels``."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's place; without CPython's version, which it does not depend on."""
        *package, _ = fullname.split(".")
        return os.path.join(*package, LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Configure and build, then copy the library to where setuptools wants it."""
        cmake, torch = needed_tools()
        generator = ["-GNinja"] if find_tool("ninja") else []
        if ninja := find_tool("ninja"):
            generator.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        build_dir = ROOT / "build" / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), *generator),
            f"-DSUPERBERT_TORCH_DIR={torch}",
            f"-DSUPERBERT_CUDA={'ON' if cuda_wanted() else 'OFF'}",
        ]
        if targets := os.environ.get("SUPERBERT_CUDA_ARCHITECTURES"):
            configure.append(f"-DSUPERBERT_CUDA_ARCHITECTURES={targets}")
        built = build_dir / LIBRARY
        if not built.exists():  # a cache would keep the compiler that failed before
            (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        run_cmake(configure)
        # As many processes as there are cores, which --parallel means, or as CMake's variable says.
        parallel = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ else ["--parallel"]
        run_cmake([cmake, "--build", str(build_dir), *parallel])

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A fresh file, then a rename: a process that runs the old library keeps it whole.
        partial = target.with_suffix(".part")
        shutil.copyfile(built, partial)
        partial.replace(target)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``: see the module's docstring."""
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[
        f"superbert.{name}"
        for name in find_packages(include=["engine", "engine.*", "kernels", "kernels.*"])
    ],
    package_dir={"superbert.engine": "engine", "superbert.kernels": "kernels"},
    package_data={
        "superbert.engine": [
            "config/recipes/*.toml",
            "reporting/*.html",
            "reporting/*.toml",
            "py.typed",
        ],
        "superbert.kernels": ["py.typed"],
    },
    ext_modules=[Extension("superbert.kernels.libsuperbert", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
