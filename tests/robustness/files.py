"""Corrupt the structure of files that training reads or writes, and run whole commands on them.

Tokenizers of every model of the library, what a run writes down, weights in other dtypes and with
gaps, configs with huge numbers, data set folders that lead elsewhere or hold pickles, texts that a
terminal or a spreadsheet would obey.
"""

import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch

from .base import PROGRAMS, Base
from .cases import Case, Tried, try_cases
from .checks import (
    changes,
    outcome_of,
    problems_of_end,
    problems_of_files,
    problems_of_run,
    snapshot,
)
from .children import call, command
from .compare import losses
from .files_of_data import SECRET, lead_elsewhere, write_odd_texts
from .files_of_models import corrupt_config, corrupt_tokenizer, corrupt_weights
from .files_of_runs import corrupt_metrics, corrupt_papers, corrupt_results
from .given import Given

_PICKLE_READ = "torch.load was called"

KINDS: dict[str, tuple[int, Callable[[Base, Path, random.Random], Given]]] = {
    "tokenizer": (3, corrupt_tokenizer),
    "weights": (2, corrupt_weights),
    "config": (1, corrupt_config),
    "metrics": (2, corrupt_metrics),
    "results": (1, corrupt_results),
    "papers": (1, corrupt_papers),
    "data set": (1, lead_elsewhere),
    "texts": (1, write_odd_texts),
}
"""Share of each kind among the cases, and the function that makes one."""


def try_files(base: Base, folder: Path, count: int, seed: int, only: int | None) -> dict[str, Any]:
    """Try ``count`` corrupted files: :func:`.try_cases`."""
    return try_cases("files", folder, functools.partial(_attempt, base), count, seed, only)


def _attempt(base: Base, case: Case) -> Tried:
    (make,) = case.draw.choices(
        [make for _, make in KINDS.values()], [share for share, _ in KINDS.values()]
    )
    here = case.folder / "here"
    here.mkdir()
    what, program, arguments = make(base, here, case.draw)
    for stream in ("stdout", "stderr"):
        (case.folder / stream).touch()
    before = snapshot(case.folder)
    prepare = functools.partial(_prepare, case.folder)
    ended = call(command(PROGRAMS[program], arguments), case.folder, prepare)
    after = snapshot(case.folder)
    problems = list(problems_of_end(ended))
    if _PICKLE_READ in ended.out + ended.error:
        problems.append("a pickle was read")
    problems += changes(before, after, before, "here")
    if ended.status == 0:
        problems += _problems_of_new(case.folder, set(after) - set(before))
        if make is corrupt_tokenizer and not problems:
            problems += _problems_of_repeating(case.folder, arguments, prepare)
    return Tried(f"{what}, {program}", outcome_of(ended), problems, ended.last_line)


def _problems_of_repeating(
    folder: Path, arguments: list[str], prepare: Callable[[], None]
) -> Iterator[str]:
    """Yield whether the same training has other losses again, when no cache keeps its tokens."""
    new = folder / "here" / "new"
    before = losses(new)
    shutil.rmtree(new)
    call(command(PROGRAMS["train"], arguments), folder, prepare)
    if losses(new) != before:
        yield "done, but the same training has other losses again"


def _prepare(folder: Path) -> None:
    """Let whatever reads a pickle die of it; keep all caches in the case's folder."""
    datasets.config.HF_DATASETS_CACHE = folder / "here" / "data sets"
    os.environ["SUPERBERT_CACHE"] = tempfile.mkdtemp(dir=folder / "here")

    def load(*_given: object, **_options: object) -> None:
        print(_PICKLE_READ, flush=True)
        os._exit(3)

    torch.load = load


def _problems_of_new(folder: Path, names: set[str]) -> Iterator[str]:
    """Yield what is wrong with the files that a command wrote."""
    for name in sorted(names):
        path = folder / name
        if path.is_file() and name not in ("stdout", "stderr"):
            content = path.read_bytes()
            if SECRET.encode() in content and name.startswith("here/new"):
                yield f"{name} has what stands in a file elsewhere"
            if path.suffix in (".tsv", ".md") and b"\x1b" in content:
                yield f"{name} has escape sequences"
            if path.suffix == ".html" and b"<script>x" in content:
                yield f"{name} has a script of the data's"
            if path.suffix == ".tsv":
                cells = content.decode("utf-8", "replace").replace("\n", "\t").split("\t")
                yield from (
                    f"{name} has the cell {c!a}" for c in cells if c[:1] in ("=", "@", "\r")
                )
    new = folder / "here" / "new"
    if new.is_dir():
        yield from problems_of_files(new)
        if (new / "recipe.toml").exists():
            yield from problems_of_run(new)
