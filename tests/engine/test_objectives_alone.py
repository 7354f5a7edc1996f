"""A recipe without a task, which trains an encoder on text: what each command makes of its run."""

from pathlib import Path

import pytest

from engine import evaluate, export, fill, predict, train
from engine.config import recipe as recipes
from engine.utils.errors import InputError

RECIPE = """
description = "masked words of a text"
train = ["words"]
max_steps = 2
[encoder]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 48
vocab_size = 120
[objectives.words]
kind = "masked_lm"
files = ["text.txt"]
tokens_per_batch = 150
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    lines = [f"a line of words , number {number} of them ." for number in range(40)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "mine.toml").write_text(RECIPE)
    recipe, run = str(folder / "mine.toml"), str(folder / "run")
    assert train.main([recipe, "--data", str(folder), "--out", run]) == 0
    return folder


def test_it_can_go_on_and_be_begun_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [str(folder / "mine.toml"), "--data", str(folder), "--set", "max_steps=4"]
    assert train.main([*again, "--out", str(folder / "run"), "--resume"]) == 0
    assert "not scored: no task was trained" in capsys.readouterr().out
    further = ["demo", "--init", str(folder / "run"), "--set", "max_steps=1"]
    assert train.main([*further, "--out", str(folder / "further")]) == 0
    assert train.main([*again, "--out", str(folder / "dry"), "--dry-run"]) == 0


def test_it_is_exported_without_heads(folder: Path) -> None:
    assert export.main([str(folder / "run"), "--to", str(folder / "export")]) == 0
    card = (folder / "export/README.md").read_text()
    assert "heads.safetensors" not in card
    assert "words: text, from text.txt" in card
    assert (folder / "export/model.safetensors").exists()
    assert not (folder / "export/heads.safetensors").exists()


def test_it_fills_masks(folder: Path) -> None:
    assert fill.main([str(folder / "run"), "a line of [MASK] ."]) == 0


def test_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"run: has no task; objectives are not scored"):
        evaluate.main([str(folder / "run")])
    arguments = ["--task", "sst", "--input", str(folder / "text.txt"), "--output", "-"]
    with pytest.raises(InputError, match="run has no task"):
        predict.main([str(folder / "run"), *arguments])


def test_without_a_text(folder: Path) -> None:
    (folder / "none.toml").write_text(RECIPE.replace('files = ["text.txt"]', ""))
    with pytest.raises(InputError, match=r"objectives\.words: the recipe has no task; give files"):
        recipes.load(str(folder / "none.toml"))
    (folder / "blank.txt").write_text("\x01 \x02\n")
    arguments = [str(folder / "mine.toml"), "--data", str(folder), "--out", str(folder / "other")]
    with pytest.raises(InputError, match=r"objectives\.words: no text of it has a token"):
        train.main([*arguments, "--set", "objectives.words.files=['blank.txt']"])


def test_few_tokens_for_micro_batches(folder: Path) -> None:
    arguments = [str(folder / "mine.toml"), "--data", str(folder), "--out", str(folder / "few")]
    settings = ["micro_batches=4", "objectives.words.tokens_per_batch=20"]
    message = (
        r"objectives\.words\.tokens_per_batch = 20, 1 of the longest sequences: too small for 1 "
        "ranks with 4 micro_batches; raise it"
    )
    with pytest.raises(InputError, match=message):
        train.main([*arguments, "--set", *settings])
