"""``python -m bench.step``: one multitask training step beside what people run today.

The same real batches (32 examples each of SST, Quora and STS) go through this engine, packed, and
through a plain ``transformers`` loop, padded.  The floor is the time the arithmetic of the step
takes at the measured GEMM rate plus the bytes of surgery and update at the measured bandwidth.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine import recipe as recipes
from engine.data.pack import PackedBatch
from engine.run import begin
from engine.runtime.precision import multiplies_bf16_fast
from engine.training import Training

from . import harness
from .peers import HuggingFaceLoop, PaddedBatch

_TASKS = ("sst", "quora", "sts")


class Batches:
    """The batch of the current round, packed and padded."""

    def __init__(self, training: Training, device: torch.device, count: int) -> None:
        with training.loader(0) as loader:
            packed = list(itertools.islice(loader, count))
        self._packed = [batch.to(device) for batch in packed]
        self._padded = [PaddedBatch(batch, device) for batch in packed]
        self.select(0)

    def select(self, turn: int) -> None:
        """Make batch ``turn`` the current one."""
        self.packed = self._packed[turn % len(self._packed)]
        self.padded = self._padded[turn % len(self._padded)]

    def __iter__(self) -> Iterator[PackedBatch]:
        """Iterate over the packed batches."""
        return iter(self._packed)


def engine_step(options: argparse.Namespace, balance: str, precision: str) -> Training:
    """Put this engine together as ``engine.train cgs`` does."""
    settings = [f"balance={balance}", f"precision={precision}", f"batch_size={options.batch_size}"]
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return Training.build(run, torch.device(options.device))


def floor_seconds(
    training: Training, batch: PackedBatch, flops: float, bandwidth: float
) -> dict[str, float]:
    """Return the least a PCGrad step can take: its matrix products, then two passes of bytes."""
    config, parameters = training.model.encoder.config, training.parameters
    width, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    rows = parameters.rows.nbytes
    state = 3 * parameters.master.nbytes
    copy = 0 if parameters.compute is parameters.master else parameters.compute.nbytes
    return {
        "matrix products": 6 * weights * batch.num_tokens / flops,
        "surgery and update": (2 * rows + 2 * state + copy) / bandwidth,
    }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="data folder (default: the demo corpus)")
    parser.add_argument("--init", type=Path, help="model folder (default: a small BERT, random)")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write raw samples and environment here")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console(width=110)

    precisions = ["fp32", "bf16"] if multiplies_bf16_fast(device) else ["fp32"]
    contestants: dict[str, Callable[[], object]] = {}
    training = engine_step(options, "pcgrad", precisions[-1])
    batches = Batches(training, device, options.rounds + 2)
    config = training.model.encoder.config.to_huggingface()
    for precision in precisions:
        for balance in ("pcgrad", "sum"):
            ours = engine_step(options, balance, precision)
            contestants[f"this engine, {precision}, {balance}"] = _bind(ours, batches)
            theirs = HuggingFaceLoop(
                options.init,
                balance=balance,
                autocast=precision == "bf16",
                device=device,
                config=config,
            )
            contestants[f"transformers, {precision}, {balance}"] = lambda loop=theirs: loop.step(
                batches.padded
            )
    samples = harness.interleave(contestants, device, rounds=options.rounds, setup=batches.select)

    dtype = training.parameters.compute.dtype
    width, inner = config["hidden_size"], config["intermediate_size"]
    tokens = round(sum(batch.num_tokens for batch in batches) / len(list(batches)))
    flops = harness.measure_gemm(device, dtype, tokens, inner, width)
    bandwidth = harness.measure_bandwidth(device)["copy"]
    batches.select(0)
    floor = floor_seconds(training, batches.packed, flops, bandwidth)

    _print(console, samples, tokens, floor, batches)
    if options.json:
        results = {
            "tasks": _TASKS,
            "batch_size": options.batch_size,
            "tokens": [batch.num_tokens for batch in batches],
            "padded_tokens": [batch.padded_tokens for batch in batches],
            "gemm_flops": flops,
            "copy_bandwidth": bandwidth,
            "floor_seconds": floor,
            "seconds": samples,
        }
        harness.write_record(options.json, "step", device, results)
        console.print(f"wrote {options.json}")


def _bind(training: Training, batches: Batches) -> Callable[[], object]:
    numbers = itertools.count()
    return lambda: training.step(batches.packed, next(numbers), 1e-5)


def _print(
    console: Console,
    samples: dict[str, list[float]],
    tokens: int,
    floor: dict[str, float],
    batches: Batches,
) -> None:
    ours = next(iter(samples))
    reference, least = harness.median(samples[ours]), sum(floor.values())
    table = Table(title=f"one step, {tokens} tokens (padded: {batches.packed.padded_tokens})")
    for column in ("", "median s", "p20 to p80", "tokens/s", f"times '{ours}'", "times floor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in samples.items():
        quantiles = harness.summary(seconds)
        table.add_row(
            name,
            f"{quantiles['p50']:.3f}",
            f"{quantiles['p20']:.3f} to {quantiles['p80']:.3f}",
            f"{tokens / quantiles['p50']:,.0f}",
            f"{quantiles['p50'] / reference:.2f}",
            f"{quantiles['p50'] / least:.2f}",
        )
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in floor.items())
    table.add_row("floor (PCGrad)", f"{least:.3f}", parts, "", f"{least / reference:.2f}", "1.00")
    console.print(table)


if __name__ == "__main__":
    main()
