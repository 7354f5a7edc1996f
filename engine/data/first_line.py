"""Find the columns in a delimited file's first line, or the settings by which it has them."""

import csv
import json
from collections.abc import Sequence

from .dialect import Dialect, Quoting
from .rows import shorten

_CANDIDATES = ("\t", ",", ";", "|")
"""Delimiters that are tried on a header which lacks a column."""


def split_line(line: str, delimiter: str, quoting: Quoting) -> list[str]:
    """Return the fields of a line.

    Raises:
        csv.Error: its quotes do not fit together.
    """
    if quoting == "none":
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter, strict=True), [])


def has_columns(
    line: str, columns: Sequence[str], delimiter: str, quoting: Quoting, *, header: bool
) -> bool:
    """Return whether a first line that is written so has the wanted columns."""
    try:
        fields = split_line(line, delimiter, quoting)
    except csv.Error:
        return False
    if not header:
        return len(fields) >= max(map(int, columns))
    return set(columns) <= {name.strip() for name in fields}


def _what_to_set(
    line: str, columns: Sequence[str], dialect: Dialect, delimiter: str
) -> dict[str, str]:
    """Return the fields of a source, and their values, by which a first line has its columns."""
    delimiters = [delimiter, *_CANDIDATES]
    if dialect.header:
        delimiters += [sign for sign in line if not (sign.isalnum() or sign in '"_\0')]
    quotings: tuple[Quoting, ...] = ("none", "csv") if dialect.quoting == "none" else ("csv",)
    for quoting in quotings:
        for other in dict.fromkeys(delimiters):
            if has_columns(line, columns, other, quoting, header=dialect.header):
                given = {"delimiter": (delimiter, other), "quoting": (dialect.quoting, quoting)}
                return {name: new for name, (old, new) in given.items() if new != old}
    return {}


def is_of_another_dialect(
    line: str, columns: Sequence[str], dialect: Dialect, delimiter: str
) -> bool:
    """Return whether a first line is broken as it is read, and has its columns read otherwise."""
    try:
        split_line(line, delimiter, dialect.quoting)
    except csv.Error:
        return bool(_what_to_set(line, columns, dialect, delimiter))
    return False


def advice_on(line: str, columns: Sequence[str], dialect: Dialect, delimiter: str) -> str:
    """Return what to do about a first line that lacks a column."""
    otherwise = "give a file with that column"
    to_set = _what_to_set(line, columns, dialect, delimiter)
    if "delimiter" in to_set and not dialect.table:
        return f"separate its columns by {_spelt(delimiter)}"
    if to_set:
        settings = [f"{dialect.table}.{name} = {_spelt(value)}" for name, value in to_set.items()]
        return "set " + " and ".join(settings) if dialect.table else otherwise
    if line.lower().startswith("sep="):
        return f"delete its first line, {shorten(line)}, which spreadsheets alone read"
    if not dialect.header:
        return otherwise
    return dialect.advice("header = false if that is a row already", otherwise)


def _spelt(delimiter: str) -> str:
    return json.dumps(delimiter, ensure_ascii=False)
