"""``python -m bench.step``: one multitask training step beside what people run today.

The same real batches (32 examples each of SST, Quora and STS) go through this engine, packed, and
through a plain ``transformers`` loop, padded.  The floor is the time the arithmetic of the step
takes at the GEMM rate, plus the bytes of surgery and update at the copy bandwidth, both measured in
the same run.  ``--growth`` measures how this engine's step grows with tasks, shapes and examples.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.runs.run import begin
from engine.runtime.cpu import keep_freed_memory
from engine.runtime.precision import multiplies_bf16_fast
from engine.training.trainer import Trainer

from . import harness, step_growth
from .baselines import HuggingFaceLoop, PaddedBatch
from .step_breakdown import floor_seconds, joules_a_run, phase_seconds

_TASKS = ("sst", "quora", "sts")
_LR = 1e-5
_EXECUTIONS = {"cpu": ("eager", ("compile",)), "cuda": ("graphs", ("compile", "eager"))}
"""The usual one of a device, and others to set beside it."""


class Batches:
    """The batch of the current round, packed and padded."""

    def __init__(self, training: Trainer, device: torch.device, count: int) -> None:
        self.packed = first_batches(training, device, count)
        self._padded = [PaddedBatch(batch, device) for batch in self.packed]
        self.select(0)

    def select(self, turn: int) -> None:
        """Make batch ``turn`` the current one."""
        self.turn = turn % len(self.packed)
        self.padded = self._padded[self.turn]


def first_batches(training: Trainer, device: torch.device, count: int) -> list[PackedBatch]:
    """The first batches of a run, filled up to a few shapes where its steps are recorded."""
    with training.loader(0) as loader:
        return [batch.to(device) for batch in itertools.islice(loader, count)]


def engine_training(
    options: argparse.Namespace, balance: str, precision: str, execution: str
) -> Trainer:
    """Put this engine together as ``engine.train cgs`` does."""
    settings = [f"balance={balance}", f"precision={precision}", f"execution={execution}"]
    settings.append(f"batch_size={options.batch_size}")
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return Trainer.build(run, torch.device(options.device))


class Engine:
    """This engine's step on the current batch."""

    def __init__(self, training: Trainer, batches: Batches, device: torch.device) -> None:
        self.training = training
        self._batches, self._numbers = batches, itertools.count()
        self._own = first_batches(training, device, len(batches.packed))

    def __call__(self) -> object:
        """Train once."""
        return self.training.step(self._own[self._batches.turn], next(self._numbers), _LR)


def engines(
    options: argparse.Namespace, batches: Batches, precisions: list[str]
) -> dict[str, Engine]:
    """This engine's steps by name: as a run here executes them, and in other ways."""
    device = torch.device(options.device)
    usual, others = _EXECUTIONS[device.type]
    if not options.compile:
        others = tuple(kind for kind in others if kind != "compile")
    variants = [(p, balance, usual) for p in precisions for balance in ("pcgrad", "sum")]
    variants += [(precisions[0], "pcgrad", kind) for kind in others]
    return {
        f"this engine, {precision}, {balance}" + ("" if kind == usual else f", {kind}"): Engine(
            engine_training(options, balance, precision, kind), batches, device
        )
        for precision, balance, kind in variants
    }


def warm_up(
    contestants: Mapping[str, Callable[[], object]], batches: Batches, device: torch.device
) -> dict[str, int]:
    """Run every contestant on every batch until nothing is compiled or recorded any more.

    Returns:
        The most bytes each held at one time while it worked, recordings included.
    """
    peaks = {}
    for name, run in contestants.items():

        def all_batches(run: Callable[[], object] = run) -> None:
            for turn in range(2 * len(batches.packed)):
                batches.select(turn)
                run()

        if device.type == "cuda":
            peaks[name] = harness.peak_memory(all_batches, device)
        else:
            run()
            peaks[name] = harness.peak_memory(run, device)
    return peaks


