"""Decode the text of a file: by its byte order mark, as a recipe says, or as UTF-8."""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from ..utils.errors import InputError
from .addresses import Place
from .dialect import AUTO, Dialect

_MARKS = {  # that of UTF-32 begins with that of UTF-16, so it comes first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}

_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
"""Encodings that a file without a byte order mark is held against where it has zero bytes."""

_LOOKED_AT = 1 << 16
"""Bytes from which that is told."""

_LEFT_OPEN = ("utf-16", "utf-32")
"""Encodings in two orders of bytes, of which a byte order mark says which."""

_TRANSFORMS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")
"""Encodings in Python that are not of text, or that no file is written in."""

_HALF = re.compile(r"[\ud800-\udfff]")
"""Halves of characters, which UTF-7 can spell and nothing can write down."""

_UNDECODED = re.compile(r"[\udc80-\udcff]")

_SAMPLE = "a,\t\n"


class Text(NamedTuple):
    """The text of a file.

    Attributes:
        pieces: of it, without a byte order mark.  A byte that is not UTF-8 stands in them as half
            of a character (the error handler ``surrogateescape``): :func:`undecoded` finds it.
            Reading on may raise InputError.
        notes: what was found out about the file, a phrase each; complete once it is read.
    """

    pieces: Iterator[str]
    notes: list[str]


def decode(pieces: Iterable[bytes], path: Place, dialect: Dialect) -> Text:
    """Return the text of a file.

    Bytes that are not UTF-8 make their row unusable; in any other encoding they are an error
    of the file, since nobody knows where the next row begins.

    Args:
        pieces: of the file's content.
        path: where it comes from, for error messages.
        dialect: its encoding.

    Raises:
        InputError: the encoding is another, or its order of bytes is not known.
    """
    pieces = iter(pieces)
    beginning = b""
    for piece in pieces:
        beginning += piece
        if len(beginning) >= _LOOKED_AT:
            break
    marked = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), "")
    encoding, notes = dialect.encoding, list[str]()
    may_be_utf8 = False
    if encoding == AUTO:
        encoding = marked or _unmarked(beginning, path, dialect)
        if encoding != "utf-8":
            notes.append(f"{encoding.upper()}, by its byte order mark")
    else:
        _check_mark(encoding, marked, path, dialect)
        may_be_utf8 = not marked and _plain(encoding) != "utf-8"
    return Text(
        _decoded(chain([beginning], pieces), encoding, path, dialect, notes, may_be_utf8), notes
    )


def _decoded(
    pieces: Iterable[bytes],
    encoding: str,
    path: Place,
    dialect: Dialect,
    notes: list[str],
    may_be_utf8: bool,
) -> Iterator[str]:
    is_utf8 = _plain(encoding) == "utf-8"
    errors = "surrogateescape" if is_utf8 else "strict"
    decoder = codecs.getincrementaldecoder("utf-8" if is_utf8 else encoding)(errors)
    other = _Utf8Check() if may_be_utf8 else None
    is_first, given = True, 0
    for piece in chain(pieces, [None]):
        if other is not None:
            other.look_at(piece)
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece or b"", final=piece is None)
            if not is_utf8 and _HALF.search(text):
                raise UnicodeError("half of a character")
        except UnicodeError as error:
            where = ""
            if isinstance(error, UnicodeDecodeError):
                where = f" at byte {given - kept + error.start + 1:,}"
            advice = dialect.advice("encoding to its own", "convert the file to UTF-8")
            raise InputError(f"not {encoding}{where}, {path}; {advice}") from error
        given += len(piece or b"")
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text
    if other is not None and other.found:
        notes.insert(0, f"{encoding}, though all of it is UTF-8")


class _Utf8Check:
    """Whether bytes that are read by another encoding are letters beyond ASCII in UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._can_be, self._is_ascii = True, True

    def look_at(self, piece: bytes | None) -> None:
        """Look at the next piece; None for the end."""
        if not self._can_be:
            return
        self._is_ascii = self._is_ascii and (piece or b"").isascii()
        try:
            self._decoder.decode(piece or b"", final=piece is None)
            self._can_be = b"\0" not in (piece or b"")
        except UnicodeDecodeError:
            self._can_be = False

    @property
    def found(self) -> bool:
        """Whether they are, so far."""
        return self._can_be and not self._is_ascii


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
    return dialect.advice('encoding to its own ("cp1252", "cp932", …)', otherwise)


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


def _unmarked(content: bytes, path: Place, dialect: Dialect) -> str:
    """Return UTF-8, unless a file is clearly of UTF-16 or UTF-32."""
    looks = next((name for name in _WIDE if _is_text(content[:_LOOKED_AT], name)), "")
    if not looks:
        return "utf-8"
    advice = dialect.advice(f'encoding = "{looks}"', "convert the file to UTF-8")
    raise InputError(f"bytes are zero as in {looks.upper()}, {path}; {advice}")


def _is_text(beginning: bytes, encoding: str) -> bool:
    """Return whether a file with zero bytes is text in an encoding of two or four bytes.

    All of it has to decode, to text with some ASCII in it, such as delimiters and line ends, and
    without zeros.  Bytes of other encodings, taken by twos, are letters of any script but Latin.
    """
    if b"\0" not in beginning:
        return False
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(beginning)
    except UnicodeError:
        return False
    return "\0" not in text and any(character in text for character in "\n\t,;|:")


def _check_mark(encoding: str, marked: str, path: Place, dialect: Dialect) -> None:
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
