"""What is given to others names no folder of the machine that it was made on."""

from pathlib import Path

import pytest

from engine import export, report, train
from examples import five_tasks

MARK = "of-a-secret-project"
SMALL = ("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mark in its path, and a run on its files, its data set and its texts."""
    folder = tmp_path_factory.mktemp("user") / MARK
    five_tasks.main([str(folder / "five")])
    (folder / "five" / "corpus" / "texts").mkdir()
    text = folder / "five" / "corpus" / "texts" / "words.txt"
    text.write_text("a fine film .\nthe plot was dull .\n" * 20)
    settings = (
        'objectives.words.kind="simcse"',
        'objectives.words.files=["texts/words.txt"]',
        f'tasks.reviews.source.files.train="{folder}/five/corpus/reviews-train.csv"',
        'train=["reviews","stars","duplicates","similarity","topics","words"]',
    )
    arguments = ["--data", str(folder / "five" / "corpus"), "--max-steps", "2", "--set", *SMALL]
    recipe = str(folder / "five" / "five.toml")
    assert train.main([recipe, "--out", str(folder / "run"), *arguments, *settings]) == 0
    return folder


def check(written: Path) -> str:
    """Return the text of all files in a folder; none of them has the mark."""
    files = [path for path in written.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert MARK.encode() not in path.read_bytes(), path.name
        assert b"texts/words.txt" not in path.read_bytes(), path.name
    return "".join(path.read_text() for path in files if path.suffix in (".md", ".json", ".html"))


@pytest.mark.parametrize(
    "options",
    [[], ["--task", "topics"], ["--task", "topics", "--onnx"]],
    ids=["all", "task", "onnx"],
)
def test_an_export_has_names_without_paths(
    folder: Path, tmp_path: Path, options: list[str]
) -> None:
    assert export.main([str(folder / "run"), "--to", str(tmp_path / "out"), *options]) == 0
    card = check(tmp_path / "out")
    for name in ("reviews-train.csv", "words.txt", 'dataset = "topics"', 'data = "corpus"'):
        assert name in card


def test_an_adapter_names_its_base_without_a_path(folder: Path, tmp_path: Path) -> None:
    base = folder / "base-model"
    assert export.main([str(folder / "run"), "--to", str(base)]) == 0
    arguments = ["--init", str(base), "--out", str(folder / "lora"), "--max-steps", "1"]
    assert train.main(["demo", *arguments, "--set", "lora_rank=2", SMALL[-1]]) == 0
    assert export.main([str(folder / "lora"), "--to", str(tmp_path / "out")]) == 0
    assert '"base_model_name_or_path": "base-model"' in check(tmp_path / "out")


def test_a_report_has_names_without_paths(folder: Path, tmp_path: Path) -> None:
    assert report.main([str(folder / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "reviews-train.csv" in check(tmp_path / "out")
