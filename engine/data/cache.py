"""Cache tokenized splits on disk, under a hash of their inputs.

An entry is a folder named by the hash of everything that decides its content, so it never goes
stale.  It is written under another name and renamed when complete, so that a reader never sees half
of one and two processes that make the same entry do not disturb each other.  Every file in it is
checked against its hash when it is opened; a damaged entry is made again.  Since the hashes are in
the entry too, an entry that is not the user's own, or that others can write, is not used.
"""

import errno
import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from ..utils.ownership import check_private_place, is_own_folder
from ..utils.untrusted_io import parse_json
from .rows import lines_on
from .source import Origin
from .split import TokenizedSplit, tokenize_by_schema
from .table import OnBadRow
from .task_schema import TaskSchema
from .tokenizer import Tokenizer
from .windows import Spans

_VERSION = 8
"""Raise it when reading, tokenizing or the layout of an entry changes."""

_INDEX, _META = "index.json", "meta.json"
_ARRAYS = (
    "tokens",
    "offsets",
    "labels",
    "token_types",
    "word_offsets",
    "word_sizes",
    "text_ids",
)
_SPANS = "spans."
_FILES = {
    *(f"{name}.npy" for name in _ARRAYS),
    *(f"{_SPANS}{name}.npy" for name in Spans._fields),
    _META,
}

_META_FIELDS = ("task", "ids", "columns", "truncated", "bad_rows", "blank", "notes")

_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""Errors of rename where the new folder's name is taken."""


def default_cache() -> Path:
    """Return ``$SUPERBERT_CACHE`` or, where that is not set, ``~/.cache/superbert``."""
    folder = os.environ.get("SUPERBERT_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "superbert"


def load_split(
    origin: Origin,
    format_: TaskSchema,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    labelled: bool = True,
    on_bad_row: OnBadRow = "error",
    cache: Path | None = None,
) -> TokenizedSplit:
    """Return a file's or data set's tokenized examples from the cache, or tokenize and cache them.

    Args:
        origin: the file or data set.
        format_: its columns and the range of its label.
        tokenizer: what to split the sentences with.
        max_length: the most tokens in a sentence, ``[CLS]`` and ``[SEP]`` included.
        labelled: read the labels too.
        on_bad_row: what to do with a row that cannot be used.
        cache: the cache's folder; None for :func:`default_cache`.

    Raises:
        InputError: the file cannot be used, or the cache not be written, or others can write it.
    """
    root = default_cache() if cache is None else cache
    check_private_place(root)
    made_from = {
        "user": os.geteuid(),
        "version": _VERSION,
        "data": origin.digest(),
        "format": repr(format_),
        "tokenizer": tokenizer.to_json(),
        "max_length": max_length,
        "labelled": labelled,
        "on_bad_row": on_bad_row,
    }
    key = hashlib.sha256(dump_json(made_from, sort_keys=True).encode()).hexdigest()
    entry = root / key
    try:
        return _with_name(_open_entry(entry), origin.name)
    except _DamagedEntryError:
        table = origin.table(format_, labelled=labelled, on_bad_row=on_bad_row)
        split = tokenize_by_schema(format_, table, tokenizer, max_length)
    try:
        return _with_name(_write_entry(entry, split), origin.name)
    except (OSError, _DamagedEntryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write the cache of tokenized data: {reason}, {root}; "
            "set SUPERBERT_CACHE to a folder that can be written"
        ) from error


def _with_name(split: TokenizedSplit, name: str) -> TokenizedSplit:
    """Name the file in the notes: the same content has the same entry under any name."""
    return replace(split, notes=lines_on(name, split.notes))


class _DamagedEntryError(Exception):
    """A missing or damaged entry."""


def _open_entry(entry: Path) -> TokenizedSplit:
    """Open an entry, memory-mapped."""
    try:
        if not is_own_folder(entry):
            raise _DamagedEntryError(f"{entry.name} belongs to others, or others can write it")
        index = parse_json((entry / _INDEX).read_bytes())
        if not index.keys() <= _FILES:
            raise _DamagedEntryError("the index names other files")
        for name, digest in index.items():
            if _file_hash(entry / name) != digest:
                raise _DamagedEntryError(name)
        meta = parse_json((entry / _META).read_bytes())
        arrays = {
            name: np.load(entry / f"{name}.npy", mmap_mode="r")
            for name in _ARRAYS
            if f"{name}.npy" in index
        }
        if f"{_SPANS}{Spans._fields[0]}.npy" in index:
            of_spans = (
                np.load(entry / f"{_SPANS}{name}.npy", mmap_mode="r") for name in Spans._fields
            )
            arrays["spans"] = Spans(*of_spans)
        return TokenizedSplit(
            **(meta | {name: tuple(meta[name]) for name in ("blank", "notes")}),
            **({"labels": None} | arrays),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _DamagedEntryError(str(error)) from error


def _write_entry(entry: Path, split: TokenizedSplit) -> TokenizedSplit:
    """Put a split into the cache and return it as the cache has it."""
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=entry.parent) as workshop:
        made = Path(workshop) / "made"
        made.mkdir(mode=0o700)
        for name in _ARRAYS:
            if (array := getattr(split, name)) is not None:
                np.save(made / f"{name}.npy", array)
        for name, array in ({} if split.spans is None else split.spans._asdict()).items():
            np.save(made / f"{_SPANS}{name}.npy", array)
        meta = {name: getattr(split, name) for name in _META_FIELDS}
        (made / _META).write_text(dump_json(meta), encoding="utf-8")
        index = {path.name: _file_hash(path) for path in made.iterdir()}
        (made / _INDEX).write_text(dump_json(index), encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o600)
        for attempt in count():
            try:
                os.rename(made, entry)
                break
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
            with suppress(_DamagedEntryError):
                return _open_entry(entry)  # another process was faster
            with suppress(FileNotFoundError):
                os.rename(entry, Path(workshop) / f"damaged-{attempt}")
    return _open_entry(entry)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
