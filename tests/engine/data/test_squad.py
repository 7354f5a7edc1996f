"""Questions, contexts and answers: SQuAD's files and Hugging Face's columns, ugly input."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from engine.data.origins import DataFile, HubSplit
from engine.data.source import TaskSource
from engine.data.table import Table
from engine.utils.errors import InputError

# Characters beyond 16 bits, accents that are characters of their own, line ends of Windows.
CONTEXT = "  Zoe\u0308 saw \U0001f409\U0001f409 at\r\nCafe\u0301 Noir, said  Ann."
ANSWERS = ("Zoe\u0308", "\U0001f409", "Cafe\u0301 Noir", "Ann.", " saw ")
STARTS = tuple(map(CONTEXT.index, ANSWERS))
TEXT = ("question", "context")


def row(name: str, *numbers: int) -> dict[str, Any]:
    """A question with these of the answers."""
    answers = {
        "text": [ANSWERS[n] for n in numbers],
        "answer_start": [STARTS[n] for n in numbers],
    }
    question = f" who or what is {name}? "
    return {"id": name, "title": "t", "question": question, "context": CONTEXT, "answers": answers}


ROWS = [row("a", 0), row("b", 1, 2, 1), row("c", 3), row("d"), row("e", 4)]
SPANS = [
    [(STARTS[n], STARTS[n] + len(ANSWERS[n])) for n in numbers]
    for numbers in ((0,), (1, 2, 1), (3,), (), (4,))
]


def nested(rows: list[dict[str, Any]], *, version: str = "v2.0", **further: Any) -> dict[str, Any]:
    """The same as SQuAD nests it, in two articles, of which one has an empty paragraph, too."""

    def asked(own: dict[str, Any]) -> dict[str, Any]:
        listed = [
            {"text": text, "answer_start": start}
            for text, start in zip(*own["answers"].values(), strict=True)
        ]
        known = {"id": own["id"], "question": own["question"], "answers": listed} | further
        return known | ({} if version == "1.1" else {"is_impossible": not listed})

    paragraphs = [{"context": CONTEXT, "qas": [*map(asked, rows[:2])]}, {"context": "", "qas": []}]
    rest = [{"qas": [*map(asked, rows[2:])], "context": CONTEXT}]
    articles = [{"title": "t", "paragraphs": paragraphs}, {"title": "u", "paragraphs": rest}]
    return {"version": version, "data": articles}


def source_of(name: str, **fields: object) -> TaskSource:
    given = {"kind": "question_answering", "text": TEXT, "label": "answers", "id": "id"}
    return TaskSource(**(given | {"unanswerable": True, "files": {"train": name}} | fields))


def read(path: Path, *, labelled: bool = True, on_bad_row: Any = "error", **fields: Any) -> Table:
    form = source_of(path.name, **fields).format("squad")
    return DataFile(path).table(form, labelled=labelled, on_bad_row=on_bad_row)


def written(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    else:
        content = rows if name.startswith("array") else nested(rows)
        indent = 2 if name.startswith("indented") else None
        path.write_bytes(json.dumps(content, indent=indent).replace("\n", "\r\n").encode())
    return path


@pytest.mark.parametrize("name", ["n.json", "indented.json", "array.json", "t.jsonl", "t.parquet"])
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    table = read(path)
    assert table.ids == ["a", "b", "c", "d", "e"]
    assert table.sentences == ([each["question"] for each in ROWS], [CONTEXT] * 5)
    assert table.answers == SPANS
    assert [CONTEXT[slice(*spans[0])] for spans in table.answers if spans] == [
        ANSWERS[number] for number in (0, 1, 3, 4)
    ]
    assert table.labels.tolist() == [1, 1, 1, 0, 1]
    assert read(path, labelled=False).answers is None


def test_a_data_set_gives_the_same_table(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train-00000.parquet")
    form = source_of("t.json").format("squad")
    table = HubSplit(str(tmp_path), "", "train").table(form, labelled=True, on_bad_row="error")
    assert table.answers == SPANS
    assert table.sentences[1] == [CONTEXT] * 5


def test_version_1_has_an_answer_to_each(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(nested(ROWS[:3], version="1.1")))
    assert read(path, unanswerable=False).answers == SPANS[:3]
    path.write_text(json.dumps(nested(ROWS)))
    with pytest.raises(InputError) as error:
        read(path, unanswerable=False)
    assert "no answer: none is given, which source.unanswerable = true allows" in str(error.value)
    assert "t.json, data[1].paragraphs[0].qas[1]" in str(error.value)
    assert len(read(path, unanswerable=False, on_bad_row="skip")) == 4


def test_plausible_answers_are_none(tmp_path: Path) -> None:
    path, further = tmp_path / "t.json", [{"text": "saw", "answer_start": CONTEXT.index("saw")}]
    path.write_text(json.dumps(nested(ROWS, plausible_answers=further)))
    assert read(path).answers == SPANS


def test_a_file_without_answers_is_to_be_predicted(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    content = nested(ROWS)
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [
                {"id": q["id"], "question": q["question"]} for q in paragraph["qas"]
            ]
    path.write_text(json.dumps(content))
    assert len(read(path, labelled=False)) == 5
    with pytest.raises(InputError, match=r"missing column: 'answers'; there is 'id', 'question'"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": ["Zoe\u0308"], "answer_start": [3]},
            "answer is not in its place: 'Zoe\u0308' at 3,",
        ),
        ({"text": ["Zoë"], "answer_start": [2]}, "answer is not in its place: 'Zoë' at 2, where"),
        (
            {"text": ["Ann."], "answer_start": [9**9]},
            "not in its place: 'Ann.' at 387420489, where",
        ),
        ({"text": ["Ann."], "answer_start": [-4]}, "not in its place: 'Ann.' at -4, where"),
        (
            {"text": ["Ann."], "answer_start": [None]},
            "not an answer: text 'Ann.', answer_start None",
        ),
        ({"text": ["Ann."], "answer_start": [1.5]}, "not an answer: text 'Ann.', answer_start 1.5"),
        (
            {"text": ["Ann."], "answer_start": [True]},
            "not an answer: text 'Ann.', answer_start True",
        ),
        ({"text": [""], "answer_start": [0]}, "empty answer: at 0, column 'answers'"),
        ({"text": ["  "], "answer_start": [0]}, "empty answer: at 0, column 'answers'"),
        (
            {"text": ["Ann."], "answer_start": []},
            "answers differ in number: 1 of text, 0 of answer_st",
        ),
        ({"text": "Ann."}, "not answers: expected {'text': […], 'answer_start': […]}, column"),
        ({}, "not answers: expected"),
        ([["Ann.", 3]], "not answers: expected"),
        ("Ann.", "not answers: expected"),
        (None, "neither text nor number: no value in column 'answers'"),
        ({"text": ["\ud83d"], "answer_start": [0]}, "not Unicode: half of a character"),
    ],
)
def test_bad_answers_are_named(tmp_path: Path, changes: Any, message: str) -> None:
    path = tmp_path / "t.jsonl"
    rows = [ROWS[0], ROWS[1] | {"answers": changes}]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(InputError) as error:
        read(path)
    assert message in str(error.value)
    assert "t.jsonl:2" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    table = read(path, on_bad_row="skip")
    assert (len(table), sum(table.bad_rows.values())) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": ""}, "empty sentence: column 'context'"),
        ({"context": None}, "neither text nor number: no value in column 'context'"),
        ({"question": " "}, "empty sentence: column 'question'"),
        ({"id": ""}, "empty id: column 'id'"),
    ],
)
def test_bad_texts_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = written(tmp_path, "t.jsonl", [ROWS[0], ROWS[1] | changes])
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": ', "not JSON"),
        ('{"data": 3}', "no list 'data'"),
        (
            '{"data": [{"paragraphs": [{"context": "c"}]}]}',
            r"no list 'qas', .*data\[0\].paragraphs\[0",
        ),
        (
            '{"data": [{"title": "t"}]}',
            r"no list 'paragraphs', .*t.json, data\[0\]; give a file in SQuAD",
        ),
        ('{"data": [7]}', r"no list 'paragraphs', .*data\[0\]"),
        ('{"data": []}', "no usable row"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [1]}]}]}',
            r"not a JSON object: int, .*qas\[0\]",
        ),
        (
            '{"data": [{"paragraphs": [{"qas": [{"id": "1", "question": "q", "answers": []}]}]}]}',
            "missing column: 'context'",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", '
            '"is_impossible": true, "answers": [{"text": "c", "answer_start": 0}]}]}]}]}',
            "both answers and none: is_impossible is true",
        ),
    ],
)
def test_files_that_are_nested_otherwise_are_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert len(str(error.value).splitlines()) == 1


def test_objects_are_refused_where_they_are_no_answers(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", [ROWS[0] | {"question": {"text": ["x"]}}])
    with pytest.raises(InputError, match="neither text nor number: dict in column 'question'"):
        read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ("context",)}, r"text: question_answering needs 2 column\(s\), got 1"),
        ({"classes": 2}, "classes: has no effect on question_answering; leave it out"),
        ({"range": (0, 1)}, "range: has no effect on question_answering"),
        ({"scheme": "BIO"}, "scheme: has no effect"),
        ({"label": ("a", "b")}, "label: question_answering has one column of labels"),
        ({"max_answer_tokens": 0}, "max_answer_tokens"),
        ({"window_overlap": -1}, "window_overlap"),
        ({"kind": "regression", "text": ("x",)}, "unanswerable: has no effect on regression"),
        (
            {"kind": "retrieval", "label": "label", "unanswerable": False, "window_overlap": 3},
            "window_overlap: has no effect on retrieval",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_of("t.json", **fields)


@pytest.mark.parametrize("data", ["x", ["x"], None, [{"paragraphs": []}]])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_may_have_a_column_that_is_called_data(tmp_path: Path, name: str, data: Any) -> None:
    path = tmp_path / name
    path.write_text("\n" * name.endswith(".json") + lines_with(data))
    table = read(path, on_bad_row="skip")
    assert table.ids == [row["id"] for row in ROWS]
    assert table.answers == SPANS


def lines_with(data: Any) -> str:
    return "".join(json.dumps({"data": data} | row) + "\n" for row in ROWS)
