"""Tasks of one's own: the same rows from every kind of source, and faults named by place."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import parquet
from pydantic import ValidationError

from engine.data import hf_datasets
from engine.data.cache import load_split
from engine.data.origins import DataFile, HubSplit
from engine.data.source import TaskSource
from engine.data.table import parse_table
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

NAMES = ("weather", "music", "alarm")
ROWS = [
    {"utterance": "will it rain, today?", "intent": "weather"},
    {"utterance": 'play "Für Elise"', "intent": "music"},
    {"utterance": "wake me\nat six", "intent": "alarm"},
    {"utterance": "any snow", "intent": "weather"},
]
SOURCE = TaskSource(
    kind="classification",
    text=("utterance",),
    label="intent",
    classes=NAMES,
    files={"train": "rows.csv"},
)


def write(folder: Path, ending: str, rows: list[dict]) -> Path:
    """Write rows by the library that their kind of file is usually written with."""
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).to_csv(path, sep={".csv": ",", ".tsv": "\t"}[ending])
    return path


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".tsv"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, ending: str) -> None:
    # A row of a tab-separated file is one line.
    rows = [row | {"utterance": row["utterance"].replace("\n", " ")} for row in ROWS]
    rows = rows if ending == ".tsv" else ROWS
    file = DataFile(write(tmp_path, ending, rows))
    table = file.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")
    assert table.ids == ["0", "1", "2", "3"]
    assert table.sentences == ([row["utterance"] for row in rows],)
    np.testing.assert_array_equal(table.labels, [0, 1, 2, 0])


@pytest.mark.parametrize("stored_as", ["names", "numbers"])
def test_a_data_set_gives_the_same_table(tmp_path: Path, stored_as: str) -> None:
    # A data set of the hub is a folder of Parquet files; a folder is loaded the same way.
    data = Dataset.from_list(ROWS)
    if stored_as == "numbers":
        data = data.cast(
            Features(utterance=Value("string"), intent=ClassLabel(names=sorted(NAMES)))
        )
    data.to_parquet(tmp_path / "train-00000.parquet")
    split = HubSplit(str(tmp_path), "", "train")
    table = split.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")
    assert table.sentences == ([row["utterance"] for row in ROWS],)
    np.testing.assert_array_equal(table.labels, [0, 1, 2, 0])
    tail = HubSplit(str(tmp_path), "", "train[50%:]")
    assert len(tail.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")) == 2
    assert tail.digest() != split.digest()


@pytest.mark.parametrize(
    ("ending", "rows", "reason", "place"),
    [
        (
            ".jsonl",
            [ROWS[0], {"intent": "music"}],
            "missing column: 'utterance'; there is 'intent'",
            ":2",
        ),
        (".jsonl", [ROWS[0], {"utterance": ["a"], "intent": "music"}], "list in column", ":2"),
        (".csv", [ROWS[2], {"utterance": "hm", "intent": "cook"}], "not among the classes", ":4"),
        (".parquet", [ROWS[0], {"utterance": " ", "intent": "music"}], "empty sentence", ", row 1"),
        (".parquet", [ROWS[0], {"utterance": None, "intent": "music"}], "no value", ", row 1"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, ending, rows, reason, place) -> None:
    file = DataFile(write(tmp_path, ending, rows))
    with pytest.raises(InputError) as error:
        file.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")
    assert reason in str(error.value)
    assert f"rows{ending}{place}" in str(error.value)
    table = file.table(SOURCE.format("intent"), labelled=True, on_bad_row="skip")
    assert table.ids == ["0"]
    assert sum(table.bad_rows.values()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("rows.csv", b"utterance,intent\nhm,caf\xe9\n", "not UTF-8.*rows.csv:2"),
        ("rows.csv", b'utterance,intent\n"hm,music\n', "not CSV.*rows.csv:2"),
        ("rows.csv", b"text,intent\nhm,music\n", "no column 'utterance'.*'text', 'intent'"),
        ("rows.csv", b"", "empty file"),
        ("rows.csv", b"utterance,intent,intent\n", "names a column twice: 'intent'"),
        ("rows.jsonl", b"[1]\n", "not a JSON object"),
        ("rows.jsonl", b'{"utterance": "x"\n', "not JSON"),
        ("rows.ods", b"", "unknown ending"),
        ("rows.xlsx", b"", "an archive"),
        ("rows.csv.zip", b"", "an archive"),
        ("rows.csv", b"PK\3\4", "a zip archive"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    file = DataFile(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        file.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")
    assert "\n" not in str(error.value)


def test_a_data_set_that_cannot_be_read_on(tmp_path: Path, monkeypatch) -> None:
    """It is not the cache that cannot be written."""
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train-00000.parquet")
    split = HubSplit(str(tmp_path), "", "train")

    def fail(self: object) -> NoReturn:
        raise OSError("Input/output error")

    monkeypatch.setattr(Dataset, "__iter__", fail)
    words = Tokenizer.train(["a b"], 60)
    with pytest.raises(InputError, match=r"cannot load split train \(Input/output error\)"):
        load_split(split, SOURCE.format("intent"), words, 16, cache=tmp_path / "cache")


def test_a_data_set_that_cannot_be_used(tmp_path: Path) -> None:
    form = SOURCE.format("intent")
    data = Dataset.from_list([{"text": "x", "intent": "music"}])
    data.to_parquet(tmp_path / "train-00000.parquet")
    with pytest.raises(InputError, match="cannot load split nowhere"):
        HubSplit(str(tmp_path), "", "nowhere").digest()
    with pytest.raises(InputError, match="no column 'utterance'"):
        HubSplit(str(tmp_path), "", "train").table(form, labelled=True, on_bad_row="error")


def test_kinds_and_ranges() -> None:
    def source(**fields: object) -> TaskSource:
        return TaskSource(**({"text": ("a",), "files": {"train": "f.csv"}} | fields))

    two = source(kind="classification", classes=("no", "yes")).format("t")
    assert (two.kind, two.high, two.parse_label(" yes ")) == ("binary", 1, 1.0)
    five = source(kind="classification", classes=5).format("t")
    assert (five.kind, five.high, five.spell_label(4.0)) == ("classes", 4, "4")
    with pytest.raises(ValueError, match="outside 0 to 4"):
        five.parse_label("5")
    score = source(kind="pair_regression", text=("a", "b"), range=(-1, 1)).format("t")
    assert (score.kind, score.low, score.high, score.parse_label("-0.5")) == ("score", -1, 1, -0.5)
    with pytest.raises(ValueError, match="outside -1 to 1"):
        score.parse_label("-1.5")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ("a", "b")}, "needs 1 column"),
        ({"classes": ()}, "at least two"),
        ({"classes": ("a", "a")}, "stands twice"),
        ({"dataset": "name"}, "either files or dataset"),
        ({"files": {}}, "either files or dataset"),
        ({"kind": "regression", "range": (5, 0)}, "smaller bound first"),
    ],
)
def test_sources_that_make_no_sense(fields, message) -> None:
    good = {"kind": "classification", "text": ("a",), "classes": 2, "files": {"train": "f.csv"}}
    with pytest.raises(ValueError, match=message):
        TaskSource(**(good | fields))


def test_a_library_that_reads_pickles_is_refused(monkeypatch):
    monkeypatch.setattr(hf_datasets.metadata, "version", lambda _: "5.1.0")
    with pytest.raises(InputError, match=r"datasets 5\.1\.0 loads pickles"):
        HubSplit("pandas", "", "train").digest()


def test_half_a_character_is_a_bad_row():
    content = b'{"utterance": "\\ud800", "intent": "music"}'
    form = SOURCE.format("intent")
    with pytest.raises(InputError, match="not Unicode: half of a character in column 'utterance'"):
        parse_table(content, Path("rows.jsonl"), form)


@pytest.mark.parametrize("name", ["../rows.csv", "a/../../rows.csv", "a\0b.csv", "a\nb.csv"])
def test_names_of_files_that_trick(name):
    with pytest.raises(ValidationError, match="a name"):
        TaskSource.model_validate(SOURCE.model_dump() | {"files": {"train": name}})


OUT = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: {}
---
"""


