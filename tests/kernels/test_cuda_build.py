"""The CUDA code compiles for every target: no warning, no register spill."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([sys.prefix + "/bin", os.environ["PATH"]]))


@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not on this machine")
def test_cuda_code_compiles_without_warnings_or_spills(tmp_path: Path) -> None:
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    configure = [
        *(cmake, "-S", str(REPOSITORY), "-B", str(tmp_path), "-GNinja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DSUPERBERT_TORCH_DIR={Path(torch.__file__).parent}",
        "-DSUPERBERT_CUDA=CHECK",
    ]
    subprocess.run(configure, check=True)
    # CMakeLists.txt makes errors of warnings and of spills.
    subprocess.run([cmake, "--build", str(tmp_path), "--target", "superbert_cuda"], check=True)
