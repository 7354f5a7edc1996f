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
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from ..utils.ownership import check_private_place
from .entry import (
    DamagedEntryError,
    EntryWriter,
    check_entry,
    open_arrays,
    open_entry,
    read_text,
    write_text,
)
from .origins import Origin, with_paths, without_paths
from .prepare import Preparation, prepared
from .rows import lines_on
from .split import TokenizedSplit
from .table import OnBadRow
from .task_schema import TaskSchema
from .tokenized import Array, Joiner
from .tokenizer import SPECIAL_TOKENS, Tokenizer
from .workshop import abandoned, workshop

_VERSION = 11
"""Raise it when reading, tokenizing or the layout of an entry changes."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_TIMES_MADE = 3

T = TypeVar("T")

_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""Errors of rename where the new folder's name is taken."""


def default_cache() -> Path:
    """Return ``$SUPERBERT_CACHE`` or, where that is not set, ``~/.cache/superbert``."""
    folder = os.environ.get("SUPERBERT_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "superbert"


Show = Callable[[int, float], None]
"""Is told how many rows of a file are done, and which share of it is read."""


@contextmanager
def unwatched(_name: str, _counted: str = "rows") -> Iterator[Show]:
    """Show nothing of how a file is read."""

    def show(_rows: int, _share: float) -> None:
        pass

    yield show


class Reading(NamedTuple):
    """How data are read, which changes nothing about what is read.

    Attributes:
        workers: processes that tokenize a large file; 0 for as many as there are cores.
        verify: read all of large files to tell whether they are what they were, not samples.
        watch: opens what shows the progress of the file that it is given the name of, and, unless
            it is rows, of what is counted.
    """

    workers: int = 0
    verify: bool = False
    watch: Callable[..., AbstractContextManager[Show]] = unwatched


def load_split(
    origin: Origin,
    format_: TaskSchema,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    labelled: bool = True,
    on_bad_row: OnBadRow = "error",
    joins_pairs: bool = False,
    cache: Path | None = None,
    reading: Reading = Reading(),  # noqa: B008 -- immutable
) -> TokenizedSplit:
    """Return a file's or data set's tokenized examples from the cache, or tokenize and cache them.

    Args:
        origin: the file or data set.
        format_: its columns and the range of its label.
        tokenizer: what to split the sentences with.
        max_length: the most tokens in a sentence, ``[CLS]`` and ``[SEP]`` included.
        labelled: read the labels too.
        on_bad_row: what to do with a row that cannot be used.
        joins_pairs: make one sequence of the two sentences of an example.
        cache: the cache's folder; None for :func:`default_cache`.
        reading: how data are read.

    Raises:
        InputError: the file cannot be used, or changes while it is read; or the cache cannot be
            written, or others can write it.
    """
    entry = _place_of(
        cache,
        data=origin.digest(verify=reading.verify),
        format=repr(format_),
        tokenizer=tokenizer.definition,
        max_length=max_length,
        labelled=labelled,
        on_bad_row=on_bad_row,
        joins_pairs=joins_pairs,
    )

    def make() -> None:
        with (
            origin.rows(format_, labelled=labelled) as rows,
            _making(entry, verify=reading.verify) as made,
        ):
            preparation = Preparation(
                schema=format_,
                labelled=labelled,
                on_bad_row=on_bad_row,
                max_length=max_length,
                joins_pairs=joins_pairs,
            )
            with EntryWriter(made) as writer, reading.watch(origin.name) as show:
                joiner = Joiner(writer.append)
                for piece in prepared(rows.pieces, preparation, tokenizer, reading.workers):
                    joiner.add(piece)
                    show(joiner.rows, rows.share())
                joiner.check_usable(origin.where)
                origin.check_unchanged()
                totals = joiner.totals()
                totals = totals._replace(first_bad=without_paths(totals.first_bad, origin))
                writer.finish(format_.task, totals, tuple(rows.notes), origin.name)

    split = _opened(
        entry, lambda verify: open_entry(entry, verify=verify), make, verify=reading.verify
    )
    return replace(  # of any name that it may have
        split,
        notes=lines_on(origin.name, split.notes),
        first_bad=with_paths(split.first_bad, origin),
    )


def load_arrays(
    made_from: Sequence[str],
    data: str,
    what: str,
    write: Callable[[EntryWriter], Mapping[str, Any]],
    *,
    cache: Path | None = None,
    verify: bool = False,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return arrays from the cache, or make and cache them.

    Args:
        made_from: all that decides them.
        data: the name of what they are made from, for those who look at the cache.
        what: they are, for the same.
        write: writes them; returns what is to be known of them besides.
        cache: as of :func:`load_split`.
        verify: read all of large files in the cache, not samples.

    Returns:
        The arrays, memory-mapped, and what ``write`` returned.

    Raises:
        InputError: as of :func:`load_split`.
    """
    entry = _place_of(cache, arrays=[*made_from])

    def make() -> None:
        with _making(entry, verify=verify) as made, EntryWriter(made) as writer:
            writer.finish_arrays(data, what, write(writer))

    return _opened(entry, lambda verify: open_arrays(entry, verify=verify), make, verify=verify)


def load_vocabulary(
    made_from: Sequence[str],
    data: str,
    learn: Callable[[], Tokenizer],
    *,
    cache: Path | None = None,
) -> Tokenizer:
    """Return a learnt vocabulary from the cache, or learn and cache it.

    Args:
        made_from: all that decides it.
        data: the names of the texts, for those who look at the cache.
        learn: learns it.
        cache: as of :func:`load_split`.

    Raises:
        InputError: as of :func:`load_split`.
    """
    entry = _place_of(cache, vocabulary=[*made_from])
    with suppress(DamagedEntryError):
        return Tokenizer.from_json(read_text(entry), SPECIAL_TOKENS)
    tokenizer = learn()
    try:
        with _making(entry) as made:
            write_text(made, tokenizer.to_json(), data, f"{tokenizer.vocab_size:,} tokens")
    except OSError as error:
        raise _cannot_write(entry, error) from error
    return tokenizer


def _place_of(cache: Path | None, **made_from: object) -> Path:
    """Return the folder of the entry that is made from some things.

    Raises:
        InputError: others can write the cache.
    """
    root = default_cache() if cache is None else cache
    check_private_place(root)
    whole = {"user": os.geteuid(), "version": _VERSION} | made_from
    return root / hashlib.sha256(dump_json(whole, sort_keys=True).encode()).hexdigest()


def _cannot_write(entry: Path, error: Exception) -> InputError:
    reason, advice = getattr(error, "strerror", None) or error, ""
    place = "can be written"
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        advice, place = "free some space (see python -m engine.cache --help), or ", "has more"
    return InputError(
        f"cannot write the cache of tokenized data: {reason}, {entry.parent}; "
        f"{advice}set SUPERBERT_CACHE to a folder that {place}"
    )


def _opened(
    entry: Path, open_: Callable[[bool], T], make: Callable[[], None], *, verify: bool
) -> T:
    """Open an entry, which is made if it is not there, or damaged.

    If another process removes it before it is open, it is made again, a few times.

    Args:
        entry: its folder.
        open_: opens it; takes whether all of large files is read.
        make: makes it.
        verify: read all of large files if it is there already.

    Raises:
        InputError: it cannot be written, or is removed each time.
    """
    with suppress(DamagedEntryError):
        return open_(verify)
    times = 0
    while True:
        times += 1
        try:
            make()
            return open_(False)
        except OSError as error:
            raise _cannot_write(entry, error) from error
        except DamagedEntryError as error:
            if times == _TIMES_MADE or entry.exists():
                raise _cannot_write(entry, error) from error


@contextmanager
def _making(entry: Path, *, verify: bool = False) -> Iterator[Path]:
    """Make an empty folder, and give it the name of an entry when the body is done.

    Args:
        entry: where it goes; a damaged one may be there.
        verify: read all of such a one to tell whether it is damaged.

    Raises:
        OSError: the system refuses it.
    """
    root = entry.parent
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in abandoned(root):
        shutil.rmtree(folder, ignore_errors=True)
    with workshop(root) as made:
        yield made
        for attempt in count():
            try:
                os.rename(made, entry)
                return
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
            with suppress(DamagedEntryError):
                check_entry(entry, verify=verify)
                return  # another process was faster
            with suppress(FileNotFoundError):
                os.rename(entry, made.with_name(f"damaged-{attempt}"))
