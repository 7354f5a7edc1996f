"""``python -m bench.attention``: time packed attention, forward and backward, against its peers.

Length mixes of the four real datasets and three fixed lengths, and three in a window.  Peers, each
where it imports: SDPA on the padded batch, with a mask in a window, torch's `varlen_attn`,
FlexAttention with a mask of documents and the window, flash-attn, and, without a window, plain
padded attention compiled by `torch.compile`.  FLOPs are those of visible pairs.  On a GPU ours runs
twice more: with a plan that was made before, as the layers of a model share one, and by tiles
alone, without the kernels for runs of short sequences.  All contestants of a case compute from the
same q, k and v; padded ones from their padded copy.
"""

import argparse
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with

from . import harness

# Word pieces a sentence, the deciles from the shortest to the longest, [CLS] and [SEP] included.
DECILES = {
    "sst": [4, 11, 15, 18, 21, 24, 27, 30, 35, 41, 80],
    "quora": [3, 9, 11, 12, 13, 14, 15, 17, 20, 25, 95],
    "sts": [5, 8, 9, 10, 11, 12, 13, 16, 20, 26, 70],
    "cfimdb": [21, 118, 154, 172, 193, 215, 244, 276, 318, 376, 512],
}
FIXED = {"128": (128, 64), "512": (512, 16), "2048": (2048, 4)}  # length, sequences
# The same in a window of so many tokens to each side, as ModernBERT's local layers have it.
WINDOW = (64, 64)
WINDOWED = ((512, 16), (2048, 4), (8192, 1))
NO_WINDOW = (-1, -1)
HEADS = 12
OURS = "this project"
PLANNED, TILES_ALONE = f"{OURS}, planned before", f"{OURS}, tiles alone"


def mix(name: str, sequences: int) -> list[int]:
    """Lengths at evenly spaced quantiles of a dataset, in an order that is always the same."""
    deciles = torch.tensor(DECILES[name], dtype=torch.float64)
    place = (torch.arange(sequences, dtype=torch.float64) + 0.5) / sequences * 10
    low = place.long()
    lengths = deciles[low] + (place - low) * (deciles[low + 1] - deciles[low])
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    return [int(length) for length in lengths[order]]


def cases() -> dict[str, list[int]]:
    """The lengths of every case."""
    mixes = {f"{name} x {n}": mix(name, n) for name in DECILES for n in (32, 256)}
    return mixes | {f"{n} x {length}": [length] * n for length, n in FIXED.values()}


def windowed_cases() -> dict[str, list[int]]:
    """The lengths of every case in a window."""
    left, right = WINDOW
    return {f"{n} x {length} in {left},{right}": [length] * n for length, n in WINDOWED}


def visible_pairs(length: int, window: tuple[int, int]) -> int:
    """Queries and keys of a sequence of which one sees the other."""
    left, right = (length if limit < 0 else min(limit, length - 1) for limit in window)
    if window == NO_WINDOW or length == 0:
        return length**2
    return sum(min(i, left) + 1 + min(length - 1 - i, right) for i in range(length))


