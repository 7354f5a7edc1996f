"""Files as csv, json and pyarrow read them: the same rows in blocks of any size, by any workers."""

import csv
import decimal
import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.data import prepare, records
from engine.data.cache import Reading, load_split
from engine.data.origins import DataFile
from engine.data.table import Table, file_rows
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from .test_pieces import cut
from .written import COMPRESS, ENDINGS, source

SIZES = (1 << 20, 1, 2, 5, 33, 257)
PARTS = ("fine", "düll", "\U0001f600", "a b", "\u2028", "\x85", "\ufeff", "\u00a0x", "'", "ẞ")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


def texts(seed: int, parts: tuple[str, ...] = PARTS, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return ["x" + "".join(draw.choices(parts, k=draw.randrange(9))) for _ in range(count)]


def read(path: Path) -> Table:
    form = source(path.name).format("t")
    return DataFile(path).table(form, labelled=True, on_bad_row="error")


def written(seed: int, ending: str) -> tuple[str, list[str]]:
    """A file of random texts, and what an independent reader finds in it."""
    draw, end = random.Random(seed), ("\n", "\r\n")[seed % 2]
    if ending == "jsonl":
        lines = [
            json.dumps({"label": number % 2, "text": text}, ensure_ascii=draw.random() < 0.5)
            for number, text in enumerate(texts(seed, (*PARTS, "\n", "\r", "\t", '"', "\\")))
        ]
        return end.join(lines), [json.loads(line)["text"] for line in lines]
    sign = {"csv": ",", "tsv": "\t"}[ending]
    parts = (*PARTS, ",", '"', ";") + (("\n", "\r\n", "\t") if ending == "csv" else ())
    file = io.StringIO(newline="")
    quoting = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)[draw.randrange(2)]
    writer = csv.writer(file, delimiter=sign, lineterminator=end, quoting=quoting)
    rows = [[number % 2, text] for number, text in enumerate(texts(seed, parts))]
    writer.writerows([["label", "text"], *rows])
    content = file.getvalue()
    found = csv.DictReader(io.StringIO(content, newline=""), delimiter=sign)
    return content, [row["text"] for row in found]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_text_files(tmp_path: Path, monkeypatch, ending: str, seed: int) -> None:
    content, expected = written(seed, ending)
    assert len(expected) == 60
    for encoding in ENCODINGS:
        for kind in ("none", list(COMPRESS)[1 + seed]):
            path = tmp_path / f"{encoding}.{ending}{ENDINGS[kind]}"
            path.write_bytes(COMPRESS[kind](content.encode(encoding)))
            for size in SIZES:
                with monkeypatch.context() as patch:
                    cut(patch, size)
                    table = read(path)
                assert table.sentences == (expected,), (encoding, kind, size)
                assert table.labels.tolist() == [0.0, 1.0] * 30
                assert table.ids == [str(number) for number in range(60)]


