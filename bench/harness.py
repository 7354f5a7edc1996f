"""What all benchmarks share: interleaved timing, the machine's ceilings, records that are kept.

Contestants of one benchmark run in the same process, in turn, round after round, so that whatever
else slows the machine slows them alike; figures to compare are ratios of their medians.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from engine.utils.errors import InputError
from engine.utils.files import explained
from engine.utils.json_text import dump_json
from engine.utils.output_files import check_outputs, write_output

Contestant = Callable[[], object]

_PACKAGES = ("torch", "triton", "numpy", "transformers", "torchjd", "liger-kernel", "apex")


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    setup: Callable[[int], object] = lambda _round: None,
) -> dict[str, list[float]]:
    """Time every contestant once a round, each round beginning with another one.

    Args:
        contestants: what to time, by name.
        device: waited for before and after each timing.
        rounds: samples for each.
        warmup: rounds before these that are not kept.
        setup: called before each timing with the round's number, not timed; it puts the same
            input before every contestant of a round.

    Returns:
        Seconds, ``rounds`` for each contestant.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            setup(turn)
            synchronize(device)
            start = time.perf_counter()
            contestants[name]()
            synchronize(device)
            if turn >= 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return the 20 %, 50 % and 80 % quantiles of at least two samples."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": deciles[1], "p50": deciles[4], "p80": deciles[7]}


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def measure_bandwidth(
    device: torch.device, numel: int = 1 << 26, rounds: int = 7
) -> dict[str, float]:
    """Return bytes a second of a copy (read + write) and of a dot product (read only)."""
    x, y = torch.ones(numel, device=device), torch.empty(numel, device=device)
    samples = interleave(
        {"copy": lambda: y.copy_(x), "read": lambda: torch.dot(x, y)}, device, rounds=rounds
    )
    return {name: 2 * x.nbytes / median(seconds) for name, seconds in samples.items()}


def measure_gemm(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, rounds: int = 7
) -> float:
    """Return floating-point operations a second of ``[m, k] @ [k, n]``, the weight transposed."""
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    samples = interleave({"gemm": lambda: a @ b.T}, device, rounds=rounds)
    return 2 * m * n * k / median(samples["gemm"])


def peak_memory(run: Contestant, device: torch.device) -> int:
    """Return the bytes that a run allocates at most at one time, beyond what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held, peak = 0, 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the libraries and the commit."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    described: dict[str, Any] = {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(
            _git(
                "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)bench/results"
            )
        ),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
        described["capability"] = torch.cuda.get_device_capability(device)
        described["cuda"] = torch.version.cuda
    else:
        capabilities = torch.cpu.get_capabilities()
        described["device"] = capabilities.get("cpu_name", platform.processor())
        described["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        described["avx512_bf16"] = capabilities.get("avx512_bf16")
    return described


def whole(least: int, most: int = (1 << 31) - 1) -> Callable[[str], int]:
    """Return what reads a whole number within two bounds from the command line."""

    def read(text: str) -> int:
        if not (text.strip().isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a whole number from {least} to {most}"
            )
        return int(text)

    return read


def positive(text: str) -> float:
    """Read a number above 0 from the command line, of a size that can be computed with.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-30 <= value <= 1e30:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 (1e-30 to 1e30)")
    return value


def device(text: str) -> str:
    """Read the name of a device that is there.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a device that is there, cpu or cuda"
        ) from None
    return text


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of a benchmark, ``--json`` and ``--force`` among them.

    A record that is there already, and stays, ends the process before anything is measured.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures here")
    parser.add_argument("--force", action="store_true", help="replace a record that is there")
    options = parser.parse_args()
    if options.json is not None:
        try:
            options.force = check_outputs([options.json], force=options.force)
        except InputError as error:
            raise _refusal(error) from error
    return options


def write_record(
    path: Path, benchmark: str, device: torch.device, results: Any, *, replace: bool = False
) -> None:
    """Write a benchmark's results with their environment as JSON.

    Args:
        path: of the record.
        benchmark: its name.
        device: what was measured.
        results: what JSON can hold.
        replace: whether a record that is there is replaced.
    """
    record = {"benchmark": benchmark, "environment": environment(device), "results": results}
    write_json(path, record, replace=replace)


def write_json(path: Path, content: Any, *, replace: bool = False) -> None:
    """Write what JSON can hold to a file that ``--json`` named."""
    try:
        with explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, dump_json(content, indent=1) + "\n", replace=replace)
    except InputError as error:
        raise _refusal(error) from error


def _refusal(error: InputError) -> SystemExit:
    """Say what is refused, and return what ends the process, as the engine's commands do."""
    print(f"error: {error}", file=sys.stderr)
    return SystemExit(2)


def _git(*arguments: str) -> str:
    process = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout.strip()
