"""``python .ci/cuda_stand_ins.py TORCH``: load PyPI's CUDA build of torch without CUDA's libraries.

The wheel has 0.5 GB and the libraries that it loads 2 GB, of which nothing is called on a machine
without a GPU.  Small libraries of their names, in ``TORCH/lib``, define what torch leaves to them:
functions that return 100, which is ``cudaErrorNoDevice``, so that torch finds no GPU, or a text.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

_CUDA = re.compile(r"(lib)?(cu[A-Za-z]|__cuda|nccl|nvrtc|nvshmem)")
_TEXT = re.compile(r"[a-z]+GetError(String|Name)|ncclGetLastError")
"""Functions that return a text, with which torch words its exceptions."""

_LIBRARY_OF = {"NVSHMEM": "libnvshmem_host.so.3", "": "libnccl.so.2"}
"""Libraries of versions that are not named after them; any may define what has no version."""


def lines(*command: str) -> list[list[str]]:
    """Return the words of each line that a command prints."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in text.splitlines()]


def compile_library(path: Path, functions: set[str], version: str) -> None:
    """Build a library whose functions have a version if it is not empty."""
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    text, number = 'const char *{}(void) {{ return "no GPU"; }}', "int {}(void) {{ return 100; }}"
    form = {name: text if _TEXT.fullmatch(name) else number for name in functions}
    source.write_text("\n".join(form[name].format(name) for name in functions))
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}"]
    if version:
        script.write_text(f"{version} {{ global: *; }};\n")
        options.append(f"-Wl,--version-script={script}")
    subprocess.run(["cc", *options, "-o", str(path), str(source)], check=True)
    source.unlink()
    script.unlink(missing_ok=True)


def main() -> None:
    """Write a library for each that torch lacks."""
    folder = Path(sys.argv[1]) / "lib"
    own = [*folder.glob("libtorch*.so"), folder / "libc10_cuda.so"]
    needed: set[str] = set()
    undefined: defaultdict[str, set[str]] = defaultdict(set)
    for library in own:
        for words in lines("readelf", "--dynamic", str(library)):
            if "(NEEDED)" in words:
                needed.add(words[-1].strip("[]"))
        for *_, kind, symbol in lines("nm", "--dynamic", str(library)):
            name, _, version = symbol.partition("@")
            if kind == "U" and _CUDA.match(name):
                undefined[version].add(name)
    library_of = {_LIBRARY_OF.get(version, version): version for version in undefined}
    missing = {name for name in needed if _CUDA.match(name)} | set(library_of)
    for name in sorted(missing):
        version = library_of.get(name, "")
        compile_library(folder / name, undefined[version] if name in library_of else set(), version)
    print(f"{sum(map(len, undefined.values()))} functions of {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
