"""``python -m bench.long_text``: time and memory of training steps on long texts.

A text is movie reviews of CFIMDB, one behind the other, cut at so many tokens: all of a batch are
of one length, and nothing can be gained by leaving padding out.  Batches go through this engine's
step, through a plain transformers loop, whose attention is SDPA's, and through the same loop after
`kernels.accelerate`.  The encoder has random weights.
"""

import argparse
import csv
import functools
import itertools
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.runs.run import begin
from engine.runtime.precision import multiplies_bf16_fast
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.errors import InputError

from . import harness, random_encoder
from .baselines import HuggingFaceLoop, PaddedBatch

_STEM = "ids-cfimdb"
_COLUMNS = ("id", "sentence", "sentiment")
_TEXTS = 8
_LR = 1e-5
_PADDED = "transformers"


class Case(NamedTuple):
    """A batch: how many texts, of how many tokens each."""

    texts: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.texts} x {self.tokens}"


def _case(text: str) -> Case:
    """Read ``TEXTSxTOKENS`` from the command line."""
    if not (found := re.fullmatch(r"(\d{1,4})x(\d{1,6})", text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected texts and tokens, as in 4x2048")
    texts, tokens = map(int, found.groups())
    if not (1 <= texts <= _TEXTS and 16 <= tokens <= 8192):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected 1 to {_TEXTS} texts of 16 to 8192 tokens"
        )
    return Case(texts, tokens)


def write_texts(data: Path, folder: Path, words: int) -> None:
    """Write CFIMDB's files with texts of so many words, and so at least as many tokens.

    Raises:
        InputError: a file of ``data`` cannot be read, or has too few reviews.
    """
    for split in ("train", "dev"):
        path = data / f"{_STEM}-{split}.csv"
        try:
            with path.open(encoding="utf-8", newline="") as opened:
                reviews = iter(list(csv.DictReader(opened, delimiter="\t")))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        with (folder / path.name).open("w", encoding="utf-8", newline="") as opened:
            write = csv.writer(opened, delimiter="\t").writerow
            write(_COLUMNS)
            for number in range(_TEXTS if split == "train" else 1):
                text: list[str] = []
                while len(text) < words:
                    if (review := next(reviews, None)) is None:
                        raise InputError(f"{path}: expected more reviews")
                    text += (review["sentence"] or "").split()
                write((number, " ".join(text[:words]), number % 2))


def engine_trainer(data: Path, init: Path, case: Case, precision: str, device: str) -> Trainer:
    """Put this engine together as ``engine.train cfimdb-full`` does."""
    settings = [f"batch_size={case.texts}", f"max_length={case.tokens}", f"precision={precision}"]
    settings += [recipes.override(key, str(path)) for key, path in (("data", data), ("init", init))]
    run = begin(recipes.load("cfimdb-full", [*settings, "pooling=mean"]), Path("not-written"))
    return build_trainer(run, torch.device(device))


class Engine:
    """This engine's step on one batch."""

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self.trainer, self._numbers = trainer, itertools.count()
        with trainer.loader(0) as loader:
            self.batch: PackedBatch = next(iter(loader)).to(device)

    def __call__(self) -> object:
        """Train once."""
        return self.trainer.step(self.batch, next(self._numbers), _LR)


def contestants(
    options: argparse.Namespace, data: Path, init: Path, case: Case, precision: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the steps, by name."""
    device = torch.device(options.device)
    engine = Engine(engine_trainer(data, init, case, precision, options.device), device)
    padded = PaddedBatch(engine.batch, device)
    ((texts,),) = padded.tokens
    lengths = [len(text) for text in texts]
    if lengths != [case.tokens] * case.texts:
        raise RuntimeError(f"expected {case}, got texts of {lengths} tokens")
    yield "this engine", engine
    for name, accelerated in ((_PADDED, False), ("accelerated", True)):
        loop = HuggingFaceLoop(
            init,
            balance="sum",
            autocast=precision == "bf16",
            device=device,
            accelerated=accelerated,
            tasks=("cfimdb",),
        )
        yield name, functools.partial(loop.step, padded)


def measure(
    options: argparse.Namespace, init: Path, case: Case, precision: str, failures: dict[str, str]
) -> dict[str, Any]:
    """Time the steps on one batch; those that fail are named in ``failures``."""
    device = torch.device(options.device)
    runs: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_texts(options.data, Path(folder), case.tokens)
        for name, run in contestants(options, Path(folder), init, case, precision):
            if not re.search(options.only, name):
                continue
            try:
                run()
                peaks[name] = harness.peak_memory(run, device)
            except Exception as error:  # a peer may fail in any way; the others go on
                failures[f"{case}, {precision}, {name}"] = f"{type(error).__name__}: {error}"[:2000]
                traceback.print_exc()
            else:
                runs[name] = run
    if not runs:
        raise InputError("--only: no step is so named, or all failed")
    return {
        "case": str(case),
        "texts": case.texts,
        "tokens": case.tokens,
        "precision": precision,
        "peak_bytes": peaks,
        "seconds": harness.interleave(runs, device, rounds=options.rounds, warmup=0),
    }


def main() -> None:
    """Run the benchmark and print its table."""
    options = harness.parse(_parser())
    device, console = torch.device(options.device), Console(width=120)
    if device.type == "cpu":
        kernels.keep_freed_memory()  # as engine.train does; it serves the peers, too
    precisions = ["bf16", "fp32"] if multiplies_bf16_fast(device) else ["fp32"]
    results: dict[str, Any] = {"encoder": options.encoder, "cases": [], "failures": {}}
    save = harness.Record(options, "long text", device).write
    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder) / options.encoder
        random_encoder.write(init, options.encoder, options.init / "vocab.txt")
        for case, precision in itertools.product(options.cases, precisions):
            console.print(f"{case}, {precision} ...")
            measured = measure(options, init, case, precision, results["failures"])
            results["cases"].append(measured)
            save(results)
    console.print(_table(results))
    for name, text in results["failures"].items():
        console.print(f"{name} failed: {text[:300]}", soft_wrap=True)
    if results["failures"]:
        raise SystemExit(1)


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"a training step on long texts, {results['encoder']}")
    for column in ("texts x tokens", "", "", "seconds", "p20 to p80", "times as fast"):
        table.add_column(column, justify="left" if not column else "right")
    for column in ("MiB", "KiB a token"):
        table.add_column(column, justify="right")
    for measured in results["cases"]:
        seconds, tokens = measured["seconds"], measured["texts"] * measured["tokens"]
        reference = harness.median(seconds[_PADDED]) if _PADDED in seconds else None
        for name, samples in seconds.items():
            quantiles, peak = harness.summary(samples), measured["peak_bytes"][name]
            table.add_row(
                *(measured["case"], measured["precision"], name, f"{quantiles['p50']:.3f}"),
                f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
                f"{reference / quantiles['p50']:.2f}" if reference else "",
                *(f"{peak / 2**20:,.0f}", f"{peak / 2**10 / tokens:,.0f}"),
            )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.long_text", description=__doc__)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, required=True, help="folder with CFIMDB's files")
    add("--init", type=Path, required=True, help="model folder whose vocab.txt is taken")
    add("--encoder", choices=random_encoder.SHAPES, default="modernbert-small", help="its shape")
    add(
        "--cases",
        type=_case,
        nargs="+",
        metavar="TEXTSxTOKENS",
        default=[Case(1, 512), Case(1, 2048), Case(4, 2048), Case(1, 8192)],
        help="batches (default: 1x512 1x2048 4x2048 1x8192)",
    )
    add("--rounds", type=harness.whole(2), default=5)
    add(
        "--only",
        type=harness.pattern,
        default=".",
        metavar="PATTERN",
        help="only steps whose names match",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
