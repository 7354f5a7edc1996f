"""Text of unknown origin does nothing: in a terminal, a table, a spreadsheet, Markdown."""

import csv
import io
import itertools
import json
import re
from html import unescape

import pytest
from markdown import markdown

from engine.utils.errors import UNPRINTABLE, InputError
from engine.utils.quoting import (
    PlainConsole,
    from_table_cell,
    markdown_text,
    one_line,
    printable,
    table_cell,
)

ESCAPES = [
    "\x1b[2J",
    "\x9b2J",
    "\x1b]0;title\x07",
    "a\rb",
    "\b\b",
    "\x7f",
    "\0",
    "\u202egnp",
    "\u2028",
]
FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    " =1+1",
    "\t=1+1",
    "\r=1",
    "\n=1",
    "\uff1d1+1",
    "\uff0dcmd|x",
]
LINES = ["a\nb", "a\r\nb", "a\tb", "\n", "\t", "a\vb"]
QUOTED = ["'", "''", "'=1", '"', 'a"b', "\\", "'\\n", "\\t", '="a"\n', "it's"]
PLAIN = [
    "",
    "a",
    "-1",
    "+2.5",
    "-1e-05",
    "0",
    "1_2",
    "x=1",
    "a-b",
    "you@there",
    "dôme",
    "\U0001f4a3",
    " a ",
]


@pytest.mark.parametrize("text", [*ESCAPES, *FORMULAS, *LINES, *QUOTED, *PLAIN, "\ud800"])
def test_a_cell_is_read_back_and_does_nothing(text):
    cell = table_cell(text)
    assert from_table_cell(cell) == text
    assert not UNPRINTABLE.search(cell)
    number = text[1:] if text[:1] in ("+", "-") else text
    if not number.replace("e-", "").replace(".", "").isdecimal():
        assert not cell.lstrip().startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20"))
    if text in PLAIN:
        assert cell == text


def test_a_table_of_such_cells_has_a_line_for_each_row():
    texts = [*ESCAPES, *FORMULAS, *LINES, *QUOTED, *PLAIN]
    rows = list(itertools.product(texts, texts))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([map(table_cell, row) for row in rows])
    lines = text.getvalue().splitlines()
    assert len(lines) == len(rows)
    read = csv.reader(lines, delimiter="\t")
    assert [tuple(map(from_table_cell, row)) for row in read] == rows


@pytest.mark.parametrize("text", ESCAPES)
def test_a_terminal_gets_no_escape_sequence(text, capsys):
    PlainConsole(markup=False).print(f"before\n{text}", soft_wrap=True)
    first, *rest = capsys.readouterr().out.split("\n")
    assert first == "before"
    assert not UNPRINTABLE.search("".join(rest))
    for clean in (one_line(text), str(InputError(text))):
        assert not UNPRINTABLE.search(clean)
    assert printable("a\n\tb") == "a\n\tb"


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "![a](http://x/y)",
        "`code`",
        "a | b",
        "a\n\n# heading",
        "a\n| --- |",
        "\\<b>",
        "<http://x>",
        "&lt;b&gt; &#60;b>",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    table = f"| one | two |\n| --- | --- |\n| x {markdown_text(text)} | y |\n"
    html = markdown(table, extensions=["tables"])
    assert html.count("<td>") == 2
    shown = unescape(re.search(r"<td>x (.*?)</td>", html)[1])
    assert shown == " ".join(text.splitlines())
    tags = set(re.findall(r"</?(\w+)", html))
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td"}


def test_what_is_no_cell():
    for cell in ("'\\", "'\\x", "'\""):
        with pytest.raises(ValueError, match=r"column|Expecting|Invalid|Extra"):
            from_table_cell(cell)
    assert json.loads('"' + table_cell("=a\tb")[1:] + '"') == "=a\tb"  # as the guide says