@pytest.mark.parametrize(
    "path", ["../secret.csv", "/{}/secret.csv", "sub/../../secret.csv", "./../*.csv", "../**"]
)
def test_a_data_set_reads_no_file_but_its_own(tmp_path: Path, path: str) -> None:
    Dataset.from_list(ROWS).to_csv(tmp_path / "secret.csv")
    (tmp_path / "set" / "sub").mkdir(parents=True)
    Dataset.from_list(ROWS).to_csv(tmp_path / "set" / "own.csv")
    readme = tmp_path / "set" / "README.md"
    readme.write_text(OUT.format(path.replace("{}", str(tmp_path))))
    with pytest.raises(InputError, match=r"its README\.md names .*secret\.csv") as error:
        HubSplit(str(tmp_path / "set"), "", "train").digest()
    assert "\n" not in str(error.value)
    readme.write_text(OUT.format("own.csv"))
    table = HubSplit(str(tmp_path / "set"), "", "train")
    assert len(table.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")) == 4


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "https://elsewhere/x.csv",
        "hf://datasets/other/set@main/x.csv",
        "hf://datasets/own/set-2@main/x.csv",
        "hf://datasets/own/set@main/../../../other/x.csv",
        "zip://x.csv::https://elsewhere/x.zip",
    ],
)
def test_a_data_set_of_the_hub_reads_no_file_but_its_own(file: str) -> None:
    def builder(*files: str) -> SimpleNamespace:
        config = SimpleNamespace(data_files={"train": list(files)})
        return SimpleNamespace(repo_id="own/set", config=config)

    own = "hf://datasets/own/set@main/data/train.csv"
    hf_datasets._check_files("own/set", builder(own))
    with pytest.raises(InputError, match=r"its README\.md names"):
        hf_datasets._check_files("own/set", builder(own, file))


