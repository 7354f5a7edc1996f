"""Two ranks that each read their own part of a stream: trained, resumed, and refused."""

import json
from pathlib import Path

import pytest

from ...robustness.outcome import outcome
from ..data.streams import write_numbered, write_shards
from ..launch import launch, start
from ..test_streams import RECIPE
from ..whole_runs import metrics

pytestmark = pytest.mark.long


def arguments(folder: Path, out: str, *further: str) -> list[str]:
    given = [str(folder / "recipe.toml"), "--out", str(folder / out), "--device", "cpu"]
    return [*given, *further]


def written(folder: Path, sizes: list[int]) -> None:
    data = write_numbered(folder / "set", sizes)
    write_numbered(data, [12], "validation")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=data))


@pytest.mark.parametrize("sizes", [[20, 30], [20, 9, 21]])
def test_two_ranks_resume_to_the_bit(tmp_path, sizes) -> None:
    """Each has a file of its own, or, of three files, every other row."""
    written(tmp_path, sizes)
    settings = ("--set", "tasks.numbers.source.shuffle_buffer=8", "batch_size=7")
    runs = [
        arguments(tmp_path, "whole", *settings),
        arguments(tmp_path, "parts", *settings, "max_steps=16"),
        arguments(tmp_path, "parts", "--resume", *settings),
        arguments(tmp_path, "one", *settings, "micro_batches=1"),
    ]
    launch(2, runs[:3], tmp_path / "log")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")
    for rank in range(2):
        kept = json.loads((tmp_path / "parts" / f"stream-numbers-rank-{rank}.json").read_text())
        assert kept["marks"]
    launch(1, runs[3:], tmp_path / "log")
    assert metrics(tmp_path / "one") != metrics(tmp_path / "whole")
    said = "another number of ranks sees other batches"
    assert (tmp_path / "log").read_text().count(said) == len(runs)  # by the main rank alone


def test_tags_are_streamed_on_one_rank(tmp_path) -> None:
    rows = [{"sentence": "x y", "label": ["O", "B-X"]}] * 20
    data = write_shards(tmp_path / "set", [rows])
    write_shards(data, [rows], "validation")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=data))
    tags = ("kind=token_classification", "classes=['O','B-X']")
    settings = [f"tasks.numbers.source.{each}" for each in tags]
    run = arguments(tmp_path, "run", "--set", "tasks.numbers.head=tokens", *settings)
    statuses = [process.wait(timeout=120) for process in start(2, [run], tmp_path / "log")]
    assert 2 in statuses
    message = "error: tasks.numbers.source.streaming: ranks would have to know how many words"
    assert message in (tmp_path / "log").read_text()
