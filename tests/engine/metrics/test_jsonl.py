"""Lines of steps in pieces: put aside when long, cut when a run goes back."""

import json
from pathlib import Path

import pytest

from engine.metrics.jsonl import StepLines

LIMIT = 200


def lines(*steps: int) -> list[dict]:
    return [{"step": step, "filling": "x" * 20} for step in steps]


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Twenty steps, four at a time: three pieces put aside and one that grows."""
    path = tmp_path / "metrics.jsonl"
    written = StepLines(path, limit=LIMIT)
    written.cut(0)
    for first in range(0, 20, 4):
        written.append(lines(*range(first, first + 4)))
    (tmp_path / "metrics-notes.jsonl").write_text("mine")
    return path


def names(path: Path) -> dict[str, list[int]]:
    return {piece.name: steps_of(piece) for piece in StepLines(path).pieces}


def test_a_long_file_is_put_aside(path):
    assert names(path) == {
        "metrics-00000000.jsonl": [0, 1, 2, 3, 4, 5, 6, 7],
        "metrics-00000008.jsonl": [8, 9, 10, 11, 12, 13, 14, 15],
        "metrics.jsonl": [16, 17, 18, 19],
    }


def test_only_so_many_stay(path):
    kept = StepLines(path, limit=LIMIT, keep=1)
    kept.append(lines(*range(20, 24)))
    assert names(path) == {"metrics-00000016.jsonl": list(range(16, 24))}
    assert (path.parent / "metrics-notes.jsonl").read_text() == "mine"


@pytest.mark.parametrize("start", [0, 1, 5, 8, 9, 15, 16, 18, 20, 99])
def test_going_back_leaves_the_steps_before(path, start):
    with path.open("a") as file:
        file.write('{"step": 20, "fil')  # the disk was full
    written = StepLines(path, limit=LIMIT)
    written.cut(start)
    left = [step for steps in names(path).values() for step in steps]
    assert left == list(range(min(start, 20)))
    written.append(lines(*range(len(left), 30)))
    assert [step for steps in names(path).values() for step in steps] == list(range(30))


def test_cut_off_between_two_pieces(path):
    path.unlink()
    StepLines(path).cut(12)
    assert names(path) == {
        "metrics-00000000.jsonl": list(range(8)),
        "metrics.jsonl": [8, 9, 10, 11],
    }
