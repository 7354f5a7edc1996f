"""``python -m bench.large_data``: time and memory until the first step on a large table of pairs.

Writes a table (bench/large_table.py) and trains one step on it with ``engine.train``, each time in
a fresh process: the first start, with an empty cache; the second start, from the cache; and a first
start on 1,000 rows, which tells what of the memory is the table's.  Hugging Face's datasets with
transformers does the same beside it, where both are installed (bench/large_data_peer.py), with the
same tokenizer and as many processes.

Seconds are those from the process's start until its first step is done, imports and the model's
loading included: until the engine's metrics.jsonl has the step's line.  Memory is the highest sum,
over the process and its workers, until then: PSS, which counts pages of mapped files, and without
those pages; and the most resident memory of the main process alone, as the kernel counts it.
"""

import argparse
import contextlib
import csv
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.data.tokenizer import Tokenizer
from engine.metrics.log import STEPS
from engine.utils.errors import InputError

from . import harness, large_table
from .process_memory import watch

_FEW, _TOKENS = 1000, 128
_ENGINE, _PEER = "this engine", "datasets"
_SMALL, _FIRST, _SECOND = f"{_FEW:,} rows", "first start", "second start"
_TRAIN, _DEV = "pairs-train.tsv", "pairs-dev.tsv"
_RECIPE = f"""description = "pairs of a large table"
train = ["pairs"]
batch_size = 32
max_length = {_TOKENS}
max_steps = 1
log_every = 1

[tasks.pairs]
head = "cross"

[tasks.pairs.source]
kind = "pair_classification"
text = ["sentence1", "sentence2"]
label = "is_duplicate"
classes = 2
files = {{ train = "{_TRAIN}", dev = "{_DEV}" }}
"""
_DURATION = """With 3,000,000 rows and two cores a repeat of this engine's starts takes 1.5 minutes,
with those of datasets 4; the folder takes up to 3 GB."""


class Contestant(NamedTuple):
    """A program that starts on a table.

    Attributes:
        command: of a process, with its places for the table's folder, the cache and the output.
        environment: variables, with the same places.
        mark: the file, below the output, that it writes to when the first step is done.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    mark: str


def write_tables(folder: Path, rows: int, seed: int) -> large_table.Table:
    """Write a folder with training and dev pairs, and the recipe."""
    folder.mkdir()
    written = large_table.write(folder / _TRAIN, rows, seed)
    large_table.write(folder / _DEV, _FEW, seed + 1)
    (folder / "pairs.toml").write_text(_RECIPE, encoding="utf-8")
    return written


def tokens_a_word(model: Path, table: Path) -> float:
    """Return how many tokens a model's tokenizer makes of a word of a table, marks included."""
    with table.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = [row[column] for row in rows for column in ("sentence1", "sentence2")]
    tokens = len(Tokenizer.load(model).encode(texts, max_length=_TOKENS).tokens)
    tokens -= 2 * len(texts)  # [CLS] and [SEP]
    return tokens / sum(len(text.split()) for text in texts)


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """Return the programs by name; datasets where it is installed and can do the same."""
    python, workers = sys.executable, str(options.workers)
    init = [] if options.from_scratch else ["--init", str(options.encoder.absolute())]
    train = [python, "-m", "engine.train", "{data}/pairs.toml", "--data", "{data}"]
    train += ["--out", "{out}", "--workers", workers, "--device", options.device, *init]
    found = {_ENGINE: Contestant(tuple(train), {"SUPERBERT_CACHE": "{cache}"}, STEPS)}
    installed = all(map(importlib.util.find_spec, ("datasets", "transformers")))
    if installed and options.peer and not options.from_scratch:
        peer = [python, "-m", "bench.large_data_peer", f"{{data}}/{_TRAIN}"]
        peer += [str(options.encoder.absolute()), "{cache}", "{out}/step", workers, options.device]
        environment = {
            "HF_HOME": "{cache}",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",  # as it asks for beside processes of map
        }
        found[_PEER] = Contestant(tuple(peer), environment, "step")
    return found


def start(contestant: Contestant, data: Path, cache: Path, out: Path, log: Path) -> dict[str, Any]:
    """Start a program, let it end, and return what it took.

    Args:
        contestant: the program.
        data: the table's folder.
        cache: its cache.
        out: a new folder, for what it writes; removed in the end.
        log: takes what it prints.

    Raises:
        RuntimeError: it failed, or took no step.
    """
    places = {"data": str(data), "cache": str(cache), "out": str(out)}
    command = [argument.format(**places) for argument in contestant.command]
    environment = {name: value.format(**places) for name, value in contestant.environment.items()}
    mark = out / contestant.mark
    out.mkdir()
    cache.mkdir(exist_ok=True)
    os.sync()  # what was written before is not written out during the measurement
    began = time.time()
    watched = watch(command, environment, log, lambda: _size(mark) > 0)
    if watched.status != 0 or _size(mark) == 0:
        last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {watched.status}: {last}")
    seconds = mark.stat().st_mtime - began
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "whole_seconds": watched.seconds,
        "peak_bytes": watched.peak.whole,
        "peak_anonymous_bytes": watched.peak.anonymous,
        "main_peak_bytes": watched.main,
        "processes": watched.processes,
        "cache_bytes": sum(map(_size, cache.rglob("*"))),
    }


