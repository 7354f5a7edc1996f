"""Files as they are found: read back equal however written, or one line says what to set."""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from engine.data import decompress
from engine.data.cache import load_split
from engine.data.read import Table, parse_table
from engine.data.source import DataFile, TaskSource
from engine.data.tokenizer import Tokenizer
from engine.errors import InputError
from engine.objectives.text import lines_of

from .glue import FILES

COMPRESS = {
    "none": bytes,
    "gzip": lambda content: gzip.compress(content, 1),
    "bz2": bz2.compress,
    "xz": lambda content: lzma.compress(content, preset=0),
    "zstd": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
ENDINGS = {"none": "", "gzip": ".gz", "bz2": ".bz2", "xz": ".xz", "zstd": ".zst"}
ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"),
    *("latin-1", "cp1252", "cp500"),
)
FOUND_OUT = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
"""Encodings that need no field."""


def source(name: str = "f.csv", **fields: object) -> TaskSource:
    good = {"kind": "classification", "text": ("text",), "classes": 2, "files": {"train": name}}
    return TaskSource(**(good | fields))


def read(content: bytes, name: str = "f.csv", on_bad_row: str = "error", **fields) -> Table:
    form = source(name, **fields).format("t")
    return parse_table(content, Path(name), form, on_bad_row=on_bad_row)


def refuse(content: bytes, name: str = "f.csv", **fields: object) -> str:
    with pytest.raises(InputError) as error:
        read(content, name, **fields)
    return str(error.value)


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
        assert list(table.notes) == notes


GOOD = "text,label\nfine,1\n"


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
        ('text,"of two\nlines",label\nfine,x,1', "f.csv"),
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


def test_parquet_in_a_compressed_file_with_a_repeated_column() -> None:
    table = pa.table([["fine"], [1], ["x"], ["y"]], names=["text", "label", "more", "more"])
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    content = gzip.compress(stream.getvalue())
    assert read(content, "f.parquet.gz").sentences == (["fine"],)


GZIP = gzip.compress(GOOD.encode())
SEMICOLONS = GOOD.replace(",", ";").encode()
LATIN = "text,label\nfine,1\ncafé,1\n".encode("latin-1")
ASK = "correct the row or see --on-bad-row"


