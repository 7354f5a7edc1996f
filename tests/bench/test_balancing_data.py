"""SST with two classes, made of SST with five."""

import csv
from pathlib import Path

import pytest

from bench.balancing import data
from engine.utils.errors import InputError

HEADER = "\tid\tsentence\tsentiment\n"


def write_sst(folder: Path) -> Path:
    """Each class, and sentences with quotes, which are no quotes of the file."""
    folder.mkdir()
    texts = ("awful", "bad", "it is", "`` good ''", 'a "great" film')
    rows = "".join(f"{row}\tid{row}\t{text}\t{row}\n" for row, text in enumerate(texts))
    for split in ("train", "dev"):
        (folder / f"ids-sst-{split}.csv").write_text(HEADER + rows)
    return folder


def test_neutral_sentences_are_left_out(tmp_path: Path) -> None:
    source, out = write_sst(tmp_path / "in"), tmp_path / "out"
    assert data.main(["--data", str(source), "--out", str(out)]) == 0
    with (out / "sst-polarity-dev.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [
        ["id", "sentence", "polarity"],
        ["id0", "awful", "negative"],
        ["id1", "bad", "negative"],
        ["id3", "`` good ''", "positive"],
        ["id4", 'a "great" film', "positive"],
    ]
    assert (out / "ids-sst-dev.csv").read_text() == (source / "ids-sst-dev.csv").read_text()
    assert data.main(["--data", str(source), "--out", str(out)]) == 0  # again, over its own


def test_without_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        data.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
