"""The CUDA code compiles for every target, without warnings and spills, and goes into a library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..conftest import REPOSITORY

# Of torch for CUDA the library needs this alone; a stub stands for it where torch has none.
STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([sys.prefix + "/bin", os.environ["PATH"]]))


pytestmark = [
    pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not on this machine"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


def run_cmake(build: Path, cuda: str, target: str, linker_flags: str = "") -> None:
    cmake = find_tool("cmake")
    configure = [
        *(cmake, "-S", str(REPOSITORY), "-B", str(build), "-GNinja"),
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DSUPERBERT_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DSUPERBERT_CUDA={cuda}",
        f"-DCMAKE_MODULE_LINKER_FLAGS={linker_flags}",
    ]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(build), "--target", target], check=True)


def test_cuda_code_compiles_without_warnings_or_spills(build: Path) -> None:
    # CMakeLists.txt makes errors of warnings and of spills.
    run_cmake(build, "CHECK", "superbert_cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="the installed library has it already")
def test_the_library_with_cuda_needs_nothing_else_of_torch(build: Path, tmp_path: Path) -> None:
    stub = tmp_path / "libtorch_cuda.so"
    (tmp_path / "stub.c").write_text(STUB)
    link = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-o", str(stub)]
    subprocess.run([*link, str(tmp_path / "stub.c")], check=True)
    run_cmake(build, "ON", "superbert", f"-L{tmp_path}")
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL)\n"
        f"torch.ops.load_library({str(build / 'libsuperbert.so')!r})\n"
        "for key in ('CPU', 'CUDA'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key('superbert::gram', key), key\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
