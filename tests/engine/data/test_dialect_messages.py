"""One line says what to set, or what to do with a file that no recipe describes any more."""

import bz2
import json
import re
from pathlib import Path

import pytest

from engine.data.table import parse_table
from engine.utils.errors import InputError

from .written import COMPRESS, GOOD, GZIP, LATIN, read, refuse, source

NO_QUOTES = 'quoting = "none" if no quote means anything'
SEMICOLONS = GOOD.replace(",", ";").encode()
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
            f"set tasks.t.source.{NO_QUOTES}, or bring the row onto one line or see --on-bad-row",
        ),
        (
            b'text,label\n"fine,1\n',
            "f.csv",
            {},
            "not CSV: unexpected end of data, f.csv:2; "
            f"set tasks.t.source.{NO_QUOTES}, or correct the file",
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
            f"set tasks.t.source.{NO_QUOTES}, or bring the row onto one line",
        ),
        (
            LATIN,
            "f.csv",
            {},
            "not UTF-8: byte 0xe9 at 4 of field 1, f.csv:3; set tasks.t.source.encoding "
            f'to its own ("cp1252", "cp932", …), or {ASK}',
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
        (COMPRESS["gzip"](b""), "f.jsonl.gz", {}, "empty file, f.jsonl.gz; give one with rows"),
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
            'set tasks.t.source.quoting = "csv"',
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
            "compressed by bz2, which its ending does not say, f.csv; "
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
            "compressed by gzip, which its ending does not say, f.csv; "
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
            "not JSON: Expecting value: line 1 column 31 (char 30), f.json; correct the file",
        ),
        (
            b'[{"text": "caf\xe9", "label": 1}]',
            "f.json",
            {},
            "not UTF-8: byte 0xe9 at 15, f.json; set tasks.t.source.encoding "
            'to its own ("cp1252", "cp932", …), or convert the file to UTF-8',
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


JAPANESE = "text,label\n映画,1\n良い,0\n"
SET = re.compile(r'tasks\.t\.source\.(\w+) = ("[^"]*")')


@pytest.mark.parametrize(
    ("content", "name", "fields"),
    [
        (GOOD.replace(",", ";"), "f.csv", {}),
        ('"text";"label"\n"fine";"1"\n', "f.csv", {}),  # as R and spreadsheets write it
        ('"text";label\n"fine; or not";1\n', "f.csv", {}),
        ('"text";"label"\n"fine";"1"\n', "f.csv", {"quoting": "none"}),
        ('"text"|"label"\n"fine"|"1"\n', "f.csv", {}),
        ('"text";"label"\n"fine";"1"\n', "f.tsv", {}),
        ('"text","label"\n"fine",1\n', "f.tsv", {}),
        ('"text","label"\n"fine",1\n', "f.csv", {"delimiter": ";"}),
        ('"text","label"\n"fine",1\n', "f.csv", {"quoting": "none"}),
        ('"fine; or not";1\n', "f.csv", {"header": False, "text": ("1",), "label": "2"}),
        ('text\tlabel\n"fine\t1\n', "f.tsv", {}),
        ('text,label\n"fine,1\n', "f.csv", {}),
        (JAPANESE.encode("utf-16-le"), "f.csv", {}),
        (JAPANESE.replace("text", "映画").encode("utf-16-be"), "f.csv", {"text": ("映画",)}),
        (
            JAPANESE[len("text,label\n") :].encode("utf-16-le"),
            "f.csv",
            {"header": False, "text": ("1",), "label": "2"},
        ),
        (JAPANESE.encode("utf-32-be"), "f.csv", {}),
        (JAPANESE.replace(",", "\t").encode("utf-32-le"), "f.tsv", {}),
    ],
)
def test_what_the_line_says_to_set_helps(content, name, fields) -> None:
    """The advice is followed to the letter, once, and the file is read."""
    lines = [content]
    if isinstance(content, str):
        lines = [content.encode(), content.replace("\n", "\r\n").encode()]
    for content in lines:
        said = dict(SET.findall(refuse(content, name, **fields)))
        assert said
        table = read(content, name, **(fields | {f: json.loads(v) for f, v in said.items()}))
        assert len(table) in (1, 2)


@pytest.mark.parametrize("quoting", ["csv", "none"])
def test_a_field_that_is_too_long(quoting: str) -> None:
    content = f'text,label\n"{"a" * 140_000}",1\n'.encode()
    line = refuse(content, quoting=quoting)
    assert "131,072" in line
    assert "shorten" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sep=;\ntext;label\nfine;1\n", "delete its first line, sep=;, which spreadsheets"),
        (b"text,label\nf\0ine,1\n", "NUL character"),  # one zero byte is not UTF-16
        (b"text,label\n" + b"f\0\0ine,1\n" * 9, "NUL character"),
        ("text,label\n映画,1\n".encode("cp932"), "not UTF-8: byte 0x89"),
    ],
)
def test_odd_beginnings_and_bytes(content, message) -> None:
    assert message in refuse(content)


@pytest.mark.parametrize(
    ("content", "fields", "told"),
    [
        (b"text,label\nfine,1\n", {"delimiter": ";"}, 'separate its columns by ";"'),
        (b"fine;1\n", {}, "give a file with that column"),
        (b'"text";"label"\n"fine";1\n', {}, 'separate its columns by ","'),
        (b'"text","label"\n"fine",1\n', {"quoting": "none"}, "give a file with that column"),
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
