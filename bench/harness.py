"""Time contestants in turn, measure the machine's ceilings, and keep records, for all benchmarks.

Contestants of one benchmark run in the same process, in turn, round after round, so that whatever
else slows the machine slows them alike; figures to compare are ratios of their medians.
"""

import argparse
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "datasets"),
    *("torchjd", "liger-kernel", "apex"),
)


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


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError where the block takes longer: one contestant must not take all the time.

    It is raised between two Python instructions; a compiler that runs is waited for.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def graph_replay(
    run: Contestant, device: torch.device, pool: tuple[int, int] | None = None
) -> Contestant:
    """Return what replays a contestant's work as a CUDA graph.

    A replay holds the device's time alone: the host's time to launch hundreds of kernels, which is
    longer than small kernels take, is left out alike for every contestant.

    Args:
        run: the contestant.
        device: a GPU.
        pool: memory that it shares with other graphs, none of which is replayed at the same time.

    Raises:
        RuntimeError: the contestant does what cannot be recorded, such as waiting for the device.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the libraries' workspaces
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool):
        kept = run()

    def replay(_kept: object = kept) -> None:
        graph.replay()

    return replay


def device_seconds(
    contestants: Mapping[str, Contestant], device: torch.device, *, rounds: int, replays: int = 20
) -> dict[str, list[float]]:
    """Time contestants on a GPU by CUDA events, each ``replays`` runs in a row, in turn.

    Returns:
        Seconds of one run, ``rounds`` for each contestant.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contestants[name]()
            start.record()
            for _ in range(replays):
                contestants[name]()
            end.record()
            synchronize(device)
            if turn >= 0:
                samples[name].append(start.elapsed_time(end) / 1e3 / replays)
    return samples


def kernel_table(run: Contestant, device: torch.device, runs: int = 3) -> list[dict[str, Any]]:
    """Return the kernels of one run on a GPU, the longest first: name, calls, microseconds."""
    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(runs):
            run()
        synchronize(device)
    kernels = [
        {"name": row.key, "calls": row.count / runs, "us": row.self_device_time_total / runs}
        for row in profiled.key_averages()
        if row.self_device_time_total > 0 and row.device_type != torch.autograd.DeviceType.CPU
    ]
    return sorted(kernels, key=lambda row: -row["us"])


def surviving(
    makers: Mapping[str, Callable[[], Contestant]], failures: dict[str, str]
) -> dict[str, Contestant]:
    """Make contestants and run each once; one that fails is named in ``failures``."""
    made = {}
    for name, make in makers.items():
        try:
            contestant = make()
            contestant()
        except Exception as error:  # a peer may fail in any way; the others go on
            failures[name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
        else:
            made[name] = contestant
    return made


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
    """Describe the machine, the libraries and the commit.

    The commit is what ``SUPERBERT_COMMIT`` says, where that is set: a machine without network may
    have neither git nor the repository.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    described: dict[str, Any] = {
        "commit": os.environ.get("SUPERBERT_COMMIT") or _git("rev-parse", "HEAD"),
        "dirty": "SUPERBERT_COMMIT" not in os.environ
        and bool(
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
        for name in ("avx512_bf16", "amx_bf16"):
            described[name] = capabilities.get(name)
        described["huge_pages"] = _huge_pages()
    return described


def _huge_pages() -> str:
    """Say who gets huge pages here, and whether torch asks for them."""
    try:
        line = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "none"
    modes = re.findall(r"\[(\w+)\]", line)
    asks = os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0"
    return f"{' '.join(modes)}, {'asked for' if asks else 'not asked for'}"


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


def pattern(text: str) -> re.Pattern[str]:
    """Read a regular expression from the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a regular expression ({error})"
        ) from None


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


class Record:
    """A benchmark's record, written anew after each part: a run that is cut off leaves the others.

    Args:
        options: what :func:`parse` returned; without ``--json`` nothing is written.
        benchmark: its name.
        device: what is measured.
    """

    def __init__(self, options: argparse.Namespace, benchmark: str, device: torch.device) -> None:
        self._options, self._benchmark, self._device = options, benchmark, device
        self._replace: bool = options.force

    def write(self, results: Any) -> None:
        """Write what there is so far, with the environment."""
        if self._options.json is not None:
            write_record(
                self._options.json,
                self._benchmark,
                self._device,
                results,
                replace=self._replace,
            )
            self._replace = True


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


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where it or the repository is not."""
    try:
        process = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None
