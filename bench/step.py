"""``python -m bench.step``: one multitask training step beside what people run today.

The same real batches (32 examples each of SST, Quora and STS) go through this engine, packed, and
through a plain ``transformers`` loop, padded.  The floor is the time the arithmetic of the step
takes at the GEMM rate, plus the bytes of surgery and update at the copy bandwidth, both measured in
the same run.  ``--growth`` measures how this engine's step grows with tasks, shapes and examples.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine import recipe as recipes
from engine.data.pack import PackedBatch
from engine.run import begin
from engine.runtime.precision import multiplies_bf16_fast
from engine.training import Training

from . import harness, step_growth
from .peers import HuggingFaceLoop, PaddedBatch
from .step_parts import floor_seconds, joules_a_run, phase_seconds

_TASKS = ("sst", "quora", "sts")
_LR = 1e-5


class Batches:
    """The batch of the current round, packed and padded."""

    def __init__(self, training: Training, device: torch.device, count: int) -> None:
        with training.loader(0) as loader:
            packed = list(itertools.islice(loader, count))
        self.all_packed = [batch.to(device) for batch in packed]
        self._all_padded = [PaddedBatch(batch, device) for batch in packed]
        self.select(0)

    def select(self, turn: int) -> None:
        """Make batch ``turn`` the current one."""
        self.packed: PackedBatch = self.all_packed[turn % len(self.all_packed)]
        self.padded = self._all_padded[turn % len(self.all_packed)]


def engine_training(options: argparse.Namespace, balance: str, precision: str) -> Training:
    """Put this engine together as ``engine.train cgs`` does."""
    settings = [f"balance={balance}", f"precision={precision}", f"batch_size={options.batch_size}"]
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return Training.build(run, torch.device(options.device))


def engines(
    options: argparse.Namespace, batches: Batches, precisions: list[str]
) -> dict[str, Callable[[], object]]:
    """This engine's steps by name."""

    def contestant(training: Training) -> Callable[[], object]:
        numbers = itertools.count()
        return lambda: training.step(batches.packed, next(numbers), _LR)

    return {
        f"this engine, {precision}, {balance}": contestant(
            engine_training(options, balance, precision)
        )
        for precision in precisions
        for balance in ("pcgrad", "sum")
    }


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
    options = _parser().parse_args()
    device, console = torch.device(options.device), Console(width=120)
    if options.growth:
        step_growth.measure(options, device, console)
        return

    fast = multiplies_bf16_fast(device)
    precisions = ["bf16", "fp32"] if fast else ["fp32"]
    training = engine_training(options, "pcgrad", precisions[0])
    batches = Batches(training, device, options.rounds + 2)
    config = training.model.encoder.config.to_huggingface()
    contestants = engines(options, batches, precisions) | peers(options, batches, config)
    samples = harness.interleave(contestants, device, rounds=options.rounds, setup=batches.select)
    memory = {name: harness.peak_memory(run, device) for name, run in contestants.items()}

    batches.select(0)
    tokens = [batch.num_tokens for batch in batches.all_packed]
    floor = floor_seconds(training, batches.packed, device)
    phases = phase_seconds(training, batches.all_packed, device)
    results = {
        "tasks": _TASKS,
        "batch_size": options.batch_size,
        "encoder": config,
        "tokens": tokens,
        "padded_tokens": [batch.padded_tokens for batch in batches.all_packed],
        "floor_seconds": floor,
        "phase_seconds": phases,
        "peak_bytes": memory,
        "joules": joules_a_run(contestants, device),
        "seconds": samples,
    }
    console.print(_table(results, sum(tokens) / len(tokens)))
    whole = sum(phases.values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in phases.items())
    console.print(f"phases of this engine's {precisions[0]} step: {shares}")
    if options.json:
        harness.write_record(options.json, "step", device, results)
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
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="data folder (default: the demo corpus)")
    add("--init", type=Path, help="model folder (default: a small BERT, random)")
    add("--batch-size", type=int, default=32, help="examples a task")
    add("--rounds", type=int, default=5)
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--growth", action="store_true", help="tasks, shapes and examples instead of peers")
    add("--json", type=Path, help="write raw samples and environment here")
    return parser


if __name__ == "__main__":
    main()