def peers(
    options: argparse.Namespace, batches: Batches, config: dict[str, object]
) -> dict[str, Callable[[], object]]:
    """The steps of transformers loops by name."""
    loops = [(precision, "sum", False) for precision in ("fp32", "bf16")]
    loops += [(precision, "pcgrad", False) for precision in ("fp32", "bf16")]
    if importlib.util.find_spec("torchjd"):
        loops.append(("fp32", "torchjd", False))
    if options.compile:
        loops += [(precision, "sum", True) for precision in ("fp32", "bf16")]
    names = {"sum": "sum", "pcgrad": "published PCGrad", "torchjd": "TorchJD PCGrad"}
    contestants: dict[str, Callable[[], object]] = {}
    for precision, balance, compiled in loops:
        loop = HuggingFaceLoop(
            options.init,
            balance=balance,
            autocast=precision == "bf16",
            device=torch.device(options.device),
            compiled=compiled,
            config=config,
        )
        how = ", compiled" if compiled else ""
        contestants[f"transformers, {precision}{how}, {names[balance]}"] = lambda loop=loop: (
            loop.step(batches.padded)
        )
    return contestants


def main() -> None:
    """Run the benchmark and print its tables."""
    options = harness.parse(_parser())
    device, console = torch.device(options.device), Console(width=120)
    if device.type == "cpu":
        keep_freed_memory()  # as engine.train does; it serves the peers, too
    if options.growth:
        step_growth.measure(options, device, console)
        return

    fast = multiplies_bf16_fast(device)
    precisions = ["bf16", "fp32"] if fast else ["fp32"]
    training = engine_training(options, "pcgrad", precisions[0], "eager")
    batches = Batches(training, device, options.rounds + 2)
    config = training.model.encoder.config.to_huggingface()
    ours = engines(options, batches, precisions)
    contestants = ours | peers(options, batches, config)
    memory = warm_up(contestants, batches, device)
    samples = harness.interleave(contestants, device, rounds=options.rounds, setup=batches.select)

    tokens = [batch.num_tokens for batch in batches.packed]
    floor = floor_seconds(training, batches.packed[0], device)
    phases = phase_seconds(training, batches.packed, device)
    results = {
        "tasks": _TASKS,
        "batch_size": options.batch_size,
        "encoder": config,
        "tokens": tokens,
        "padded_tokens": [batch.padded_tokens for batch in batches.packed],
        "warmup_seconds": {
            name: engine.training.step.execution.warmup_seconds for name, engine in ours.items()
        },
        "floor_seconds": floor,
        "phase_seconds": phases,
        "peak_bytes": memory,
        "joules": joules_a_run(contestants, device),
        "seconds": samples,
    }
    console.print(_table(results, sum(tokens) / len(tokens)))
    whole = sum(phases.values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in phases.items())
    for name, seconds in results["warmup_seconds"].items():
        if seconds:
            console.print(f"{name}: {seconds:.1f} s of warm-up before")
    console.print(f"phases of this engine's {precisions[0]} step: {shares}")
    if options.json:
        harness.write_record(options.json, "step", device, results, replace=options.force)
        console.print(f"wrote {options.json}")


def _table(results: dict, tokens: float) -> Table:  # type: ignore[type-arg]
    samples, floor = results["seconds"], results["floor_seconds"]
    ours = next(iter(samples))
    reference, least = harness.median(samples[ours]), sum(floor.values())
    table = Table(title=f"one step, {tokens:.0f} tokens (padded: {results['padded_tokens'][0]})")
    headings = ["", "median s", "p20 to p80", "tokens/s", "against ours", "against floor", "MiB"]
    joules = results["joules"]
    for column in [*headings, *(["joules"] if joules else [])]:
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in samples.items():
        quantiles = harness.summary(seconds)
        cells = [
            f"{quantiles['p50']:.3f}",
            f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
            f"{tokens / quantiles['p50']:,.0f}",
            f"{quantiles['p50'] / reference:.2f}",
            f"{quantiles['p50'] / least:.2f}",
            f"{results['peak_bytes'][name] / 2**20:,.0f}",
        ]
        table.add_row(name, *cells, *([f"{joules[name]:.2f}"] if joules else []))
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in floor.items())
    table.add_row(f"floor ({parts})", f"{least:.3f}", "", "", f"{least / reference:.2f}", "1.00")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.step", description=__doc__)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="data folder (default: the demo corpus)")
    add("--init", type=Path, help="model folder (default: a small BERT, random)")
    add("--batch-size", type=harness.whole(1), default=32, help="examples a task")
    add("--rounds", type=harness.whole(2), default=5)
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--growth", action="store_true", help="tasks, shapes and examples instead of peers")
    return parser


if __name__ == "__main__":
    exit_with(main)
