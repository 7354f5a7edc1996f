"""The check for retired words finds each in text and code, and leaves other English alone."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

from .retired_words import RETIRED, find_in_python, find_in_text

NAMES = [entry.pattern for entry in RETIRED if entry.identifiers_only]


def test_the_repository_has_none() -> None:
    command = [sys.executable, "-m", "tests.docs.retired_words"]
    process = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert process.stdout == ""
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "text",
    [
        "a door",
        "The Doors",
        "rooms",
        "the house",
        "what strangers wrote",
        "wiped",
        "wiping",
        "bad days",
        "packages lying ready",
        "brought along",
        "has to be listened to",
        "the vector is parted",
        "`engine/saver.py`",
        "engine.door.main",
        "kernels/hf.py",
        "python -m bench.peers",
        "tests/faults",
        "`watch_layers=10`",
        "--set lr=1e-4 order=cycle",
        "--set 'sinks=[]'",
        "tasks.sst.features=single",
        "objectives.NAME.limit",
    ],
)
def test_what_is_found_in_text_and_comments(text: str) -> None:
    assert {line for line, _, _ in find_in_text(f"first\n{text}")} == {1}
    assert {line for line, _, _ in find_in_python(f"x = 1\ny = 2  # {text}")} == {1}
    function = f'def f():\n    """One.\n\n    {text}\n    """'
    assert {line for line, _, _ in find_in_python(function)} == {3}
    assert not list(find_in_python(f"x = {text!r}"))


@pytest.mark.parametrize("name", [*NAMES, "run_door", "_wiped", "DOORS"])
def test_what_is_found_in_identifiers(name: str) -> None:
    assert [line for line, _, _ in find_in_python(f"x = 1\n{name} = 2")]


@pytest.mark.parametrize(
    "text",
    [
        "no room on the disk",
        "outdoors, warehouse, households and swiped",
        "regions of an image, published in order",
        "engine.training.trainer and engine/data/collate.py",
        "stands beside the layer",
        "the order=… of a call, a limit = 3",
        "--set task_schedule=cycle tasks.sst.first_n=3",
        "by the library implementation",
    ],
)
def test_other_english_is_left_alone(text: str) -> None:
    assert not list(find_in_text(text))
    assert not list(find_in_python(f"# {text}\n"))
