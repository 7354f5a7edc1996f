"""Splits of a task that are written otherwise than the others, and further splits."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from engine.data.origins import HubSplit
from engine.data.table import Table, parse_table
from engine.utils.errors import InputError

from .written import source

FILES = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
BARE = {"text": (3,), "label": 1, "header": False, "quoting": "none", "files": FILES}
NAMED = {"header": True, "text": ("sentence",), "id": "index"}


def read(content: str, split: str, *, labelled: bool = False, name: str = "f.tsv", **fields):
    form = source(**fields).format("t", split)
    return parse_table(content.encode(), Path(name), form, labelled=labelled)


def shown(table: Table) -> tuple[list[str], list[str]]:
    return table.ids, table.sentences[0]


def test_a_split_has_its_own_columns_and_header() -> None:
    """As CoLA's: no header but in the test file, which has other columns."""
    fields = {**BARE, "of_split": {"test": NAMED}}
    rows, test = '1\tx\tIt "is.\n0\tx\tNo.\n', 'index\tsentence\n7\tIt "was.\n'
    for split in ("train", "dev"):
        table = read(rows, split, labelled=True, **fields)
        assert shown(table) == (["0", "1"], ['It "is.', "No."])
        assert table.labels.tolist() == [1, 0]
    assert shown(read(test, "test", **fields)) == (["7"], ['It "was.'])
    with pytest.raises(InputError, match="no column '3' in the first row"):
        read(test, "dev", **fields)


def test_only_what_a_split_gives_is_its_own() -> None:
    fields = {"files": FILES, "quoting": "none", "id": "key"}
    made = source(**fields, of_split={"dev": {"id": ""}, "test": {"label": "gold"}})
    train, dev, test = (made.format("t", split) for split in FILES)
    assert (train.id, dev.id, test.id) == ("key", "", "key")
    assert (train.label, dev.label, test.label) == ("label", "label", "gold")
    assert {form.dialect.quoting for form in (train, dev, test)} == {"none"}
    assert train == made.format("t") == made.format("t", "further")
    # Messages and the cache tell them apart.
    assert len({repr(form) for form in (train, dev, test)}) == 3
    assert dev.dialect.table == "tasks.t.source.of_split.dev"
    assert train.dialect.table == "tasks.t.source"


def test_a_message_names_the_table_of_the_split() -> None:
    fields = {"files": {"train": "a.csv", "dev": "b.csv"}, "of_split": {"dev": {"id": "key"}}}
    for split, table in (("train", "t.source"), ("dev", "t.source.of_split.dev")):
        with pytest.raises(InputError, match=rf"set tasks\.{table}\.delimiter = \";\""):
            read("key;text;label\n1;a;0\n", split, labelled=True, name="f.csv", **fields)


def test_the_columns_of_a_split_of_a_data_set(tmp_path: Path) -> None:
    Dataset.from_list([{"said": "yes", "n": 4}]).to_parquet(tmp_path / "test-00000.parquet")
    made = source(
        files={},
        dataset=str(tmp_path),
        splits={"train": "train", "hard_test": "test"},
        of_split={"hard_test": {"text": ["said"], "id": "n"}},
    )
    origin = made.origin("t", "hard_test", None)
    assert origin == HubSplit(str(tmp_path), "", "test")
    form = made.format("t", "hard_test")
    table = origin.table(form, labelled=False, on_bad_row="error")
    assert shown(table) == (["4"], ["yes"])


def test_labels_of_several_columns() -> None:
    """The classes are called as the columns of the source, whatever those of a split are."""
    kind = {"kind": "multi_label_classification", "classes": (), "label": ("good", "bad")}
    fields = {**kind, "files": FILES, "of_split": {"dev": {"label": ["g", "b"]}}}
    assert source(**fields).format("t", "dev").classes == ("good", "bad")
    table = read("text\tb\tg\nfine\t0\t1\n", "dev", labelled=True, **fields)
    assert table.labels.tolist() == [[1, 0]]


def test_texts_of_retrieval() -> None:
    """They have no label, not without a header either."""
    bare = {"kind": "retrieval", "classes": (), "text": (1, 2), "header": False, "files": FILES}
    table = read("who?\tme\n", "train", labelled=True, **bare)
    assert (table.sentences, table.labels.tolist()) == ((["who?"], ["me"]), [1])
    fields = {**bare, "of_split": {"test": {"header": True, "text": ["q", "p"]}}}
    assert read("p\tq\nme\twho?\n", "test", **fields).sentences == (["who?"], ["me"])
    for own, message in (
        ({"label": "x"}, "of_split.test.label: has no effect on retrieval"),
        ({"text": [1, 1]}, "of_split.test.text: a column stands twice"),
        ({"text": [1]}, "of_split.test.text: expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            source(**(fields | {"of_split": {"test": own}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"of_split": {"tset": {"id": "n"}}}, "of_split.tset: files has no such split"),
        ({"of_split": {"test": {}}}, "of_split.test: no field is given"),
        ({"of_split": {"test": {"text": ["a", "b"]}}}, r"of_split.test.text: expected 1 column"),
        ({"of_split": {"test": {"label": ["a", "b"]}}}, "of_split.test.label: expected as many"),
        ({"of_split": {"test": {"classes": 3}}}, "classes"),
        ({"of_split": {"test": {"delimiter": ", "}}}, "expected one character"),
        ({"of_split": {"test": {"header": False}}}, "of_split.test.text: without a header"),
        (
            {"of_split": {"test": {"header": False, "text": [1], "id": "key"}}},
            "of_split.test.id: without a header columns are called 1, 2, …, not 'key'",
        ),
        (
            {
                "files": {"train": "a.tsv", "test": "b.jsonl"},
                "of_split": {"test": {"header": True}},
            },
            "of_split.test.header: has no effect on files of this kind",
        ),
        (
            {"files": {}, "dataset": "x", "of_split": {"dev": {"encoding": "latin-1"}}},
            "of_split.dev.encoding: has no effect on a data set by name",
        ),
        (
            {"files": {}, "dataset": "x", "of_split": {"test": {"id": "n"}}},
            "of_split.test: splits has no such split",
        ),
        ({"files": {"train": "a.tsv", "dev set": "b.tsv"}}, "expected the name of a split"),
        ({"files": {"train": "a.tsv", "": "b.tsv"}}, "expected the name of a split"),
    ],
)
def test_what_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**({"files": FILES} | fields))


def test_a_file_without_effect_on_others_may_have_its_split_fields() -> None:
    """Quoting of the table says nothing of the JSON lines beside it, and is no fault of theirs."""
    files = {"train": "a.tsv", "dev": "b.jsonl"}
    fields = {"files": files, "quoting": "none", "of_split": {"dev": {"text": ["said"]}}}
    row = json.dumps({"said": "x", "label": 1})
    assert shown(read(row, "dev", name="b.jsonl", **fields)) == (["0"], ["x"])


def test_a_split_that_is_not_there() -> None:
    made = source(files={"train": "a.tsv", "valid": "b.tsv", "hard-1": "c.tsv"})
    assert made.origin("t", "hard-1", Path("d")).path == Path("d/c.tsv")
    said = r"tasks\.t\.source\.files: no dev split \(it has train, valid, hard-1\); name it there"
    with pytest.raises(InputError, match=said):
        made.origin("t", "dev", Path("d"))
