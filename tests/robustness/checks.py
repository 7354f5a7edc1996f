"""Check what must hold however a command ends: its status, its last line, and its files."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGPIPE, SIGTERM
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.checkpoints.manifest import verify
from engine.checkpoints.store import KINDS
from engine.cli import common
from engine.runs.run import open_run
from engine.utils.errors import InputError

from .children import Ended

STATUSES = {0} | {
    number for name, number in vars(common).items() if name.isupper() and isinstance(number, int)
}
STATUSES |= {common.STOPPED + number for number in (SIGHUP, SIGINT, SIGPIPE, SIGTERM)}
"""Exit statuses of a command."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NOT_FINITE = re.compile(r"(?<![\w/.=\"'-])-?(nan|inf)(?![\w/])", re.IGNORECASE)


def outcome_of(ended: Ended) -> str:
    """Return the word under which an end is counted."""
    if ended.crash:
        return "crashed" if ended.status is not None else "hung"
    return {0: "done", common.BAD_INPUT: "refused"}.get(ended.status, f"status {ended.status}")


def problems_of_end(ended: Ended, *, on_terminal: bool = False) -> Iterator[str]:
    """Yield what is wrong with the way a command ended."""
    if ended.crash:
        yield f"{ended.crash}{_where(ended.error)}"
        return
    if "Traceback" in ended.error:
        yield f"a traceback: {_cause(ended.error)}"
    elif ended.status not in STATUSES:
        yield f"status {ended.status}: {ended.error[-200:]}"
    elif ended.status == common.BAD_INPUT:
        lines = ended.error.splitlines()
        if not (lines and lines[-1].startswith("error: ")):
            yield f"status 2, but its last line is {lines[-1:]}"
    # Libraries draw their progress on stderr; its last line is ours.
    said = ended.out + "".join(ended.error.splitlines()[-1:])
    if not on_terminal and (found := _CONTROL.search(said)):
        yield f"prints the control character {found[0]!a}"
    if ended.status == 0 and (found := _NOT_FINITE.search(ended.out)):
        yield f"done, and says {found[0]}"


def _where(error: str) -> str:
    found = re.search(r'File "[^"]*?([^/"]+/[^/"]+)", line (\d+) in (\w+)', error)
    panic = re.search(r"panicked at .*", error)
    return (f" in {found[1]}:{found[2]} {found[3]}" if found else "") + (
        f" ({panic[0]})" if panic else ""
    )


def _cause(error: str) -> str:
    """Return the last line of a traceback, and the last place of ours in it."""
    places = re.findall(r'File "[^"]*/(?:engine|kernels|bench)/([^"]+)", line (\d+)', error)
    # Not a line of libraries that warn.
    causes = [
        line for line in error.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)?: ", line)
    ]
    place = f" (at {places[-1][0]}:{places[-1][1]})" if places else ""
    return (causes or error.splitlines())[-1][:300] + place


class Entry(NamedTuple):
    """What lies under one name: type and permissions, inode, and content or where a link leads."""

    mode: int
    inode: int
    content: str


def snapshot(folder: Path) -> dict[str, Entry]:
    """Return all that lies below a folder; links are not followed, pipes and devices not read."""
    found = {}
    for path in sorted(folder.rglob("*")):
        known = os.lstat(path)
        content = ""
        if stat.S_ISLNK(known.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(known.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = Entry(known.st_mode, known.st_ino, content)
    return found


def changes(
    before: dict[str, Entry], after: dict[str, Entry], own: Collection[str], new_below: str | None
) -> Iterator[str]:
    """Yield what a command changed that is not its own.

    Args:
        before: :func:`snapshot`.
        after: likewise.
        own: names of files that it may write over.
        new_below: the folder, or file, where it may leave what is new; None: nowhere.
    """
    for name, entry in before.items():
        if name in own:
            continue
        if name not in after:
            yield f"removed {name}"
        elif after[name] != entry:
            what = [
                part for part in Entry._fields if getattr(entry, part) != getattr(after[name], part)
            ]
            yield f"changed {name} ({', '.join(what)})"
    for name in after.keys() - before.keys():
        inside = new_below is not None and (name == new_below or name.startswith(f"{new_below}/"))
        above = new_below is not None and new_below.startswith(f"{name}/")
        if not inside and not above:
            yield f"left {name}"


def problems_of_files(folder: Path) -> Iterator[str]:
    """Yield the JSON files below a folder that are none, or have numbers that are not finite."""
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        if not path.is_file() or path.is_symlink():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            try:
                json.loads(line, parse_constant=_refuse)
            except ValueError as error:
                yield f"{path.relative_to(folder)}: {error}"
                break


def _refuse(constant: str) -> Any:
    raise ValueError(f"has {constant}")


def problems_of_run(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a run that is said to be done: damage, weights not finite."""
    try:
        found = open_run(folder).checkpoints
        for path in (path for kind in KINDS for path in found.all(kind)):
            verify(path)
            for file in path.glob("*.safetensors"):
                for name, tensor in load_file(file).items():
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        yield f"{path.name}: {name} is not finite"
                        break
    except (InputError, SafetensorError) as error:
        yield f"the run does not verify: {error}"
