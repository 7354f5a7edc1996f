"""Anchors, passages and negatives: every layout of file, their numbers, ugly input."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from engine.data.cache import load_split
from engine.data.origins import DataFile, HubSplit
from engine.data.source import TaskSource
from engine.data.split import tokenize
from engine.data.table import Table
from engine.data.task_batch import TextIds
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

ROWS = [
    {"anchor": "why is the sky blue?", "positive": "Light scatters.", "negative": "I like blue."},
    {"anchor": "who wrote it?", "positive": "Ann did, in 1818.", "negative": "Light scatters."},
    {"anchor": "WHY is the sky blue?", "positive": "Air, mostly.", "negative": "It is raining."},
]
COLUMNS = tuple(ROWS[0])


def source_of(name: str, columns: tuple[str, ...] = COLUMNS, **fields: object) -> TaskSource:
    given = {"kind": "retrieval", "text": columns, "files": {"train": name}}
    return TaskSource(**(given | fields))


def written(folder: Path, name: str) -> Path:
    path = folder / name
    cells = [COLUMNS, *(tuple(row.values()) for row in ROWS)]
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        path.write_text("".join(",".join(f'"{c}"' for c in row) + "\r\n" for row in cells))
    elif name.endswith(".tsv"):
        path.write_text("".join("\t".join(row) + "\n" for row in cells))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(path: Path, columns: tuple[str, ...] = COLUMNS, **how) -> Table:
    form = source_of(path.name, columns).format("answers")
    return DataFile(path).table(form, **({"labelled": True, "on_bad_row": "error"} | how))


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[:2]])
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str, columns) -> None:
    path = written(tmp_path, name)
    for labelled in (True, False):
        table = read(path, columns, labelled=labelled)
        assert table.sentences == tuple([row[column] for row in ROWS] for column in columns)
    assert read(path, columns).labels.tolist() == [1, 1, 1]


def test_a_data_set_gives_the_same_table(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train-00000.parquet")
    form = source_of("t.csv").format("answers")
    table = HubSplit(str(tmp_path), "", "train").table(form, labelled=True, on_bad_row="error")
    assert table.sentences == tuple([row[column] for row in ROWS] for column in COLUMNS)


def test_texts_of_the_same_tokens_have_one_number(tmp_path: Path) -> None:
    """Case is nothing to this tokenizer; and the cache keeps the numbers."""
    path, form = written(tmp_path, "t.jsonl"), source_of("t.jsonl").format("answers")
    tokenizer = Tokenizer.train([text for row in ROWS for text in row.values()], 200)
    split = tokenize(
        "answers", read(path), tokenizer, 32, schema=source_of(path.name).format("answers")
    )
    assert split.text_ids.tolist() == [[0, 1, 2], [3, 4, 1], [0, 7, 8]]
    cut = tokenize(
        "answers", read(path), tokenizer, 3, schema=source_of(path.name).format("answers")
    )
    assert cut.text_ids[1, 2] == cut.text_ids[0, 1], "cut to the same first token"
    labels = split.task_batch(np.array([2, 0]), 0).labels
    assert isinstance(labels, TextIds)
    assert labels.ids.tolist() == [[0, 7, 8], [0, 1, 2]]
    for _ in range(2):
        kept = load_split(DataFile(path), form, tokenizer, 32, cache=tmp_path / "cache")
        assert np.array_equal(kept.text_ids, split.text_ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"positive": ""}, "empty sentence: column 'positive', "),
        ({"anchor": "  "}, "empty sentence: column 'anchor', "),
        ({"negative": ""}, "empty sentence: column 'negative', "),
        ({"positive": None}, "neither text nor number: no value in column 'positive', "),
        ({"positive": ["a", "b"]}, "neither text nor number: list in column 'positive', "),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ROWS[0], ROWS[1] | row)))
    with pytest.raises(InputError) as error:
        read(path)
    assert message in str(error.value)
    assert "t.jsonl:2" in str(error.value)
    assert len(read(path, on_bad_row="skip")) == 1


def test_an_anchor_without_a_passage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"anchor": "why?"}) + "\n")
    with pytest.raises(InputError, match=r"missing column: 'positive'; there is 'anchor', .*:2;"):
        read(path)
    (tmp_path / "t.tsv").write_text("anchor\tpositive\tnegative\nwhy?\tso.\tno.\nwho?\n")
    with pytest.raises(InputError, match=r"number of fields.*t\.tsv:3"):
        read(tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ("anchor",)}, "text: retrieval needs the columns of an anchor and of a passage"),
        ({"text": ("a", "b", "a")}, "text: a column stands twice"),
        ({"text": tuple(map(str, range(19)))}, "at most 18"),
        ({"label": "score"}, "label: has no effect on retrieval; leave it out"),
        ({"classes": ("no", "yes")}, "classes: has no effect on retrieval; leave it out"),
        ({"range": (0, 1)}, "range: has no effect on retrieval; leave it out"),
        ({"scheme": "BIO"}, "scheme: has no effect on retrieval"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_of("t.jsonl", **fields)
    with pytest.raises(ValueError, match=r"text: pair_regression needs 2 column\(s\), got 3"):
        source_of("t.jsonl", kind="pair_regression")
