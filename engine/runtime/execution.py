"""Run the step eagerly, compiled, or as a CUDA graph.

    eager             every operator is called by itself
    compile           torch.compile makes one function of the forward and one of the backward pass,
                      and fuses the operations between the kernels; it compiles once, for all token
                      counts
    graphs            as eager, with a CUDA graph of the whole step, forward to optimizer, for each
                      batch shape: one launch instead of a thousand
    compiled_graphs   both

The first step of a shape runs without a graph, which runs lazy initialisation before capture; the
second is recorded.  So there are no extra warm-up steps, and training is the same.

A step of several ranks holds calls of NCCL, which asks that all ranks record a call, or none, and
that they replay the graphs that they recorded together.  So the ranks' batches of one step have one
shape (data/loader.py), every rank takes the same decision at each step, and `agree` checks it
whenever a signature is new or recorded.  NCCL has connected the ranks by then, since the first step
of a shape makes the same calls.  NCCL waits for the end of graphs that hold its calls before it
closes a connection: :meth:`Execution.close` comes before the end of the process group.

Recorded steps have a side stream for weight gradients (kernels/gradient_queue.py): a graph holds
the order that they really need, and no call of the host.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._kernels import kernels
from ..utils.errors import InputError

EXECUTIONS = ("auto", "eager", "compile", "graphs", "compiled_graphs")
COMPILED = ("compile", "compiled_graphs")
RECORDED = ("graphs", "compiled_graphs")


class Batch(Protocol):
    """Inputs of a step: tensors, and numbers on the host that its signature holds."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the examples; batches of other tasks run other layers."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in an order that is always the same."""

    @property
    def signature(self) -> Hashable:
        """Equal for batches that the same recording serves."""

    def map(self: "BatchT", move: Callable[[Tensor], Tensor]) -> "BatchT":
        """Return the batch with ``move`` applied to every tensor."""


BatchT = TypeVar("BatchT", bound=Batch)
Result = TypeVar("Result")
Function = Callable[[Sequence[BatchT]], Result]


class Recording(NamedTuple, Generic[BatchT, Result]):
    """A function recorded on some batches.

    Attributes:
        batches: whose tensors it reads; new values are copied there.
        result: whose tensors it writes.
        replay: does its work again.
        release: frees what it holds; it is not replayed any more.
    """

    batches: Sequence[BatchT]
    result: Result
    replay: Callable[[], None]
    release: Callable[[], None] = lambda: None


class CudaGraphs:
    """A recorder of functions as CUDA graphs that share one pool of memory.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: "Function[BatchT, Result]", batches: Sequence[BatchT]) -> Result:
        """Call the function on the stream that recordings are made on."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function(batches)
        current.wait_stream(self._stream)
        return result

    def record(
        self, function: "Function[BatchT, Result]", batches: Sequence[BatchT]
    ) -> Recording[BatchT, Result]:
        """Record the function, without running it, on copies of the batches."""
        own = [batch.map(Tensor.clone) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        # Other threads (the one that pins batches, NCCL's watchdog) may go on calling CUDA
        # meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
            result = function(own)
        return Recording(own, result, graph.replay, graph.reset)


class Recorder(Protocol):
    """Interface of :class:`CudaGraphs`."""

    def run(self, function: "Function[BatchT, Result]", batches: Sequence[BatchT]) -> Result:
        """Call the function."""

    def record(
        self, function: "Function[BatchT, Result]", batches: Sequence[BatchT]
    ) -> Recording[BatchT, Result]:
        """Record the function on copies of the batches."""


class Recorded(Generic[BatchT, Result]):
    """A function that is recorded for a few signatures of its batches.

    What it returns is overwritten by its next call.

    Args:
        function: reads nothing back from the device, and finds all that changes from call to call
            in tensors that stay where they are.
        recorder: runs and records it.
        limit: the most recordings; batches of further signatures are run as they are.
        agree: is given a number for each signature that is new, and for each recording; several
            ranks must make these calls alike.

    Attributes:
        recordings: by the signatures of the batches.
        beyond_limit: calls that were run as they are because there was no recording left for them.
    """

    def __init__(
        self,
        function: "Function[BatchT, Result]",
        recorder: Recorder,
        limit: int,
        agree: Callable[[int], None] = lambda _number: None,
    ) -> None:
        self._function, self._recorder, self._limit = function, recorder, limit
        self._agree = agree
        self._seen: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, Recording[BatchT, Result]] = {}
        self.beyond_limit = 0

    def __call__(self, batches: Sequence[BatchT]) -> Result:
        """Return what the function returns for ``batches``."""
        key = tuple(batch.signature for batch in batches)
        recording = self.recordings.get(key)
        if recording is None:
            full = len(self.recordings) == self._limit
            if full or key not in self._seen:
                if full:
                    self.beyond_limit += 1
                else:
                    self._seen[key] = len(self._seen)
                    self._agree(2 * self._seen[key])
                return self._recorder.run(self._function, batches)
            self._agree(2 * self._seen[key] + 1)
            recording = self._recorder.record(self._function, batches)
            self.recordings[key] = recording
        _copy(
            [tensor for batch in batches for tensor in batch.tensors],
            [tensor for batch in recording.batches for tensor in batch.tensors],
        )
        recording.replay()
        return recording.result

    def release(self) -> None:
        """Free all recordings."""
        for recording in self.recordings.values():
            recording.release()
        self.recordings.clear()
        self._seen.clear()


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors into others like them, on a GPU in one launch for each dtype."""
    of_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        of_dtype.setdefault(target.dtype, []).append((target, source))
    for pairs in of_dtype.values():
        own, given = (list(tensors) for tensors in zip(*pairs, strict=True))
        torch._foreach_copy_(own, given, non_blocking=True)


