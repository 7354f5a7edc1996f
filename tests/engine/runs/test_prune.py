"""Finished runs lose their checkpoints where that is asked for, and nothing else does."""

import os
from pathlib import Path

import pytest

from engine.runs.folder import claimed
from engine.runs.prune import is_pruned, prune
from engine.utils.errors import InputError


def checkpoint(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "manifest.json").write_text("{}")
        (folder / "checkpoints" / name / "model.safetensors").write_text("weights")
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").touch()
    return folder


def test_every_kind_goes_and_what_is_not_ours_stays(tmp_path):
    names = ("step-00000001", "best-00000001", "top-00000002", "average-00000002")
    run = checkpoint(tmp_path / "run", *names, "mine", "step-00000009")
    (run / "checkpoints/step-00000009/notes.txt").write_text("mine")
    (run / "metrics.jsonl").write_text("kept")
    prune(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["mine", "pruned.txt", "step-00000009"]
    assert (run / "checkpoints/step-00000009/model.safetensors").read_text() == "weights"
    assert (run / "metrics.jsonl").read_text() == "kept"
    assert is_pruned(run)


def test_nothing_is_marked_where_there_is_nothing(tmp_path):
    run = checkpoint(tmp_path / "run")
    prune(run)
    assert os.listdir(run) == ["recipe.toml"]


def test_a_link_is_left(tmp_path):
    """What it names may be another's run."""
    other = checkpoint(tmp_path / "other", "best-00000001")
    (tmp_path / "link").symlink_to(other)
    prune(tmp_path / "link")
    run = checkpoint(tmp_path / "run")
    (run / "checkpoints").symlink_to(other / "checkpoints")
    prune(run)
    assert os.listdir(other / "checkpoints") == ["best-00000001"]


def test_a_run_that_another_process_trains_is_left(tmp_path):
    run = checkpoint(tmp_path / "run", "step-00000001")
    with claimed(run, resumes=True), pytest.raises(InputError, match="another process"):
        prune(run)
    assert os.listdir(run / "checkpoints") == ["step-00000001"]
