"""``python -m bench.surgery``: time gradient surgery against its baselines and the bandwidth.

Three tables from interleaved rounds on one matrix of task gradients: each operator with the bytes
that it must move, their rate and its share of the read bandwidth of the same rounds; the whole
update, from task gradients to new weights, by the operators that a training step calls, beside the
published loop and TorchJD, each with a fused AdamW; and the growth of both passes with the number
of tasks and of parameters.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import harness
from .baselines import published_pcgrad

_LR = 1e-5


class Case(NamedTuple):
    """One contestant and the bytes that its task cannot do without."""

    run: Callable[[], object]
    nbytes: int


class Update:
    """Task gradients ``[K, P]``, and this project's way from them to new weights."""

    def __init__(self, num_tasks: int, columns: int, dtype: torch.dtype, device: str) -> None:
        self.rows = torch.empty(num_tasks, columns, dtype=dtype, device=device)
        for row in self.rows:  # a row at a time: randn of another dtype needs no second matrix
            row.copy_(torch.randn(columns, device=device) * 1e-3)
        self.master = torch.randn(columns, device=device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        low = dtype != torch.float32
        self.low_precision = self.master.to(dtype) if low else None
        self.out = torch.empty(columns, dtype=dtype, device=device)
        self.seed = torch.tensor(1, device=device)
        self.count = torch.ones((), device=device)
        self.lr = torch.tensor(_LR, device=device)
        self.weights = torch.ones(num_tasks, device=device)
        # One parameter group, as a step has that balances the model as a whole.
        self.losses, self.shares = torch.ones(num_tasks, device=device), self.count[None]
        # Biases and norms, a thousandth of a BERT, do not decay.
        self.decayed = columns * 999 // 1000 // 16 * 16

    def gram(self) -> Tensor:
        """Read all rows once."""
        return kernels.gram(self.rows)

    def combine(self) -> Tensor:
        """Read all rows once, write one."""
        return kernels.combine(self.rows, self.weights, self.out)

    def combine_adamw(
        self, weights: Tensor | None = None, scale: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Read all rows and the state once, write the state."""
        kernels.combine_adamw_segments_(
            *(self.rows, self.weights if weights is None else weights, self.master),
            *(self.exp_avg, self.exp_avg_sq, self.low_precision),
            ends=[len(self.master)],
            groups=[0],
            decayed=self.decayed,
            lr=self.lr,
            step=self.count,
            scale=scale,
            skip=skip,
        )

    def __call__(self) -> None:
        """PCGrad, clipped, into AdamW."""
        grams = self.gram()[None]
        order = kernels.draw_order(len(self.rows), self.seed)
        weights = kernels.pcgrad_weights(grams, order)
        summary = kernels.update_summary(grams, weights, self.losses, self.shares, max_norm=1.0)
        self.combine_adamw(weights, summary.scale, summary.skip)

    def bytes_of_gram(self) -> int:
        """The rows."""
        return self.rows.nbytes

    def bytes_of_adamw(self) -> int:
        """The rows, the state twice, the low precision copy."""
        low = 0 if self.low_precision is None else self.low_precision.nbytes
        return self.rows.nbytes + 6 * self.master.nbytes + low


class TorchAdamW:
    """A flat parameter of torch's own fused AdamW (or apex's), fed with a gradient."""

    def __init__(
        self, columns: int, device: str, make: Callable[..., torch.optim.Optimizer]
    ) -> None:
        self.parameter = nn.Parameter(torch.randn(columns, device=device))
        self.parameter.grad = torch.randn(columns, device=device) * 1e-3
        self.optimizer = make([self.parameter], lr=_LR)

    def step(self, gradient: Tensor | None = None) -> None:
        """Update with this gradient."""
        if gradient is not None:
            self.parameter.grad = gradient.float()
        self.optimizer.step()


def _fused_adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def operators(update: Update, device: str) -> dict[str, Case]:
    """Each pass over memory, the ceilings, and what torch and apex offer for the same."""
    rows, columns = update.rows, update.rows.shape[1]
    state_bytes = 7 * update.master.nbytes  # gradient, and the state twice
    x, y = update.exp_avg, update.exp_avg_sq
    torchs = TorchAdamW(columns, device, _fused_adamw)
    cases = {
        "read (torch.dot)": Case(lambda: torch.dot(x, y), 2 * x.nbytes),
        "copy (torch.copy_)": Case(lambda: torchs.parameter.grad.copy_(x), 2 * x.nbytes),
        "gram": Case(update.gram, update.bytes_of_gram()),
        "rows @ rows.T": Case(lambda: rows @ rows.T, update.bytes_of_gram()),
        "combine": Case(update.combine, rows.nbytes + update.out.nbytes),
        "weights @ rows": Case(
            lambda: update.weights.to(rows.dtype) @ rows, rows.nbytes + update.out.nbytes
        ),
        "combine + AdamW": Case(update.combine_adamw, update.bytes_of_adamw()),
        "torch AdamW, fused (no combining)": Case(torchs.step, state_bytes),
    }
    if device != "cpu" and importlib.util.find_spec("apex"):
        from apex.optimizers import FusedAdam

        cases["apex FusedAdam (no combining)"] = Case(
            TorchAdamW(columns, device, FusedAdam).step, state_bytes
        )
    return cases


def updates(update: Update, device: str) -> dict[str, Case]:
    """From task gradients to new weights: ours and the peers."""
    rows, nbytes = update.rows, update.bytes_of_gram() + update.bytes_of_adamw()
    torchs = TorchAdamW(rows.shape[1], device, _fused_adamw)
    cases = {
        "this project": Case(update, nbytes),
        "published loop, fused AdamW": Case(
            lambda: torchs.step(published_pcgrad(list(rows))), nbytes
        ),
    }
    if importlib.util.find_spec("torchjd"):
        from torchjd.aggregation import PCGrad

        aggregator = PCGrad()
        cases["TorchJD PCGrad, fused AdamW"] = Case(lambda: torchs.step(aggregator(rows)), nbytes)
    return cases


def verify(dtype: torch.dtype, device: str) -> None:
    """Check the operators against plain torch in float64 before they are timed."""
    update = Update(3, 1_000_003, dtype, device)
    exact = update.rows.double() @ update.rows.double().T
    torch.testing.assert_close(update.gram().double(), exact, rtol=1e-5, atol=1e-7)
    update.weights = torch.tensor([0.5, 1.5, -1.0], device=device)
    combined = (update.weights.double() @ update.rows.double()).to(dtype)
    torch.testing.assert_close(update.combine(), combined, rtol=2e-2, atol=1e-7)
    if device != "cpu":  # nothing may wait for the host
        update()  # the first call sets up
        torch.cuda.set_sync_debug_mode("error")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = Parser(prog="python -m bench.surgery", description=__doc__)
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--tasks", type=harness.whole(1), default=3)
    parser.add_argument("--columns", type=harness.whole(1), default=110_000_000, help="parameters")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=harness.whole(2), default=5)
    options = harness.parse(parser)
    device, console = torch.device(options.device), Console(width=110)

    results: dict[str, Any] = {"tasks": options.tasks, "columns": options.columns}
    record = harness.Record(options, "surgery", device)
    for name in options.dtype:
        dtype = harness.DTYPES[name]
        verify(dtype, options.device)
        update = Update(options.tasks, options.columns, dtype, options.device)
        shape = f"[{options.tasks}, {options.columns:,}] {name}"
        for part, make in (("operators", operators), ("updates", updates)):
            cases = make(update, options.device)
            samples = _time(cases, device, options.rounds)
            console.print(_table(f"{part} on {shape}", cases, samples, results))
            results[f"{part}, {name}"] = _record(cases, samples)
            if "read (torch.dot)" in cases:
                read = harness.median(samples["read (torch.dot)"])
                results["read_bandwidth"] = cases["read (torch.dot)"].nbytes / read
            record.write(results)
        del update, cases
    results["growth"] = []
    for shape in growth(device, options, console):
        results["growth"].append(shape)
        record.write(results)
    if options.json:
        console.print(f"wrote {options.json}")


def growth(
    device: torch.device, options: argparse.Namespace, console: Console
) -> Iterator[dict[str, object]]:
    """Time both passes over more tasks at the same size of matrix, and over more parameters."""
    budget = options.tasks * options.columns // 2
    shapes = [(tasks, budget // tasks) for tasks in (2, 4, 8, 16, 32, 64)]
    shapes += [(options.tasks, options.columns // part) for part in (64, 16, 4)]
    table = Table(title="growth, fp32")
    for column in ("tasks", "parameters", "gram GB/s", "combine + AdamW GB/s"):
        table.add_column(column, justify="right")
    for tasks, columns in shapes:
        update = Update(tasks, columns, torch.float32, options.device)
        cases = {
            "gram": Case(update.gram, update.bytes_of_gram()),
            "combine + AdamW": Case(update.combine_adamw, update.bytes_of_adamw()),
        }
        samples = _time(cases, device, options.rounds)
        record = _record(cases, samples)
        rates = [
            f"{case.nbytes / harness.median(samples[name]) / 1e9:.1f}"
            for name, case in cases.items()
        ]
        table.add_row(str(tasks), f"{columns:,}", *rates)
        yield {"tasks": tasks, "columns": columns} | record
    console.print(table)


def _time(cases: dict[str, Case], device: torch.device, rounds: int) -> dict[str, list[float]]:
    contestants = {name: case.run for name, case in cases.items()}
    if device.type == "cuda":
        return harness.device_seconds(contestants, device, rounds=rounds, replays=5)
    return harness.interleave(contestants, device, rounds=rounds, warmup=1)


def _record(cases: dict[str, Case], samples: dict[str, list[float]]) -> dict[str, object]:
    return {name: {"bytes": case.nbytes, "seconds": samples[name]} for name, case in cases.items()}


def _table(
    title: str,
    cases: dict[str, Case],
    samples: dict[str, list[float]],
    results: dict[str, object],
) -> Table:
    table = Table(title=title)
    headings = ["", "MB moved", "median ms", "p20 to p80", "GB/s", "share of read"]
    for column in [*headings, "times the first"]:
        table.add_column(column, justify="left" if not column else "right")
    first = harness.median(next(iter(samples.values())))
    read = results.get("read_bandwidth", next(iter(cases.values())).nbytes / first)
    for name, case in cases.items():
        quantiles = harness.summary(samples[name])
        rate = case.nbytes / quantiles["p50"]
        table.add_row(
            name,
            f"{case.nbytes / 1e6:,.0f}",
            f"{1e3 * quantiles['p50']:.2f}",
            f"{1e3 * quantiles['p20']:.2f} to {1e3 * quantiles['p80']:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / read:.0%}",
            f"{quantiles['p50'] / first:.2f}",
        )
    return table


if __name__ == "__main__":
    exit_with(main)