class Inputs:
    """One case's q, k and v in one packed tensor, and the same padded."""

    def __init__(
        self,
        lengths: list[int],
        width: int,
        dtype: torch.dtype,
        device: str,
        window: tuple[int, int] = NO_WINDOW,
    ) -> None:
        self.lengths, self.longest, self.window = lengths, max(lengths), window
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(sum(lengths), 3, HEADS, width, generator=generator)
        self.qkv = qkv.to(device, dtype).requires_grad_()
        self.grad = torch.randn(sum(lengths), HEADS, width, generator=generator).to(device, dtype)
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=device).int()
        starts = torch.arange(self.longest)[None, :]
        self.plan = kernels.attention_plan(self.cu_seqlens, sum(lengths))
        self.mask = (starts < torch.tensor(lengths)[:, None]).to(device)
        self.whole = len(set(lengths)) == 1
        self._rows = self.mask.flatten().nonzero()[:, 0]
        padded = qkv.new_zeros(len(lengths), self.longest, 3, HEADS, width).to(device, dtype)
        padded[self.mask] = self.qkv.detach()
        self.padded = padded.requires_grad_()
        self.padded_grad = torch.zeros_like(padded[:, :, 0])
        self.padded_grad[self.mask] = self.grad

    def another(self) -> "Inputs":
        """Inputs of the same lengths elsewhere in memory."""
        shape = (self.lengths, self.qkv.shape[-1], self.qkv.dtype, str(self.qkv.device))
        return Inputs(*shape, self.window)

    def copies_beyond_cache(self, cache_bytes: int = 64 << 20) -> int:
        """Return how many of these are larger than any GPU's cache."""
        return min(16, 1 + cache_bytes // (2 * self.qkv.nbytes))

    def unpadded(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The rows of tokens; by number, since a mask would have to be waited for."""
        return tuple(x.flatten(0, 1).index_select(0, self._rows) for x in tensors)

    def flops(self) -> int:
        """Forward and backward products of what the sequences need, without recomputation."""
        width = self.qkv.shape[-1]
        pairs = sum(visible_pairs(length, self.window) for length in self.lengths)
        return 12 * HEADS * width * pairs

    def attention_mask(self) -> Tensor | None:
        """Which keys each query of a padded row sees, ``[B or 1, 1, S or 1, S]``; None for all."""
        mask = None if self.whole else self.mask[:, None, None, :]
        if self.window == NO_WINDOW:
            return mask
        places = torch.arange(self.longest, device=self.mask.device)
        near = is_near(places[:, None], places, self.window)[None, None]
        return near if mask is None else near & mask

    def backward(self, out: Tensor, leaf: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Output and gradient of q, k and v."""
        return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def is_near(query: Tensor, key: Tensor, window: tuple[int, int]) -> Tensor:
    """Whether the key is in the window of the query, which has a limit on each side."""
    return (key >= query - window[0]) & (key <= query + window[1])


def _ours(inputs: Inputs, plan: kernels.AttentionPlan | None = None) -> tuple[Tensor, Tensor]:
    out = kernels.flash_attn_varlen_qkvpacked_func(
        inputs.qkv, inputs.cu_seqlens, inputs.longest, window_size=inputs.window, plan=plan
    )
    assert isinstance(out, Tensor)
    return inputs.backward(out, inputs.qkv, inputs.grad)


def _planned(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return _ours(inputs, inputs.plan)


def _tiles_alone(inputs: Inputs) -> tuple[Tensor, Tensor]:
    with mock.patch("kernels.attention.attention_runs_triton.WARPS", {}):  # no heads have runs
        return _planned(inputs)


def _sdpa_padded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in inputs.padded.unbind(2))
    mask = inputs.attention_mask()
    out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    return inputs.unpadded(*inputs.backward(out, inputs.padded, inputs.padded_grad))


def _plain_padded(qkv: Tensor, seen: Tensor) -> Tensor:
    """Attention as a textbook writes it, ``[B, S, H, D]``."""
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


_compiled_plain = torch.compile(_plain_padded, dynamic=True)  # one compile serves all cases


def _compiled(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out = _compiled_plain(inputs.padded, inputs.mask[:, None, None, :])
    return inputs.unpadded(*inputs.backward(out, inputs.padded, inputs.padded_grad))


def _varlen_attn(inputs: Inputs) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = inputs.cu_seqlens, inputs.longest
    sizes = (cu, cu, longest, longest)
    out = varlen_attn(*inputs.qkv.unbind(1), *sizes, window_size=inputs.window)
    return inputs.backward(out, inputs.qkv, inputs.grad)


def _flash_attn(inputs: Inputs) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    out = flash_attn_varlen_qkvpacked_func(
        inputs.qkv, inputs.cu_seqlens, inputs.longest, window_size=inputs.window
    )
    return inputs.backward(out, inputs.qkv, inputs.grad)


def _flex_attention(inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total, device = len(inputs.qkv), inputs.qkv.device
    document = torch.bucketize(
        torch.arange(total, device=device), inputs.cu_seqlens[1:], right=True
    )

    def same(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_document = document[q] == document[k]
        if inputs.window == NO_WINDOW:
            return same_document
        return same_document & is_near(q, k, inputs.window)

    block_mask = create_block_mask(same, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs.qkv.unbind(1))
        out = compiled(q, k, v, block_mask=block_mask)[0].transpose(0, 1)
        return inputs.backward(out, inputs.qkv, inputs.grad)

    return run


def contestants(
    inputs: Inputs, device: str
) -> dict[str, Callable[[], Callable[[], tuple[Tensor, Tensor]]]]:
    """What makes ours and the peers that can run here."""
    runs = {OURS: _ours, "SDPA, padded": _sdpa_padded}
    if inputs.window == NO_WINDOW:
        runs["torch.compile, padded"] = _compiled
    if device == "cuda":
        runs |= {PLANNED: _planned, TILES_ALONE: _tiles_alone}
    if device == "cuda" and inputs.qkv.dtype != torch.float32:  # there is no other kernel
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            runs["varlen_attn"] = _varlen_attn
        if importlib.util.find_spec("flash_attn"):
            runs["flash-attn"] = _flash_attn
    makers = {name: lambda run=run: lambda: run(inputs) for name, run in runs.items()}
    if device == "cuda":  # on a CPU it has no backward pass

        def flex() -> Callable[[], tuple[Tensor, Tensor]]:
            run = _flex_attention(inputs)
            return lambda: run(inputs)

        makers["FlexAttention"] = flex
    return makers


def verify(runs: dict[str, Callable[[], tuple[Tensor, Tensor]]], failures: dict[str, str]) -> None:
    """Take those that disagree with padded SDPA out of ``runs``, and name them."""
    expected = runs["SDPA, padded"]()
    for name, run in list(runs.items()):
        for result, reference in zip(run(), expected, strict=True):
            tolerance = 32 * torch.finfo(result.dtype).eps * reference.abs().max().item()
            error = (result - reference).abs().max().item()
            if not error <= tolerance:
                failures[name] = f"off by {error:.2e}, more than {tolerance:.2e}"
                runs.pop(name, None)


def main() -> None:
    """Run the benchmark and print a table for each dtype."""
    parser = Parser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument(
        "--device", type=harness.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--width", type=harness.whole(1), default=64, help="columns of a head")
    parser.add_argument(
        "--case",
        nargs="+",
        choices=cases() | windowed_cases(),
        metavar="CASE",
        help="only these cases, such as 'sst x 32' or '4 x 2048 in 64,64'",
    )
    parser.add_argument("--rounds", type=harness.whole(2), default=20)
    parser.add_argument(
        "--only",
        type=harness.pattern,
        default=".",
        metavar="PATTERN",
        help="of contestants' names",
    )
    options = harness.parse(parser)
    device, console = torch.device(options.device), Console(width=110)

    results: dict[str, Any] = {"heads": HEADS, "width": options.width, "failures": {}}
    record = harness.Record(options, "attention", device)
    for dtype_name in options.dtype:
        dtype = harness.DTYPES[dtype_name]
        peak = harness.measure_gemm(device, dtype, 2048, 768, 768)
        results[f"gemm_flops_per_s, {dtype_name}"] = peak
        table = Table(
            title=f"attention forward + backward, {HEADS} x {options.width}, {dtype_name}"
        )
        headings = ["case", "contestant", "ms", "TFLOP/s", "of GEMM", "peak MiB", "ours is"]
        for heading in [*headings, *(["replayed ms", "ours is"] if device.type == "cuda" else [])]:
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for case, lengths in (cases() | windowed_cases()).items():
            if options.case and case not in options.case:
                continue
            torch._dynamo.reset()
            window = WINDOW if case in windowed_cases() else NO_WINDOW
            inputs = Inputs(lengths, options.width, dtype, options.device, window)
            name = f"{case}, {dtype_name}"
            results[name] = measured = measure(inputs, options, results["failures"], name)
            for cells in _rows(case, measured, inputs.flops(), peak):
                table.add_row(*cells)
            record.write(results)
        console.print(table)
    if results["failures"]:
        raise SystemExit(1)


def measure(
    inputs: Inputs, options: argparse.Namespace, failures: dict[str, str], case: str
) -> dict[str, Any]:
    """Time one case's contestants: called by the host, and on a GPU replayed as graphs, too."""
    device = torch.device(options.device)
    failed: dict[str, str] = {}
    makers = {
        name: make
        for name, make in contestants(inputs, options.device).items()
        if name in (OURS, "SDPA, padded") or re.search(options.only, name)
    }
    runs = harness.surviving(makers, failed)
    if OURS not in runs:
        raise SystemExit(f"{case}: {failed[OURS]}")
    verify(runs, failed)
    memory = {name: harness.peak_memory(run, device) for name, run in runs.items()}
    samples = harness.interleave(runs, device, rounds=options.rounds)
    measured = {
        "lengths": inputs.lengths,
        "window": inputs.window,
        "flops": inputs.flops(),
        "peak_bytes": memory,
        "seconds": samples,
        "quantiles": {name: harness.summary(s) for name, s in samples.items()},
    }
    if device.type == "cuda":
        # Each call of a graph has inputs of its own, together more than the cache holds.
        copies = [inputs, *(inputs.another() for _ in range(inputs.copies_beyond_cache() - 1))]
        calls = [contestants(each, options.device) for each in copies]

        def replay(name: str) -> harness.Contestant:
            own = [made[name]() for made in calls]
            return harness.graph_replay(lambda: [run() for run in own], device)

        graphs = harness.surviving({name: lambda name=name: replay(name) for name in runs}, failed)
        replayed = harness.device_seconds(graphs, device, rounds=5, replays=4)
        measured["replayed_seconds"] = {
            name: [each / len(copies) for each in seconds] for name, seconds in replayed.items()
        }
    failures.update({f"{name}, {case}": text for name, text in failed.items()})
    return measured


def _rows(case: str, measured: dict[str, Any], flops: int, peak: float) -> Iterator[list[str]]:
    replayed = measured.get("replayed_seconds", {})
    ours = harness.median(measured["seconds"][OURS])
    for name, seconds in measured["seconds"].items():
        rate = flops / harness.median(seconds)
        cells = [
            case if name == OURS else "",
            name,
            f"{harness.median(seconds) * 1e3:.3f}",
            f"{rate / 1e12:.3f}",
            f"{rate / peak:.0%}",
            f"{measured['peak_bytes'][name] / 2**20:.0f}",
            "" if name == OURS else f"{harness.median(seconds) / ours:.2f}x",
        ]
        if name in replayed:
            device_time = harness.median(replayed[name])
            cells.append(f"{device_time * 1e3:.4f}")
            if name != OURS and OURS in replayed:
                cells.append(f"{device_time / harness.median(replayed[OURS]):.2f}x")
        yield cells


if __name__ == "__main__":
    exit_with(main)
