"""``python -m bench.rotary``: time the rotation of queries and keys by their positions.

Packed ``qkv [T, 3, H, D]``, positions given, forward.  Ours overwrites qkv.  Peers, each where it
imports: the torch operations of transformers' ModernBERT, which make new queries and keys, alone
and compiled by `torch.compile`; on a GPU flash-attn's Triton kernel, in place too, and Liger's.
The floor is the bytes of q and k, read and written, at the copy bandwidth of the same rounds.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import harness

_SEQUENCE = 512  # positions of a packed stream repeat
OURS = "this project"
Rotate = Callable[[Tensor, "Inputs"], tuple[Tensor, ...]]


class Inputs:
    """Queries, keys and values, tables and positions."""

    def __init__(self, tokens: int, heads: int, width: int, dtype: torch.dtype, device: str):
        self.qkv = torch.randn(tokens, 3, heads, width, device=device).to(dtype)
        self.ids = torch.arange(tokens, device=device) % _SEQUENCE
        self.cos, self.sin = kernels.rotary_tables(_SEQUENCE, width, device=device)
        self.tables = self.cos.to(dtype), self.sin.to(dtype)  # flash-attn's are of x's dtype
        angles = torch.cat((self.cos, self.cos), -1), torch.cat((self.sin, self.sin), -1)
        self.whole_cos, self.whole_sin = (table[self.ids] for table in angles)
        lengths = range(0, tokens + _SEQUENCE, _SEQUENCE)
        bounds = [min(length, tokens) for length in lengths]
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)


def _ours(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return (kernels.apply_rotary_emb_qkv_(qkv, inputs.cos, inputs.sin, position_ids=inputs.ids),)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _torch(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """As transformers' ModernBERT does it."""
    cos, sin = inputs.whole_cos[:, None], inputs.whole_sin[:, None]
    q, k = (x.float() for x in qkv.unbind(1)[:2])
    q = (q * cos + _rotate_half(q) * sin).to(qkv.dtype)
    return q, (k * cos + _rotate_half(k) * sin).to(qkv.dtype)


def _flash_attn(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    from flash_attn.layers.rotary import apply_rotary_emb

    heads = qkv.view(len(qkv), -1, qkv.shape[-1])[:, : 2 * qkv.shape[2]]
    places = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": _SEQUENCE}
    return (apply_rotary_emb(heads, *inputs.tables, inplace=True, **places),)


def _liger(qkv: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (x.transpose(0, 1)[None] for x in qkv.unbind(1)[:2])
    q, k = LigerRopeFunction.apply(q, k, inputs.whole_cos[None], inputs.whole_sin[None])
    return q, k


def contestants(device: str) -> dict[str, Rotate]:
    """All, by name."""
    found: dict[str, Rotate] = {OURS: _ours, "torch": _torch}
    found["torch.compile"] = torch.compile(_torch, dynamic=False)
    if device == "cuda":
        if importlib.util.find_spec("flash_attn"):
            found["flash-attn"] = _flash_attn
        if importlib.util.find_spec("liger_kernel"):
            found["Liger"] = _liger
    return found


def verify(inputs: Inputs) -> None:
    """Check ours against torch's before anything is timed."""
    expected = _torch(inputs.qkv, inputs)
    (found,) = _ours(inputs.qkv.clone(), inputs)
    for ours, torchs in zip(found.unbind(1), expected, strict=False):
        tolerance = 8 * torch.finfo(ours.dtype).eps * torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=0, atol=tolerance)


def measure(
    inputs: Inputs, options: argparse.Namespace, failures: dict[str, str], case: str
) -> dict[str, Any]:
    """Time one case's contestants: called by the host, and on a GPU replayed as graphs, too."""
    torch._dynamo.reset()
    device, failed = torch.device(options.device), dict[str, str]()

    def call(rotate: Rotate) -> harness.Contestant:
        return lambda: rotate(inputs.qkv, inputs)

    made = {name: call(rotate) for name, rotate in contestants(options.device).items()}
    runs = harness.surviving({name: lambda run=run: run for name, run in made.items()}, failed)
    if OURS not in runs:
        raise SystemExit(f"{case}: {failed[OURS]}")
    samples = harness.interleave(runs, device, rounds=options.rounds)
    measured = {
        "bytes": 2 * inputs.qkv[:, :2].numel() * inputs.qkv.itemsize,
        "peak_bytes": {name: harness.peak_memory(run, device) for name, run in runs.items()},
        "seconds": samples,
        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
    }
    if device.type == "cuda":
        graphs = harness.surviving(
            {name: lambda run=run: harness.graph_replay(run, device) for name, run in runs.items()},
            failed,
        )
        measured["replayed_seconds"] = harness.device_seconds(graphs, device, rounds=5)
    failures.update({f"{name}, {case}": text for name, text in failed.items()})
    return measured


def _rows(case: str, measured: dict[str, Any], copy: float) -> Iterator[list[str]]:
    seconds = measured["seconds"] | measured.get("replayed_seconds", {})
    ours = harness.median(seconds[OURS])
    for name, samples in seconds.items():
        best = harness.median(samples)
        yield [
            case if name == OURS else "",
            name,
            f"{best * 1e3:.3f}",
            f"{measured['bytes'] / best / copy:.0%}",
            f"{measured['peak_bytes'][name] / 2**20:.0f}",
            "" if name == OURS else f"{best / ours:.2f}x",
        ]


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = Parser(prog="python -m bench.rotary", description=__doc__)
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=harness.whole(1), default=[1000, 8192])
    parser.add_argument("--heads", type=harness.whole(1), default=12)
    parser.add_argument("--width", nargs="+", type=harness.whole(2), default=[64])
    parser.add_argument("--rounds", type=harness.whole(2), default=20)
    options = harness.parse(parser)
    if odd := [width for width in options.width if width % 2]:
        parser.error(f"--width: expected an even number of columns, got {odd[0]}")
    device, console = torch.device(options.device), Console(width=100)

    results: dict[str, Any] = {"failures": {}}
    record = harness.Record(options, "rotary", device)
    for dtype_name in options.dtype:
        copy = harness.measure_bandwidth(device)["copy"]
        results[f"copy_bytes_per_s, {dtype_name}"] = copy
        table = Table(title=f"rotary embedding of q and k, forward, {dtype_name}")
        for heading in ("shape", "contestant", "ms", "of copy", "peak MiB", "ours is"):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for tokens, width in itertools.product(options.tokens, options.width):
            inputs = Inputs(
                tokens, options.heads, width, harness.DTYPES[dtype_name], options.device
            )
            verify(inputs)
            case = f"[{tokens}, 3, {options.heads}, {width}]"
            name = f"{case}, {dtype_name}"
            results[name] = measured = measure(inputs, options, results["failures"], name)
            record.write(results)
            for cells in _rows(case, measured, copy):
                table.add_row(*cells)
        console.print(table)
    if results["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    exit_with(main)
