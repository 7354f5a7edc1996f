"""The guide to data larger than memory: its recipe and commands, on small files."""

import re
from pathlib import Path

import pytest

from engine import cache, train
from engine.data.cached_entries import entries_of

GUIDE = Path(__file__).parents[2] / "docs" / "guide-large-data.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
SMALL = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "max_steps=2"),
]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPERBERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_many_files_of_a_split(tmp_path: Path, own_cache: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    rows = {"question1": ["how are you ?", "who is it ?"] * 4, "question2": ["how ?", "why ?"] * 4}
    rows |= {"is_duplicate": [1, 0] * 4}
    (tmp_path / "data/2024").mkdir(parents=True)
    for number in range(3):
        parquet.write_table(table(rows), tmp_path / f"data/2024/part-{number}.parquet")
    written = "question1\tquestion2\tis_duplicate\nwhat ?\twhat now ?\t1\n"
    (tmp_path / "data/corrections.tsv").write_text(written)
    (tmp_path / "data/dev").mkdir()
    (tmp_path / "data/dev/a.tsv").write_text(written)
    block = BLOCKS[0].replace("corrections.tsv.gz", "corrections.tsv")
    head = 'train = ["quora"]\n[tasks.quora]\nhead = "concat"\n'
    (tmp_path / "quora.toml").write_text(f'description = "pairs"\n{head}{block}')
    arguments = ["quora.toml", "--data", "data", "--out", "run", "--set", *SMALL]
    assert train.main(arguments) == 0
    # Three files of eight rows, and one of one.
    assert "tokens of 25 rows of quora" in {entry.what for entry in entries_of(own_cache)}


def test_the_cache(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = """
train = ["words"]
[objectives.words]
kind = "masked_lm"
files = ["corpus.txt"]
"""
    (tmp_path / "mine.toml").write_text(recipe)
    lines = [f"a text of some words , number {number} of them ." for number in range(60)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n")
    arguments = ["mine.toml", "--data", ".", "--out", "run", "--set", *SMALL]
    assert train.main(arguments) == 0
    assert {entry.data for entry in entries_of(own_cache)} >= {"corpus.txt"}

    commands = re.findall(
        r"^    python -m engine\.cache ?(.*?)(?: +#.*)?$", GUIDE.read_text(), re.M
    )
    assert commands == ["", "--unused-for 30", "--keep 20G"]
    for command in commands:
        assert cache.main(command.split()) == 0
        assert "corpus.txt" in capsys.readouterr().out
    assert cache.main(["--keep", "0"]) == 0
    assert not entries_of(own_cache)
