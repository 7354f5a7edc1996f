"""Write a JSON line for each step into files of limited size.

``metrics.jsonl`` is appended to; a large one is renamed ``metrics-STEP.jsonl``, STEP being its
first, and a new one begins.  The files concatenated have the lines of all steps in order.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import InputError
from ..utils.files import check_own_file, explained, write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_json, read_bytes


class StepLines:
    """Such a file and its older pieces.

    Args:
        path: of the newest piece.
        limit: bytes from which on it is put aside; 0: never.
        keep: how many of those put aside stay; 0: all.
    """

    def __init__(self, path: Path, *, limit: int = 0, keep: int = 0) -> None:
        self._path, self._limit, self._keep = path, limit, keep

    @property
    def pieces(self) -> list[Path]:
        """All that there are, the oldest first."""
        return [*self._put_aside(), *([self._path] if self._path.exists() else [])]

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines.

        Raises:
            InputError: the disk is full, or the like, or a link stands where the file goes.
        """
        check_own_file(self._path)
        with explained("write", self._path):
            with open(self._path, "a", encoding="utf-8", opener=_open_own) as file:
                file.writelines(dump_json(line) + "\n" for line in lines)
                size = file.tell()
            if self._limit and size >= self._limit:
                self._put_aside_newest()

    def cut(self, start: int) -> None:
        """Drop the lines of steps from ``start`` on, and any that is damaged.

        Raises:
            InputError: the files cannot be read or written, or are none.
        """
        for path in (*self._put_aside(), self._path):
            check_own_file(path)
        self._cut_newest(start)
        for path in reversed(self._put_aside()):
            if self._path.stat().st_size > 0:
                return
            with explained("write", self._path):
                os.replace(path, self._path)
            self._cut_newest(start)

    def _cut_newest(self, start: int) -> None:
        content = read_bytes(self._path, None) if self._path.exists() else None
        kept = [line for line in (content or b"").splitlines() if _step_of(line) < start]
        text = b"".join(line + b"\n" for line in kept)
        if text != content or self._path.stat().st_nlink > 1:  # another name may be a copy's
            write_text(self._path, text.decode())

    def _put_aside(self) -> Sequence[Path]:
        name = re.compile(rf"{re.escape(self._path.stem)}-(\d{{8,}}){re.escape(self._path.suffix)}")
        found = {
            int(match[1]): path
            for path in self._path.parent.glob(f"*{self._path.suffix}")
            if (match := name.fullmatch(path.name))
        }
        return [found[step] for step in sorted(found)]

    def _put_aside_newest(self) -> None:
        with self._path.open("rb") as file:
            first = _step_of(file.readline())
        aside = self._path.with_stem(f"{self._path.stem}-{first:08}")
        if os.path.lexists(aside):
            raise InputError(f"{aside}: is there already; move it elsewhere")
        os.rename(self._path, aside)
        if self._keep:
            for path in self._put_aside()[: -self._keep]:
                path.unlink()


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _step_of(line: bytes) -> int:
    """Return a line's step; of a line that was cut off, a number larger than any."""
    try:
        step = parse_json(line.decode())["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    return step if type(step) is int else 1 << 62