@pytest.mark.parametrize(
    ("content", "name", "fields", "message"),
    [
        (
            SEMICOLONS,
            "f.csv",
            {},
            "no column 'text' in the header, f.csv:1; it has 'text;label': "
            'set tasks.t.source.delimiter = ";"',
        ),
        (
            GOOD.encode(),
            "f.tsv",
            {},
            "no column 'text' in the header, f.tsv:1; it has 'text,label': "
            'set tasks.t.source.delimiter = ","',
        ),
        (
            GOOD.replace(",", "\t").encode(),
            "f.csv",
            {"delimiter": ";"},
            "no column 'text' in the header, f.csv:1; it has 'text\\tlabel': "
            'set tasks.t.source.delimiter = "\\t"',
        ),
        (
            b"a\tb c\t1\n",
            "f.csv",
            {"header": False, "text": ("2",), "label": "3"},
            "no column '2' in the first row, f.csv:1; it has '1': "
            'set tasks.t.source.delimiter = "\\t"',
        ),
        (
            b"a,1\n",
            "f.csv",
            {"header": False, "text": ("3",), "label": "2"},
            "no column '3' in the first row, f.csv:1; it has '1', '2': "
            "give a file with that column",
        ),
        (
            b"x\t1\n",
            "f.tsv",
            {},
            "no column 'text' in the header, f.tsv:1; it has 'x', '1': "
            "set tasks.t.source.header = false if that is a row already, "
            "or give a file with that column",
        ),
        (
            b'text\tlabel\n"fine\t1\n',
            "f.tsv",
            {},
            "broken quoting: a quoted field does not end on its line, f.tsv:2; "
            f'set tasks.t.source.quoting = "none", or {ASK}',
        ),
        (
            b'text,label\n"fine,1\n',
            "f.csv",
            {},
            "not CSV: unexpected end of data, f.csv:2; "
            'set tasks.t.source.quoting = "none", or correct the file',
        ),
        (
            b"text,label,text\nfine,1,x\n",
            "f.csv",
            {},
            "the header names a column twice: 'text', f.csv:1; rename one",
        ),
        (
            b"fine,1\nx,y,1\n",
            "f.csv",
            {"header": False, "text": ("1",), "label": "2"},
            f"number of fields: 3, the first row has 2, f.csv:2; {ASK}",
        ),
        (
            b'"fine\t1\n',
            "f.tsv",
            {"header": False, "text": ("1",), "label": "2"},
            "no usable row: broken quoting: a quoted field does not end on its line, f.tsv:1; "
            'set tasks.t.source.quoting = "none", or correct the row',
        ),
        (
            LATIN,
            "f.csv",
            {},
            "not UTF-8: byte 0xe9 at 4 of field 1, f.csv:3; set tasks.t.source.encoding "
            f'("cp1252" or "latin-1", say), or {ASK}',
        ),
        (
            LATIN.replace(b",", b"\t"),
            "f.tsv",
            {"encoding": "utf-8"},
            f"not UTF-8: byte 0xe9 at 4, f.tsv:3; {ASK}",
        ),
        (
            LATIN,
            "f.csv",
            {"encoding": "ascii"},
            "not ascii at byte 22, f.csv; set tasks.t.source.encoding to its own, or "
            "convert the file to UTF-8",
        ),
        (
            GOOD.encode("utf-16-le"),
            "f.csv",
            {},
            "bytes are zero as in UTF-16-LE, f.csv; "
            'set tasks.t.source.encoding = "utf-16-le", or convert the file to UTF-8',
        ),
        (
            GOOD.encode("utf-16-be"),
            "f.csv",
            {},
            "bytes are zero as in UTF-16-BE, f.csv; "
            'set tasks.t.source.encoding = "utf-16-be", or convert the file to UTF-8',
        ),
        (
            GOOD.encode("utf-32-le"),
            "f.csv",
            {},
            "bytes are zero as in UTF-32-LE, f.csv; "
            'set tasks.t.source.encoding = "utf-32-le", or convert the file to UTF-8',
        ),
        (
            GOOD.encode("utf-32-be"),
            "f.csv",
            {},
            "bytes are zero as in UTF-32-BE, f.csv; "
            'set tasks.t.source.encoding = "utf-32-be", or convert the file to UTF-8',
        ),
        (b"", "f.csv", {}, "empty file, f.csv; give one with rows"),
        (b" \r\n\n", "f.tsv", {}, "empty file, f.tsv; give one with rows"),
        (b"", "f.json", {}, "empty file, f.json; give one with rows"),
        (gzip.compress(b""), "f.jsonl.gz", {}, "empty file, f.jsonl.gz; give one with rows"),
        (
            b"text:label\nfine:1\n",
            "f.csv",
            {},
            "no column 'text' in the header, f.csv:1; it has 'text:label': "
            'set tasks.t.source.delimiter = ":"',
        ),
        (
            b'"text","label"\n"fine",1\n',
            "f.csv",
            {"quoting": "none"},
            "no column 'text' in the header, f.csv:1; it has '\"text\"', '\"label\"': "
            'set tasks.t.source.quoting = "csv", or give a file with that column',
        ),
        (
            b"text,label\nf\0ine,1\n",
            "f.csv",
            {},
            f"NUL character: at 2 of field 1, f.csv:2; {ASK}",
        ),
        (
            b'{"text": "fine", "text": "bad", "label": 1}',
            "f.jsonl",
            {},
            f"column given twice: 'text', f.jsonl:1; {ASK}",
        ),
        (
            b'{"data": [], "x": 1}',
            "f.json",
            {},
            f"missing column: 'text'; there is 'data', 'x', f.json:1; {ASK}",
        ),
        (
            b'{\n"text": "fine", "label": 1}',
            "f.json",
            {},
            "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1), f.json:1; write an object a line, or one array of objects as .json, "
            f"or {ASK}",
        ),
        (
            bz2.compress(GOOD.encode()),
            "f.csv",
            {},
            "compressed by bz2, which its ending hides, f.csv; "
            'set tasks.t.source.compression = "bz2", or name it accordingly',
        ),
        (
            GOOD.encode("utf-16-be"),
            "f.csv",
            {"encoding": "UTF16"},
            "no byte order mark, which UTF16 needs, f.csv; "
            'set tasks.t.source.encoding = "utf-16-le" or "utf-16-be", or begin the file with one',
        ),
        (
            GOOD.encode("utf-16"),
            "f.csv",
            {"encoding": "utf-8"},
            "its byte order mark says utf-16-le, not utf-8, f.csv; "
            "leave tasks.t.source.encoding out",
        ),
        (
            GOOD.encode("utf-8-sig"),
            "f.csv",
            {"encoding": "latin-1"},
            "its byte order mark says utf-8, not latin-1, f.csv; leave tasks.t.source.encoding out",
        ),
        (
            GZIP,
            "f.csv",
            {},
            "compressed by gzip, which its ending hides, f.csv; "
            'set tasks.t.source.compression = "gzip", or name it accordingly',
        ),
        (
            GOOD.encode(),
            "f.csv.gz",
            {},
            "cannot decompress by gzip: Not a gzipped file (b'te'), f.csv.gz; give the file whole, "
            'or set tasks.t.source.compression = "none" if it is not compressed',
        ),
        (
            b'{"text": "fine", "label": 1}\n[{"text": "x"}]',
            "f.jsonl",
            {},
            "not a JSON object: list, f.jsonl:2; end the file's name in .json if it is one array, "
            f"or {ASK}",
        ),
        (
            b'[{"text": "fine", "label": 1},\n {"text": "x"}]',
            "f.json",
            {},
            f"missing column: 'label'; there is 'text', f.json, row 1; {ASK}",
        ),
        (
            b'[{"text": "fine", "label": 1},\n',
            "f.json",
            {},
            "not JSON: Expecting value: line 2 column 1 (char 31), f.json; correct the file",
        ),
        (
            b'[{"text": "caf\xe9", "label": 1}]',
            "f.json",
            {},
            "not UTF-8: byte 0xe9 at 15, f.json; set tasks.t.source.encoding "
            '("cp1252" or "latin-1", say), or convert the file to UTF-8',
        ),
        (b"[]", "f.json", {}, "no usable row, f.json; give a file that has some"),
        (
            GOOD.encode(),
            "f.txt.gz",
            {},
            "f.txt.gz: unknown ending; set tasks.t.source.delimiter, or give a file in .tsv, .csv, "
            ".jsonl, .json, .parquet, compressed (.gz, .bz2, .xz, .zst) or not",
        ),
    ],
)
def test_the_line_says_what_to_set(content, name, fields, message) -> None:
    assert refuse(content, name, **fields) == message