class Execution:
    """One of EXECUTIONS, on a device.

    Args:
        kind: ``auto`` is ``graphs`` on a GPU and ``eager`` on a CPU.
        device: where steps run.
        max_graphs: the most CUDA graphs.
        agree: of :class:`Recorded`, for steps of several ranks.
        side_stream: whether recorded steps have one for weight gradients.

    Attributes:
        kind: never ``auto``.
        max_graphs: the most CUDA graphs.
        gradient_queue: for the weight gradients of a backward pass; None to launch them at once.
        warmup_seconds: spent in calls that compiled or recorded, so far.

    Raises:
        InputError: graphs without a GPU.
    """

    def __init__(
        self,
        kind: str,
        device: torch.device,
        max_graphs: int = 16,
        agree: Callable[[int], None] = lambda _number: None,
        side_stream: bool = True,
    ) -> None:
        if kind == "auto":
            kind = "graphs" if device.type == "cuda" else "eager"
        if kind in RECORDED and device.type != "cuda":
            raise InputError(f"execution = {kind}: needs a GPU; take compile or eager")
        self.kind, self.warmup_seconds = kind, 0.0
        self.max_graphs, self._agree = max_graphs, agree
        self._recorder = CudaGraphs(device) if kind in RECORDED else None
        self.gradient_queue: kernels.gradient_queue.GradientQueue | None = None
        if kind in RECORDED and side_stream:
            self.gradient_queue = kernels.gradient_queue.SideStream(device)
        self._recorded: list[Recorded] = []  # type: ignore[type-arg]
        self._compiled_for: set[tuple[str, ...]] = set()
        self.num_graphs = 0
        """CUDA graphs so far, those that were freed since included."""

    def close(self) -> None:
        """Free all CUDA graphs."""
        for recorded in self._recorded:
            recorded.release()

    @property
    def steps_beyond_limit(self) -> int:
        """Steps that no graph was left for, so far."""
        return sum(recorded.beyond_limit for recorded in self._recorded)

    def keep_static(self, tensor: Tensor) -> None:
        """Tell the compiler that a tensor's sizes never change."""
        if self.kind in COMPILED:
            torch._dynamo.mark_static(tensor)

    def compiled(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Return the function, compiled once for all sizes where steps are compiled."""
        if self.kind not in COMPILED:
            return function
        kept = None if self.gradient_queue is None else kernels.gradient_queue.UNCHANGED_OPERANDS
        return torch.compile(function, dynamic=True, options=kept)

    def recorded(self, function: "Function[BatchT, Result]") -> "Function[BatchT, Result]":
        """Return the function of the whole step, recorded where steps are; its warm-up is timed."""
        if self.kind == "eager":
            return function
        if self._recorder is not None:
            recorded = Recorded(function, self._recorder, self.max_graphs, self._agree)
            self._recorded.append(recorded)
            function = recorded

        def timed(batches: Sequence[BatchT]) -> Result:
            start, graphs, tasks = time.perf_counter(), self.num_graphs, batches[0].tasks
            result = function(batches)
            self.num_graphs = sum(len(recorded.recordings) for recorded in self._recorded)
            if self.num_graphs > graphs or tasks not in self._compiled_for:
                self._compiled_for.add(tasks)
                self.warmup_seconds += time.perf_counter() - start
            return result

        return timed
