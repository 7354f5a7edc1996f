"""Ugly files: every fault is named with file, line and reason, and nothing is silently lost."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.table import parse_table, read_table
from engine.data.task_schema import FORMATS
from engine.utils.errors import InputError

SST, QUORA, STS = (FORMATS[task] for task in ("sst", "quora", "sts"))
HEADER = b"\tid\tsentence\tsentiment\n"
GOOD = b"0\ta\tfine film\t3\n"

BAD_ROWS = {
    "label is not a number": b"1\tb\tdull film\tbad",
    "label is outside 0 to 4": b"1\tb\tdull film\t5",
    "label is not a whole number": b"1\tb\tdull film\t1.5",
    "empty sentence": b"1\tb\t  \t1",
    "empty id": b"1\t\tdull film\t1",
    "number of fields": b"1\tb\tdull\tfilm\t1",
    "not UTF-8": b"1\tb\tcaf\xe9\t1",
    "NUL character": b"1\tb\tdull\0film\t1",
    "carriage return": b"1\tb\tdull\rfilm\t1",
    "empty line": b"",
    "line too long": b"1\tb\t" + b"dull " * 30000 + b"\t1",
    "broken quoting": b'1\tb\t"dull film\t1',
}


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_bad_row(reason: str, row: bytes) -> None:
    content = HEADER + GOOD + row + b"\n" + GOOD
    where = Path("some", "sst.csv")

    with pytest.raises(InputError) as error:
        parse_table(content, where, SST)
    message = str(error.value)
    assert reason in message
    assert f"{where}:3" in message
    assert "\n" not in message

    skipped = parse_table(content, where, SST, on_bad_row="skip")
    assert skipped.ids == ["a", "a"]
    assert skipped.bad_rows == {reason: 1}
    np.testing.assert_array_equal(skipped.labels, [3, 3])

    blanked = parse_table(content, where, SST, on_bad_row="blank")
    assert blanked.blank == (1,)
    assert blanked.ids in (["a", "b", "a"], ["a", "", "a"])
    assert blanked.sentences == (["fine film", "", "fine film"],)


@pytest.mark.parametrize("label", ["nan", "inf", "-1", "1_0", "1e999", "0x1", "", "٣"])
def test_label_that_is_no_number_in_range(label: str) -> None:
    content = HEADER + f"0\ta\tfine film\t{label}\n".encode()
    with pytest.raises(InputError, match="label is"):
        parse_table(content, Path("f"), SST)


def test_a_stray_quote_swallows_no_row() -> None:
    # Read by csv rules alone this is one row, whose sentence holds the other two.
    content = HEADER + b'0\ta\t"fine\t3\n1\tb\tdull\t1\n2\tc\tgood"\t3\n'
    with pytest.raises(InputError, match=r"broken quoting.*f:2"):
        parse_table(content, Path("f"), SST)
    table = parse_table(content, Path("f"), SST, on_bad_row="skip")
    assert table.sentences == (["dull", 'good"'],)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file, f"),
        (b"\n\n", "empty file, f"),
        (HEADER, "no usable row"),
        (b"id\tsentence\n0\tx\n", "no column 'sentiment'.*f:1"),
        (b"id\tsentence\tsentence\tsentiment\n", "twice: 'sentence'"),
        (b'id\t"sentence\tsentiment\n', "broken quoting"),
        (b"id,sentence,sentiment\n", r"no column 'id'.*separate its columns by \"\\t\""),
        (b"id\tsentence\tsentiment\ra\tfine\t3\r", "header: carriage return"),
        (b"\xfei\td\n", "header: not UTF-8: byte 0xfe at 1"),
        (b"\xff\xfei\0d\0", "no column 'sentence'.*it has 'id'"),
        (HEADER + b"0\ta\t\t3\n", "empty sentence"),
    ],
    ids=repr,
)
def test_bad_file(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_table(content, Path("f"), SST)
    assert "\n" not in str(error.value)


def test_every_row_skipped_is_an_error() -> None:
    rows = b"0\ta\tx\t9\n1\tb\t\t1\n2\tc\tx\t9\n"
    with pytest.raises(InputError) as error:
        parse_table(HEADER + rows, Path("f"), SST, on_bad_row="skip")
    assert str(error.value) == (
        "no usable row (label is outside 0 to 4: 2, empty sentence: 1), f; the first: "
        "label is outside 0 to 4: '9' in column 'sentiment', f:2; correct the row"
    )


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*nowhere"):
        read_table(tmp_path / "nowhere", SST)
    with pytest.raises(InputError, match="is a directory"):
        read_table(tmp_path, SST)


def test_spellings_that_are_allowed() -> None:
    # Byte order mark, CRLF, columns in another order, more columns, quotes, empty lines at the end.
    content = (
        b"\xef\xbb\xbfsentiment\t0\t\tid\tsentence\r\n"
        b'4.0\t1\t0.0\ta\t"a ""fine"" film"\r\n'
        b'0\t2\t1.0\tb\ta 6" screen\r\n\r\n'
    )
    table = parse_table(content, Path("f"), SST)
    assert table.ids == ["a", "b"]
    assert table.sentences == (['a "fine" film', 'a 6" screen'],)
    np.testing.assert_array_equal(table.labels, np.array([4, 0], np.float32))


def test_two_sentences_and_a_score() -> None:
    content = b"\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tone\ttwo\t2.46666666666667\n"
    table = parse_table(content, Path("f"), STS)
    assert table.sentences == (["one"], ["two"])
    assert table.labels is not None
    assert table.labels[0] == np.float32(2.46666666666667)


def test_unlabelled_reads_a_labelled_file_too() -> None:
    table = parse_table(HEADER + b"0\ta\tfine film\tnonsense\n", Path("f"), SST, labelled=False)
    assert table.labels is None
    assert table.ids == ["a"]


CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\n\r"))


@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8))
def test_what_is_written_by_csv_rules_is_read_back(rows: list[tuple[str, str, str]]) -> None:
    def quote(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"'

    lines = ["\t".join(map(quote, row)) for row in [("id", "sentence1", "sentence2"), *rows]]
    content = "\n".join(lines).encode()
    good = [row for row in rows if all(cell.strip() for cell in row)]
    if not good:
        with pytest.raises(InputError):
            parse_table(content, Path("f"), QUORA, labelled=False, on_bad_row="skip")
        return
    table = parse_table(content, Path("f"), QUORA, labelled=False, on_bad_row="skip")
    assert list(zip(table.ids, *table.sentences, strict=True)) == good
    assert sum(table.bad_rows.values()) == len(rows) - len(good)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_table_or_an_input_error(content: bytes) -> None:
    content = b"id\tsentence\tsentiment\n" + content
    rows = len(content.rstrip(b"\r\n").split(b"\n")) - 1
    with suppress(InputError):
        parse_table(content, Path("f"), SST)
    with suppress(InputError):
        table = parse_table(content, Path("f"), SST, on_bad_row="skip")
        assert len(table) + sum(table.bad_rows.values()) == rows
    with suppress(InputError):
        assert len(parse_table(content, Path("f"), SST, on_bad_row="blank")) == rows