@pytest.mark.parametrize("kind", [kind for kind in COMPRESS if kind != "none"])
def test_a_compressed_file_that_is_damaged(kind: str) -> None:
    rows = "".join(f"row {number},1\n" for number in range(300))
    content = COMPRESS[kind](f"text,label\n{rows}".encode())
    name = f"f.csv{ENDINGS[kind]}"
    assert len(read(content, name)) == 300
    assert len(read(content + COMPRESS[kind](rows.encode()), name)) == 600  # parts in a row
    for length in range(1, len(content), 7):
        assert refuse(content[:length], name).startswith(f"cannot decompress by {kind}: ")
    assert refuse(content[:10] + b"\xff" * 20 + content[30:], name).count("\n") == 0


@pytest.mark.parametrize("kind", [kind for kind in COMPRESS if kind != "none"])
def test_a_small_file_that_grows_out_of_proportion(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(decompress, "ALWAYS_ALLOWED", 3 << 20)
    content = COMPRESS[kind](b"a" * (2 << 20))
    assert "line too long" in refuse(content, "f.tsv" + ENDINGS[kind])  # it is read
    content = COMPRESS[kind](b"a" * (4 << 20))
    if len(content) * decompress.MOST_TIMES < 4 << 20:
        assert "more than 3 MiB" in refuse(content, "f.tsv" + ENDINGS[kind])
    else:
        pytest.fail("it compresses too little to show anything")


def test_without_pyarrow_zstandard_names_what_to_install(monkeypatch) -> None:
    content = COMPRESS["zstd"](GOOD.encode())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refuse(content, "f.csv.zst") == (
        "f.csv.zst: reading Zstandard needs pyarrow (pip install pyarrow); or decompress it"
    )


def test_a_byte_that_is_not_utf8_spoils_its_row_alone() -> None:
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


def test_the_cache_tells_dialects_apart(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes("text;label\nfine caf\u00e9, a;1\n".encode("latin-1"))
    tokenizer = Tokenizer.train(["fine café caf, ã"] * 9, 60)
    seen = []
    for encoding in ("latin-1", "cp1251", "latin-1"):
        form = source(delimiter=";", encoding=encoding).format("t")
        seen.append(load_split(DataFile(path), form, tokenizer, 32, cache=tmp_path / "cache"))
    assert seen[0].tokens.tolist() == seen[2].tokens.tolist() != seen[1].tokens.tolist()
    assert len([entry for entry in (tmp_path / "cache").iterdir() if len(entry.name) == 64]) == 2


def test_a_note_names_the_file_that_was_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["fine film"] * 9, 60)
    for name in ("one.csv", "two.csv", "one.csv"):  # with one content, and so one entry
        (tmp_path / name).write_text(GOOD.replace(",", "\t"))
        file = DataFile(tmp_path / name)
        split = load_split(file, source().format("t"), tokenizer, 32, cache=tmp_path / "cache")
        note = "separated by tabs, as its header is, not by commas"
        assert split.notes == (f"read {name} as {note}",)


def test_text_of_objectives(tmp_path: Path) -> None:
    lines = "fine café\n\ndull\n"
    for encoding, kind in itertools.product(FOUND_OUT, COMPRESS):
        path = tmp_path / f"f.txt{ENDINGS[kind]}"
        path.write_bytes(COMPRESS[kind](lines.encode(encoding)))
        assert lines_of(path, 0) == ["fine café", "dull"]
    path = tmp_path / "f.txt"
    path.write_bytes(lines.encode("latin-1"))
    with pytest.raises(InputError) as error:
        lines_of(path, 0)
    assert str(error.value) == f"not UTF-8: byte 0xe9 at 9, {path}; convert the file to UTF-8"


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


@pytest.mark.parametrize(
    ("content", "fields", "told"),
    [
        (b"text,label\nfine,1\n", {"delimiter": ";"}, 'separate its columns by ";"'),
        (b"fine;1\n", {}, "give a file with that column"),
        (b'text,label\n"fine,1\n', {}, "correct the file"),
        (GZIP, {}, "name it accordingly"),
        (GOOD.encode("utf-16"), {"encoding": "latin-1"}, "convert the file to latin-1"),
        (GOOD.encode("utf-16-le"), {"encoding": "utf-16"}, "begin the file with one"),
    ],
)
def test_where_no_recipe_can_be_changed_the_line_says_what_to_do_with_the_file(
    content, fields, told
) -> None:
    form = source(**fields).format("t").unchangeable
    with pytest.raises(InputError) as error:
        parse_table(content, Path("f.csv"), form)
    assert str(error.value).endswith(told)
    assert "tasks.t" not in str(error.value)
    assert "source" not in str(error.value)
