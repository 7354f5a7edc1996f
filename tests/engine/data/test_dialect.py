"""Files as they are found: read back equal however written, and what was assumed is said."""

import csv
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from engine.data.table import parse_table

from .written import COMPRESS, ENDINGS, FOUND_OUT, GOOD, LATIN, read, source

ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"),
    *("latin-1", "cp1252", "cp500"),
)


def texts(delimiter: str, quoting: str, encoding: str) -> list[str]:
    """Sentences that hold all that a file written so can hold."""
    found = ['"open and never closed', 'he said "no", twice', 'all "of" it"', "  spaces  ", "café"]
    if encoding.startswith("utf"):
        found += ["zażółć 🙂", "line\u2028separator\x85\x0b\x1c"]
    if quoting == "csv":
        found += ['"whole"', f"one{delimiter}two"]
        if delimiter != "\t":
            found += ["two\nlines", "two\r\nlines"]
    others = (other for other in ",;\t|" if other != delimiter)
    found.append("other delimiters " + "".join(others))
    return found if quoting == "csv" else [text for text in found if delimiter not in text]


@pytest.mark.parametrize("quoting", ["csv", "none"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_what_the_csv_module_writes_is_read_back(delimiter: str, quoting: str) -> None:
    ways = itertools.product([True, False], ENCODINGS, COMPRESS, ["\n", "\r\n"])
    for header, encoding, compression, line_end in ways:
        wanted = texts(delimiter, quoting, encoding)
        stream = io.StringIO(newline="")
        by_csv = {"quoting": csv.QUOTE_MINIMAL} if quoting == "csv" else {"quoting": csv.QUOTE_NONE}
        quote = '"' if quoting == "csv" else None
        writer = csv.writer(
            stream, delimiter=delimiter, lineterminator=line_end, quotechar=quote, **by_csv
        )
        rows = [("name", "text", "name", "label")] if header else []
        writer.writerows([*rows, *((n, text, "x", n % 2) for n, text in enumerate(wanted))])
        content = COMPRESS[compression](stream.getvalue().encode(encoding))

        columns = {"header": False, "id": 1, "text": (2,), "label": 4} if not header else {}
        said = columns | {"quoting": quoting}
        if encoding not in FOUND_OUT:
            said["encoding"] = encoding
        by_ending = (delimiter == "\t") == header  # both ways are tried with every delimiter
        name = ("f.tsv" if by_ending and delimiter == "\t" else "f.csv") + (
            ENDINGS[compression] if by_ending else ""
        )
        if not by_ending:
            said["compression"] = compression
        if not (name.startswith("f.tsv") or delimiter == ","):
            said["delimiter"] = delimiter
        table = read(content, name, **said)
        assert table.sentences == (wanted,), (header, encoding, compression, line_end)
        np.testing.assert_array_equal(table.labels, np.arange(len(wanted)) % 2)
        assert table.ids == [str(number) for number in range(len(wanted))]
        marks = {"utf-16": "UTF-16-LE", "utf-32": "UTF-32-LE"}
        notes = [f"{marks[encoding]}, by its byte order mark"] if encoding in marks else []
        if quoting == "csv" and delimiter != "\t":
            first = 8 + header + 2 * encoding.startswith("utf")  # they come last, but for one
            lines = f"{first} to {first + 1}"
            notes.append(f"CSV with 2 rows of several lines, the longest on lines {lines}")
        assert list(table.notes) == notes


@pytest.mark.parametrize(
    ("content", "name", "note"),
    [
        (GOOD.replace(",", "\t"), "f.csv", "separated by tabs, as its header is, not by commas"),
        (
            '"a, b"\ttext\tlabel\nx\tfine\t1',
            "f.csv",
            "separated by tabs, as its header is, not by ",
        ),
        ('\n [{"text": "fine", "label": 1}]', "f.json", "one JSON array, not an object a line"),
        (
            'text,"of two\nlines",label\nfine,x,1',
            "f.csv",
            "CSV with 1 row of several lines, the longest on lines 1 to 2",
        ),
    ],
)
def test_what_is_found_out_is_said(content: str, name: str, note: str) -> None:
    table = read(content.encode(), name)
    assert table.sentences == (["fine"],)
    assert len(table.notes) == 1
    assert table.notes[0].startswith(note)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (GOOD, "f.csv"),
        (GOOD.replace(",", "\t"), "f.TSV"),
        ('{"text": "fine", "label": 1}', "f.json"),
        ('{"text": "fine", "label": 1}', "f.jsonl"),
        ('text,"a\tb",label\nfine,x,1', "f.csv"),
    ],
)
def test_what_the_ending_says_is_not_said_again(content: str, name: str) -> None:
    table = read(content.encode(), name)
    assert (table.sentences, table.notes) == ((["fine"],), ())


def test_the_delimiter_of_an_ending_can_be_replaced() -> None:
    assert read(GOOD.encode(), "f.tsv", delimiter=",").sentences == (["fine"],)
    assert read(GOOD.encode(), "f.txt", delimiter=",").sentences == (["fine"],)
    tabs = GOOD.replace(",", "\t").encode()
    assert read(tabs, "f", delimiter="tab").sentences == (["fine"],)
    assert read(tabs, "f.csv", delimiter="\t").notes == ()


