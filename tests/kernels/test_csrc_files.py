"""Headers of csrc/ that know torch say so in their names, and csrc/README.md names every file."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.iterdir() if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
HEADERS = [path for path in SOURCES if path.suffix in {".h", ".cuh"}]


def includes(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE)


def knows_torch(source: Path) -> bool:
    return any(
        name.startswith(("torch/", "ATen/", "c10/")) or Path(name).stem.endswith("_torch")
        for name in includes(source)
    )


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_headers_that_include_torch_end_in_torch(header: Path) -> None:
    assert knows_torch(header) == header.stem.endswith("_torch")


@pytest.mark.parametrize("ending", ["_simd.cpp", "_amx.cpp"])
def test_loops_for_vector_units_are_free_of_torch(ending: str) -> None:
    loops = [path for path in SOURCES if path.name.endswith(ending)]
    assert loops
    assert not [path.name for path in loops if knows_torch(path)]


def test_the_readme_names_every_file_and_no_other() -> None:
    text = (CSRC / "README.md").read_text()
    named = set(re.findall(r"`([a-z]\w*\.(?:h|cuh|cpp|cu))`", text))
    assert named == {path.name for path in SOURCES}
