"""``python -m bench.fusion``: measure what could be gained by fusing operations between kernels.

What stands between this project's kernels in a step are GELU, pooling and the small losses.  Each
is timed forward and backward as torch runs it, and as torch.compile makes it; beside them the bytes
that it has to move, at the copy bandwidth of the same run.  A kernel of our own could gain at most
what lies between the faster of the two and that floor.
"""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.models.pooling import pool

from . import harness

Run = Callable[[], object]

_SEQUENCES = 160  # of a batch


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _losses(logits: Tensor, classes: Tensor, answer: Tensor, yes: Tensor, score: Tensor) -> Tensor:
    return torch.stack(
        [
            F.cross_entropy(logits.float(), classes),
            F.binary_cross_entropy_with_logits(answer.float(), yes),
            F.mse_loss(answer.float(), score),
        ]
    ).sum()


def cases(
    dtype: torch.dtype, device: torch.device, tokens: int, width: int
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], int]]:
    """Functions, their arguments, and the bytes that forward and backward have to move."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    inner, hidden = tensor(tokens, 4 * width), tensor(tokens, width)
    lengths = torch.full((_SEQUENCES,), tokens // _SEQUENCES)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    hidden = hidden[: int(cu_seqlens[-1])].detach().requires_grad_()
    classes = torch.randint(0, 5, (32,), device=device)
    return {
        # x, y; dy, x, dx
        "GELU": (F.gelu, [inner], 5 * inner.nbytes),
        "bias + GELU": (_bias_gelu, [inner, tensor(4 * width)], 5 * inner.nbytes),
        # read forward, written backward
        "mean pooling": (lambda x: pool(x, cu_seqlens, "mean"), [hidden], 2 * hidden.nbytes),
        "three losses": (
            _losses,
            [tensor(32, 5), classes, tensor(32), *(torch.rand(32, device=device) for _ in "ab")],
            0,
        ),
    }


def _forward_backward(function: Callable[..., Tensor], arguments: list[Tensor]) -> Run:
    leaves = [argument for argument in arguments if argument.requires_grad]
    grad = torch.randn_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), leaves, grad)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = Parser(prog="python -m bench.fusion", description=__doc__)
    add = parser.add_argument
    add("--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--tokens", type=harness.whole(_SEQUENCES), default=2690, help="of a batch")
    add("--width", type=harness.whole(1), default=384, help="of the encoder")
    add("--rounds", type=harness.whole(1), default=20)
    options = harness.parse(parser)
    device, console = torch.device(options.device), Console(width=110)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    copy = harness.measure_bandwidth(device)["copy"]

    table = Table(title=f"forward + backward, {options.tokens} tokens, {options.dtype}")
    for heading in ("", "ms as it is", "ms compiled", "ms floor", "left to gain, ms"):
        table.add_column(heading, justify="right" if heading else "left")
    results: dict[str, object] = {"copy_bytes_per_s": copy}
    for name, (function, arguments, nbytes) in cases(
        dtype, device, options.tokens, options.width
    ).items():
        runs = {
            "as it is": _forward_backward(function, arguments),
            "torch.compile": _forward_backward(torch.compile(function), arguments),
        }
        samples = harness.interleave(runs, device, rounds=options.rounds)
        times = [harness.median(seconds) * 1e3 for seconds in samples.values()]
        floor = nbytes / copy * 1e3
        cells = [*times, floor, min(times) - floor]
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
        results[name] = {"seconds": samples, "bytes": nbytes}
    console.print(table)
    if options.json:
        harness.write_record(options.json, "fusion", device, results, replace=options.force)


if __name__ == "__main__":
    exit_with(main)