def test_two_quotes_that_swallow_rows_are_seen() -> None:
    rows = [f"row {number},{number % 2}" for number in range(20)]
    rows[3], rows[12] = '"row 3,1', 'row 12",1'
    table = read("\n".join(["text,label", *rows]).encode())
    assert len(table) == 11
    assert table.notes == ("CSV with 1 row of several lines, the longest on lines 5 to 14",)


def test_rows_without_a_header_that_lack_the_label_are_said_to() -> None:
    """A file to predict, separated otherwise, is one field a row, label and all."""
    fields = {"header": False, "text": ("1",), "label": "2"}
    form = source(**fields).format("t")
    for content, notes in {
        b"plot\tbad\nfilm\tgood\n": ("rows of 1 field, without column 2",),
        b"plot;bad\n": ("rows of 1 field, without column 2",),
        b"plot\n": ("rows of 1 field, without column 2",),
        b"plot,1\n": (),
    }.items():
        table = parse_table(content, Path("f.csv"), form, labelled=False)
        assert table.notes == notes
    assert read(b"plot,1\n", **fields).notes == ()


def test_another_encoding_for_what_is_utf8_is_said() -> None:
    content = "text,label\ncafé,1\n".encode()
    assert read(content, encoding="cp1252").notes == ("cp1252, though all of it is UTF-8",)
    for plain, encoding in ((GOOD.encode(), "cp1252"), (LATIN, "latin-1"), (content, "utf-8")):
        assert read(plain, encoding=encoding).notes == ()
    wide = "text,label\n映画,1\n".encode("utf-16-le")
    assert read(wide, encoding="utf-16-le").notes == ()


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("classes", [2, ("false", "true")])
def test_truth_as_json_spells_it(value: bool, classes) -> None:
    content = json.dumps({"text": "fine", "label": value}).encode()
    table = read(content, "f.jsonl", classes=classes)
    assert table.labels.tolist() == [float(value)]


def test_a_byte_that_is_not_utf8_corrupts_its_row_alone() -> None:
    for name, delimiter in {"f.csv": ",", "f.tsv": "\t"}.items():
        table = read(LATIN.replace(b",", delimiter.encode()), name, on_bad_row="skip")
        assert (table.sentences, table.bad_rows) == ((["fine"],), {"not UTF-8": 1})


def test_a_bad_first_row_without_a_header_is_skipped() -> None:
    fields = {"header": False, "text": ("1",), "label": "2"}
    table = read(b'"bad\t1\nfine\t1\n', "f.tsv", on_bad_row="skip", **fields)
    assert (table.sentences, table.bad_rows) == ((["fine"],), {"broken quoting": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delimiter": ""}, "expected one character"),
        ({"delimiter": ";;"}, "expected one character"),
        ({"delimiter": '"'}, "expected one character"),
        ({"delimiter": "\n"}, "expected one character"),
        ({"delimiter": "\0"}, "expected one character"),
        ({"quoting": "all"}, "'csv' or 'none'"),
        ({"encoding": "klingon"}, "not a text encoding"),
        ({"encoding": ""}, "not a text encoding"),
        ({"encoding": "hex"}, "not a text encoding"),
        ({"encoding": "rot13"}, "not a text encoding"),
        ({"encoding": "punycode"}, "not a text encoding"),
        ({"encoding": "unicode_escape"}, "not a text encoding"),
        ({"encoding": "a\0b"}, "null character"),
        ({"compression": "zip"}, "'auto', 'none', 'gzip'"),
        ({"header": False}, "text: without a header columns are called 1, 2, …, not 'text'"),
        (
            {"header": False, "text": ("1",)},
            "label: without a header columns are called 1, 2, …, not 'label'",
        ),
        (
            {"header": False, "text": ("0",), "label": "2"},
            "text: without a header columns are called 1, 2, …, not '0'",
        ),
        (
            {"header": False, "text": ("1",), "label": "2", "id": "id"},
            "id: without a header columns are called 1, 2, …, not 'id'",
        ),
    ],
)
def test_fields_out_of_range(fields, message) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        source(**fields)


SET = {
    "delimiter": ";",
    "quoting": "none",
    "header": False,
    "encoding": "latin-1",
    "compression": "gzip",
}


@pytest.mark.parametrize("field", SET)
@pytest.mark.parametrize("files", ["f.csv", "f.txt", "f.json", "f.jsonl", "f.parquet", ""])
def test_a_field_without_effect_is_refused(field: str, files: str) -> None:
    numbers = {"text": ("1",), "label": "2"} if field == "header" else {}
    fields = {field: SET[field]} | numbers
    fields |= {"files": {"train": files}} if files else {"files": {}, "dataset": "name"}
    has_effect = {
        "encoding": files not in ("f.parquet", ""),
        "compression": bool(files),
    }.get(field, files in ("f.csv", "f.txt"))
    if has_effect:
        assert getattr(source(**fields), field) == SET[field]
        fields["files"] = {"train": "g.parquet"} | fields["files"] | {"dev": files}
        source(**fields)  # an effect on one of the files is enough
        return
    with pytest.raises(ValidationError, match=f"{field}: has no effect on"):
        source(**fields)


def test_numbers_of_columns_may_be_numbers() -> None:
    given = source(header=False, text=(4,), label=2, id=1)
    assert (given.text, given.label, given.id) == (("4",), "2", "1")
