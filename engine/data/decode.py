"""Decode the text of a file: by its byte order mark, as a recipe says, or as UTF-8."""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .dialect import AUTO, Dialect

_MARKS = {  # that of UTF-32 begins with that of UTF-16, so it comes first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}

_ZEROS = {
    (1, 3): "utf-16-le",
    (0, 2): "utf-16-be",
    (1, 2, 3): "utf-32-le",
    (0, 1, 2): "utf-32-be",
}
"""Which of the first four bytes are zero where a text begins with ASCII."""

_LEFT_OPEN = ("utf-16", "utf-32")
"""Encodings in two orders of bytes, of which a byte order mark says which."""

_TRANSFORMS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")
"""What Python calls text encodings and no file is written in."""

_UNDECODED = re.compile(r"[\udc80-\udcff]")

_SAMPLE = "a,\t\n"


class Text(NamedTuple):
    """The text of a file.

    Attributes:
        text: without a byte order mark.  A byte that is not UTF-8 stands in it as half of a
            character (the error handler ``surrogateescape``): :func:`undecoded` finds it.
        notes: what was found out about the file, a phrase each.
    """

    text: str
    notes: tuple[str, ...] = ()


def decode(content: bytes, path: Path, dialect: Dialect) -> Text:
    """Return the text of a file.

    Bytes that are not UTF-8 spoil the row that they are in; in any other encoding they are an error
    of the file, since nobody knows where the next row begins.

    Args:
        content: of the file.
        path: where it comes from, for error messages.
        dialect: its encoding.

    Raises:
        InputError: the encoding is another, or its order of bytes is not known.
    """
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "")
    encoding, notes = dialect.encoding, list[str]()
    if encoding == AUTO:
        encoding = marked or _unmarked(content, path, dialect)
        if encoding != "utf-8":
            notes.append(f"{encoding.upper()}, by its byte order mark")
    else:
        _check_mark(encoding, marked, path, dialect)
    if _plain(encoding) == "utf-8":
        return Text(content.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    try:
        return Text(content.decode(encoding).removeprefix("\ufeff"), tuple(notes))
    except UnicodeError as error:
        where = f" at byte {error.start + 1:,}" if isinstance(error, UnicodeDecodeError) else ""
        advice = dialect.advice("encoding to its own", "convert the file to UTF-8")
        raise InputError(f"not {encoding}{where}, {path}; {advice}") from error


def undecoded(text: str) -> str:
    """Return which byte of a piece of :class:`Text` is not UTF-8 and where; '' where all is."""
    found = _UNDECODED.search(text)
    if found is None:
        return ""
    before = text[: found.start()].encode("utf-8", "surrogateescape")
    return f"byte 0x{ord(found[0]) - 0xDC00:02x} at {len(before) + 1}"


def not_utf8(dialect: Dialect, otherwise: str) -> str:
    """Return what to do about a byte that is not UTF-8."""
    if dialect.encoding != AUTO:
        return otherwise
    return dialect.advice('encoding ("cp1252" or "latin-1", say)', otherwise)


def check_encoding(name: str) -> str:
    """Return the name of an encoding.

    Raises:
        ValueError: Python knows none of that name for text.
    """
    if name == AUTO:
        return name
    try:
        if codecs.lookup(name).name not in _TRANSFORMS and _round_trip(name) == _SAMPLE:
            return name
    except (LookupError, UnicodeError):
        pass
    raise ValueError("not a text encoding of Python; utf-8, utf-16, latin-1 and cp1252 are some")


def _round_trip(name: str) -> str:
    return _SAMPLE.encode(name).decode(name)


def _plain(encoding: str) -> str:
    """Return Python's name of an encoding, the same for UTF-8 with a byte order mark."""
    return codecs.lookup(encoding).name.removesuffix("-sig")


def _unmarked(content: bytes, path: Path, dialect: Dialect) -> str:
    """Return UTF-8, unless the first four bytes are clearly of UTF-16 or UTF-32."""
    zeros = tuple(place for place, byte in enumerate(content[:4]) if byte == 0)
    looks = _ZEROS.get(zeros)
    if looks is None:
        return "utf-8"
    advice = dialect.advice(f'encoding = "{looks}"', "convert the file to UTF-8")
    raise InputError(f"bytes are zero as in {looks.upper()}, {path}; {advice}")


def _check_mark(encoding: str, marked: str, path: Path, dialect: Dialect) -> None:
    plain = _plain(encoding)
    if not marked and plain in _LEFT_OPEN:
        advice = dialect.advice(
            f'encoding = "{plain}-le" or "{plain}-be"', "begin the file with one"
        )
        raise InputError(f"no byte order mark, which {encoding} needs, {path}; {advice}")
    if marked and plain not in (marked, marked[: -len("-le")]):
        advice = f"convert the file to {encoding}"
        if dialect.table:
            advice = f"leave {dialect.table}.encoding out"
        raise InputError(f"its byte order mark says {marked}, not {encoding}, {path}; {advice}")
