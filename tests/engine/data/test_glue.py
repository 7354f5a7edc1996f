"""The six tasks of GLUE as their files are written."""

import pytest

from engine.utils.errors import InputError

from .glue import FILES
from .written import read

GLUE = {
    "CoLA": {"text": (4,), "label": 2, "header": False},
    "SST-2": {"text": ("sentence",)},
    "MRPC": {"text": ("#1 String", "#2 String"), "label": "Quality"},
    "STS-B": {"text": ("sentence1", "sentence2"), "label": "score", "kind": "pair_regression"},
    "QQP": {"text": ("question1", "question2"), "label": "is_duplicate"},
    "MNLI": {
        "text": ("sentence1", "sentence2"),
        "label": "gold_label",
        "classes": ("entailment", "neutral", "contradiction"),
    },
}
FIRST = {
    "CoLA": ('The "cat sat on the mat.', 1),
    "SST-2": ('a " fine film ', 1),
    "MRPC": ('"The rates rose, he said.', 1),
    "STS-B": ('"A man plays.', 5),
    "QQP": ('What is "this?', 0),
    "MNLI": ('He said "yes.', 1),
}


@pytest.mark.parametrize("task", GLUE)
def test_files_of_glue(task: str) -> None:
    fields = GLUE[task]
    if len(fields["text"]) == 2:
        fields = {"kind": "pair_classification"} | fields
    content, rows = FILES[task], FILES[task].rstrip().count(b"\n") + (task == "CoLA")
    table = read(content, "train.tsv", "skip", **fields, quoting="none")
    bad = {"number of fields": 1} if task == "QQP" else {}
    assert (table.bad_rows, table.notes) == (bad, ())
    assert len(table) == rows - sum(bad.values())
    assert (table.sentences[0][0], table.labels[0]) == FIRST[task]
    if task == "CoLA":
        assert table.sentences[0][3] == '"Whole sentences may be quoted"'
    if task not in ("SST-2", "MNLI"):  # their quotes begin no field
        with pytest.raises(InputError, match='quoting = "none"'):
            read(content.replace(b"1\t3\t4\tHow do I\n", b""), "train.tsv", **fields)