def test_a_folder_of_data_files_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "set").mkdir()
    for folder in ("other", "set"):
        Dataset.from_list(ROWS).to_csv(tmp_path / folder / "train.csv")
    readme = "---\nconfigs:\n- config_name: default\n  data_dir: ../other\n---\n"
    (tmp_path / "set" / "README.md").write_text(readme)
    with pytest.raises(InputError, match=r"names .*other"):
        HubSplit(str(tmp_path / "set"), "", "train").digest()


@pytest.mark.parametrize("member", ["a.pth", "a.pt", "a.pkl", "a.pickle", "a.npy", "a.json"])
def test_no_archive_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    """A tar of samples, whose members the library loads by their endings, tensors by torch."""
    torch.save({"utterance": "x"}, tmp_path / "tensor")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as archive:
        archive.add(tmp_path / "tensor", member)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InputError, match="would be read as webdataset; only arrow, "):
        HubSplit(str(tmp_path / "set"), "", "train").digest()


@pytest.mark.parametrize("ending", [".png", ".wav", ".h5", ".pkl", ".py", ".xml", ".pdf"])
def test_what_reads_other_kinds_of_files_is_not_used(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"train{ending}").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"would be read as|cannot load split train"):
        HubSplit(str(tmp_path), "", "train").digest()


@pytest.mark.parametrize("name", ["csv", "json", "text", "parquet"])
def test_a_format_is_no_data_set(tmp_path: Path, monkeypatch, name: str) -> None:
    """The library would take what lies in the working directory."""
    (tmp_path / "train.csv").write_text("utterance,intent\nhm,music\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no data set but a format"):
        HubSplit(name, "", "train").digest()


def test_no_file_is_opened_for_a_column(tmp_path: Path) -> None:
    """A data set may say of any text that it is the path of an image."""
    data = Dataset.from_dict(
        {"utterance": [str(tmp_path / "secret.png")], "intent": ["music"]},
        features=Features(utterance=Image(), intent=Value("string")),
    )
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train-00000.parquet")
    split = HubSplit(str(tmp_path / "set"), "", "train")
    with pytest.raises(InputError, match=r"column 'utterance' holds neither text .* but Image"):
        split.table(SOURCE.format("intent"), labelled=True, on_bad_row="error")
