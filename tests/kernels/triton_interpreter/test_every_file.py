"""Every file of triton_cases/ is run under the interpreter."""

from pathlib import Path

from ..triton_cases import NAMES


def test_every_file_of_cases_has_a_test_here() -> None:
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tests == {*NAMES, "every_file"}