LABELS: dict[str, Callable[[list[int]], pa.Array]] = {
    "int64": pa.array,
    "uint8": partial(pa.array, type=pa.uint8()),
    "float": partial(pa.array, type=pa.float32()),
    "bool": lambda values: pa.array(values).cast(pa.bool_()),
    "text": lambda values: pa.array(map(str, values)),
    "dictionary": lambda values: pa.array(map(str, values)).dictionary_encode(),
}
TEXTS: dict[str, Callable[[list[str]], pa.Array]] = {
    "string": pa.array,
    "large": partial(pa.array, type=pa.large_string()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
}


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("text", TEXTS)
def test_parquet(tmp_path: Path, monkeypatch, text: str, label: str, rows: int) -> None:
    path, found = tmp_path / "f.parquet", texts(rows, (*PARTS, "\0", "\n"))
    columns = {"other": [{"a": [None]}] * 60, "label": LABELS[label]([0, 1] * 30)}
    table = pa.table(columns | {"text": TEXTS[text](found)})
    parquet.write_table(table, path, row_group_size=rows)
    assert parquet.read_table(path)["text"].to_pylist() == found
    for size in SIZES[::2]:
        with monkeypatch.context() as patch:
            cut(patch, size)
            known = read(path)
        assert known.sentences == (found,)
        assert known.labels.tolist() == [0.0, 1.0] * 30


class Watched(io.BytesIO):
    """A file that knows the largest piece that was read of it."""

    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.largest = max(self.largest, len(found))
        return found


def test_no_row_group_is_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [f"{number} fine film " * 20 for number in range(40_000)]
    table = pa.table({"text": found, "label": [0, 1] * 20_000})
    file, form = Watched(), source("f.parquet").format("t")
    parquet.write_table(table, file, compression="none", use_dictionary=False)
    assert parquet.ParquetFile(file).num_row_groups == 1
    file.largest, size = 0, len(file.getvalue())
    monkeypatch.setattr(records, "_BUFFER", 1 << 16)
    rows = file_rows(file, Path("f.parquet"), form)
    known = [row.values[0] for piece in rows.pieces for row in piece.rows]
    assert known == found
    assert file.largest < size / 5


def nowhere(values: list[int]) -> pa.Array:
    return pa.array(values, type=pa.timestamp("us", tz="No/Where"))


NO_LABELS: dict[str, tuple[pa.Array, str]] = {
    "null": (pa.nulls(2), "no value in column 'label', .*row 0"),
    "one null": (pa.array([1, None]), "no value in column 'label', .*row 1"),
    "nan": (pa.array([1.0, np.nan]), "nan in column 'label', .*row 1"),
    "infinity": (pa.array([1.0, -np.inf]), "-inf in column 'label', .*row 1"),
    "decimal": (pa.array([decimal.Decimal(1)] * 2), "Decimal in column 'label'"),
    "bytes": (pa.array([b"1", b"0"]), "bytes in column 'label'"),
    "list": (pa.array([[1], [0]]), "list in column 'label'"),
    "time": (pa.array([1, 0], pa.timestamp("ms")), "datetime in column 'label'"),
    "far time": (pa.array([1 << 55, 0], pa.timestamp("ms")), "not a readable Parquet file"),
    "far day": (pa.array([1 << 30, 0], pa.date32()), "not a readable Parquet file"),
    "long time": (pa.array([1 << 62, 0], pa.duration("ms")), "not a readable Parquet file"),
    "no zone": (nowhere([1, 0]), "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", NO_LABELS)
def test_parquet_of_other_types_is_one_line(tmp_path: Path, name: str) -> None:
    path, (labels, reason) = tmp_path / "f.parquet", NO_LABELS[name]
    parquet.write_table(pa.table({"text": ["fine", "dull"], "label": labels}), path)
    with pytest.raises(InputError, match=reason) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_json_without_a_number_has_no_value(
    tmp_path: Path, name: str, column: str, value: str
) -> None:
    """Programs write NaN for a missing text, too."""
    path = tmp_path / name
    record = {"text": "fine", "label": 1}
    broken = json.dumps(record | {column: 0}).replace(": 0", f": {value}")
    lines = ",\n".join([json.dumps(record), broken])
    path.write_text(f"[{lines}]" if name == "f.json" else lines.replace(",\n", "\n"))
    spelt = repr(float(value))
    with pytest.raises(InputError, match=f"neither text nor number: {spelt} in column '{column}'"):
        read(path)


@pytest.mark.parametrize("error", [OSError(), OSError("\n"), OSError("a\nb"), ValueError()])
def test_an_error_of_the_library_that_says_nothing(tmp_path, monkeypatch, error) -> None:
    path = tmp_path / "f.parquet"
    parquet.write_table(pa.table({"text": ["fine"], "label": [1]}), path)

    def batches(*_args: object, **_named: object) -> Iterator[object]:
        raise error

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", batches)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    with pytest.raises(InputError, match=rf"not a readable Parquet file \({reason}\)"):
        read(path)


@pytest.mark.parametrize("half", ["+2AA-", "+3AA-", "x+2ADYAA-"])
def test_halves_of_characters_that_an_encoding_spells(tmp_path, monkeypatch, half) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(b"text,label\n" + b"fine,1\n" * 9 + half.encode() + b",1\n")
    form = source("f.csv", encoding="utf-7").format("t")
    for size in SIZES:
        with monkeypatch.context() as patch:
            cut(patch, size)
            with pytest.raises(InputError, match=r"not utf-7, .*f\.csv; set tasks\.t\.source"):
                DataFile(path).table(form, labelled=True, on_bad_row="skip")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tokens_of_all_workers(tmp_path: Path, monkeypatch, ending: str) -> None:
    if ending == "parquet":
        expected = texts(0)
        content = io.BytesIO()
        table = pa.table({"label": [0, 1] * 30, "text": expected})
        parquet.write_table(table, content, row_group_size=7)
        (tmp_path / "f.parquet").write_bytes(content.getvalue())
    else:
        written_, expected = written(0, ending)
        (tmp_path / f"f.{ending}").write_bytes(written_.encode())
    words = Tokenizer.train(expected, 90)
    known = words.encode(expected, 16)
    monkeypatch.setattr(prepare, "_HERE", 1)
    for workers, size in ((1, 1), (2, 33), (3, 1 << 20)):
        with monkeypatch.context() as patch:
            cut(patch, size)
            data, form = DataFile(tmp_path / f"f.{ending}"), source(f"f.{ending}").format("t")
            cache = tmp_path / f"{workers}"
            split = load_split(data, form, words, 16, cache=cache, reading=Reading(workers))
        assert np.array_equal(split.tokens, known.tokens)
        assert np.array_equal(split.offsets, known.offsets)
        assert split.labels.tolist() == [0.0, 1.0] * 30