def starts(contestant: Contestant, folder: Path, log: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the starts of a program by name: on few rows, the first and the second on all."""
    for name, data, keeps in (
        (_SMALL, "small", False),
        (_FIRST, "large", True),
        (_SECOND, "large", False),
    ):
        printed = folder / "logs" / f"{log}, {name}.txt"
        yield name, start(contestant, folder / data, folder / "cache", folder / "out", printed)
        if not keeps:
            shutil.rmtree(folder / "cache")


def _size(path: Path) -> int:
    """Return the bytes of a file; none where there is none."""
    try:
        return path.lstat().st_size if not path.is_dir() else 0
    except FileNotFoundError:
        return 0


def main() -> None:
    """Run the benchmark and print its table."""
    options = harness.parse(_parser())
    if (options.encoder is None) != options.from_scratch:
        raise InputError("--encoder: give a model folder, or --from-scratch, one of the two")
    if options.encoder is not None and not (options.encoder / "config.json").is_file():
        raise InputError(f"--encoder: {options.encoder} is no model folder: no config.json there")
    with contextlib.ExitStack() as stack:
        folder = options.keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif os.path.lexists(folder):
            raise InputError(f"--keep: {folder} is there already; give a new folder")
        else:
            folder.mkdir(parents=True)
        measure(options, folder.absolute())


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Write the tables, start all programs in turn, and print and keep what they took.

    Raises:
        SystemExit: a program failed.
    """
    console = Console(width=120)
    save = harness.Record(options, "large data", torch.device(options.device)).write
    console.print(f"writing {options.rows:,} rows ...")
    table = write_tables(folder / "large", options.rows, options.seed)
    write_tables(folder / "small", _FEW, options.seed)
    (folder / "logs").mkdir()
    programs = contestants(options)
    written = {"seed": options.seed, **table._asdict()}
    if not options.from_scratch:
        written["tokens_a_word"] = tokens_a_word(options.encoder, folder / "small" / _TRAIN)
    results: dict[str, Any] = {
        "encoder": "from scratch" if options.from_scratch else options.encoder.name,
        "table": written,
        "workers": options.workers,
        "starts": {},
        "failures": {},
    }
    for repeat in range(options.repeats):
        names = list(programs)
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            console.print(f"{name}, repeat {repeat + 1} ...")
            try:
                for which, took in starts(programs[name], folder, f"{name}, {repeat + 1}"):
                    results["starts"].setdefault(f"{name}, {which}", []).append(took)
                    save(results)
            except RuntimeError as error:  # a peer may fail in any way; the others go on
                results["failures"][name] = f"{error}"
                for left in ("cache", "out"):
                    shutil.rmtree(folder / left, ignore_errors=True)
    save(results)
    console.print(_table(results))
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text}", soft_wrap=True, markup=False)
    if results["failures"]:
        raise SystemExit(1)


def _table(results: dict[str, Any]) -> Table:
    written = results["table"]
    table = Table(
        title=f"{written['rows']:,} pairs, {written['bytes'] / 1e6:,.0f} MB, until the first step, "
        f"{results['workers']} workers, {results['encoder']}"
    )
    for column in ("", "seconds", "whole run", "MiB", "without files", "main process", "processes"):
        table.add_column(column, justify="right" if column else "left")
    for name, samples in results["starts"].items():
        cells = [
            harness.median([sample[key] for sample in samples])
            for key in (
                *("seconds", "whole_seconds", "peak_bytes", "peak_anonymous_bytes"),
                *("main_peak_bytes", "processes"),
            )
        ]
        seconds = [f"{cell:.1f}" for cell in cells[:2]]
        sizes = [f"{cell / 2**20:,.0f}" for cell in cells[2:5]]
        table.add_row(name, *seconds, *sizes, f"{cells[5]:.0f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.large_data", description=__doc__, epilog=_DURATION)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--rows",
        type=harness.whole(1),
        default=3_000_000,
        help="of the table, 3,000,000 unless given",
    )
    add("--seed", type=harness.whole(0), default=0, help="of the table")
    add(
        "--workers",
        type=harness.whole(1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize, as many as there are cores unless given",
    )
    add("--repeats", type=harness.whole(1), default=1, help="of all starts, the programs in turn")
    add("--encoder", type=Path, metavar="MODEL", help="model folder: weights and tokenizer")
    add(
        "--from-scratch",
        action="store_true",
        help="learn a vocabulary instead; without datasets, which learns none",
    )
    add("--no-peer", dest="peer", action="store_false", help="leave datasets out")
    add("--keep", type=Path, metavar="FOLDER", help="a new folder: tables and logs stay there")
    return parser


if __name__ == "__main__":
    exit_with(main)
