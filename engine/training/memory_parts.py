"""Tell a run's peak memory in parts, and measure it.

    process       interpreter, tokenizer and the like before data are read and the model is built,
                  and the code of libraries, also what is read on first use
    weights       fp32 masters, copies to compute with, frozen weights, averaged weights
    gradients     the buffer of K task gradients, and a rank's shard of it
    moments       all that the optimizer keeps
    rows          arrays of the examples, their order, precomputed hidden states; pages of
                  memory-mapped ones count once they are read, and the system may drop them
    activations   the tensors of a step at its peak: what the forward pass saves, and gradients
    evaluation    the tensors of an evaluation at its peak
    checkpoint    the copy of the state that is kept on the CPU while a checkpoint is written

An evaluation begins when a step has ended, and either may run while a checkpoint is written.  So
the peak is the sum of all parts, with the larger of ``activations`` and ``evaluation``.  With a GPU
there are two sums: ``process``, ``rows`` and ``checkpoint`` are on the host, the others on the
GPU.

Weights, gradients, moments, rows and checkpoint are counted from the tensors and arrays themselves.
Activations and evaluation are counted where the first step of a phase and its first evaluation run:
by each storage that is made, or by torch's allocator on a GPU.  They grow with the tokens of a
batch, so those of the first step are scaled to the largest batch.  Not in any part: what libraries
allocate for threads and generated code, workspace within an operator, Python objects such as texts
of answers, batches that wait in the loader, and memory that was freed and not returned to the
system.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.collate import PackedBatch
from ..data.loader import deal, evaluation_batches
from ..data.streamed import StreamedExamples
from ..runs.scoring import MAX_TOKENS
from ..runtime.execution import COMPILED
from ..runtime.live_bytes import LiveBytes
from ..utils.memory import peak_resident_memory, resident_memory, resident_of_files, restart_peak
from .trainer import Trainer

_MOST_BATCHES = 512
"""That the largest one is looked for in, evenly spaced."""
_OURS = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes of each part of a process's memory in one phase.

    Attributes:
        process: itself.
        weights: of the model.
        gradients: of its tasks.
        moments: of the optimizer.
        rows: arrays of the examples.
        mapped_rows: how much of ``rows`` is mapped from files.
        activations: of the step with the largest batch.
        evaluation: at its peak; 0 where nothing is scored.
        checkpoint: its copy of the state.
    """

    process: int
    weights: int
    gradients: int
    moments: int
    rows: int
    mapped_rows: int
    activations: int
    evaluation: int
    checkpoint: int

    @property
    def on_device(self) -> int:
        """The peak of what is on the model's device."""
        kept = self.weights + self.gradients + self.moments
        return kept + max(self.activations, self.evaluation)

    @property
    def on_host(self) -> int:
        """The peak of what is on the CPU, whatever the model's device."""
        return self.process + self.rows + self.checkpoint

    @property
    def total(self) -> int:
        """The peak of both together: that of a process which trains on a CPU."""
        return self.on_device + self.on_host


class _OfPhase(NamedTuple):
    phase: str
    parts: MemoryParts


class MemoryMeter:
    """Measures the memory of a process that trains the phases of a run.

    The process's peak begins with it, where the system allows that.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        restart_peak()
        if self._on_gpu and torch.cuda.is_initialized():  # by an earlier run of this process
            torch.cuda.reset_peak_memory_stats(device)
        self._own_at_start = resident_memory().own
        self._gpu_peaks = (0, 0)
        self._ended: list[_OfPhase] = []
        self._forget_phase()

    def _forget_phase(self) -> None:
        self._tensors = dict[str, int]()
        self._measured_tokens = self._most_tokens = 0

    @contextmanager
    def step(self, trainer: Trainer, micro_batches: Sequence[PackedBatch]) -> Iterator[None]:
        """Measure the step in the block if it is the first of the phase; always count its tokens.

        Compiled code runs as it is on a CPU, where the counting would keep torch from compiling;
        then an eager forward pass is measured instead, before the block.
        """
        tokens = max(batch.num_tokens for batch in micro_batches)
        self._most_tokens = max(self._most_tokens, tokens)
        if "activations" in self._tensors:
            yield
            return
        self._measured_tokens = tokens
        if trainer.step.execution.kind in COMPILED and not self._on_gpu:
            with self._measured("activations"):
                trainer.step.forward_losses(micro_batches)
            yield
            return
        with self._measured("activations"):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure the evaluation in the block if it is the first of the phase."""
        if "evaluation" in self._tensors:
            yield
            return
        with self._measured("evaluation"):
            yield

    @contextmanager
    def _measured(self, part: str) -> Iterator[None]:
        if not self._on_gpu:
            with LiveBytes() as counted:
                yield
            self._tensors[part] = counted.peak
            return
        self.note_gpu_peaks()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self._tensors[part] = torch.cuda.max_memory_allocated(self._device) - before

    def note_gpu_peaks(self) -> tuple[int, int]:
        """Return the most bytes so far that tensors had on the GPU, and that torch took for them.

        Torch's own peaks begin anew with each part that is measured.
        """
        allocated, reserved = self._gpu_peaks
        self._gpu_peaks = (
            max(allocated, torch.cuda.max_memory_allocated(self._device)),
            max(reserved, torch.cuda.max_memory_reserved(self._device)),
        )
        return self._gpu_peaks

    def predict(self, trainer: Trainer) -> MemoryParts:
        """Return the parts of a phase of which a few steps ran, as its end will find them.

        One batch of each dev split is evaluated: the largest.  All rows count as read.
        """
        if trainer.dev_sets:
            with self.evaluation():
                _evaluate_largest(trainer)
        self._most_tokens = max(self._most_tokens, most_tokens(trainer))
        return self._parts(trainer, all_read=True)

    def end_phase(self, trainer: Trainer) -> None:
        """Count the parts of a phase that ended or stopped; not if it trained no step."""
        if "activations" in self._tensors:
            self._ended.append(_OfPhase(trainer.name, self._parts(trainer, all_read=False)))
        self._forget_phase()

    def _parts(self, trainer: Trainer, *, all_read: bool) -> MemoryParts:
        weights, gradients, rows = weights_of(trainer), gradients_of(trainer), rows_of(trainer)
        known = weights | gradients
        moments = {at: size for at, size in moments_of(trainer).items() if at not in known}
        now = resident_of_files(rows.files)
        mapped = rows.mapped if all_read else min(now, rows.mapped)
        measured = self._tensors.get("activations", 0)
        share = self._most_tokens / max(1, self._measured_tokens)
        return MemoryParts(
            process=self._own_at_start + max(0, resident_memory().of_files - now),
            weights=sum(weights.values()),
            gradients=sum(gradients.values()),
            moments=sum(moments.values()),
            rows=rows.own + mapped,
            mapped_rows=mapped,
            activations=round(measured * share),
            evaluation=self._tensors.get("evaluation", 0),
            checkpoint=trainer.state.num_bytes,
        )

    def report(self) -> dict[str, Any] | None:
        """Return what ``metrics.json`` has of the memory; None if no step was trained.

        Of several phases, the parts are those of the one whose sum is largest; what the system saw
        is of all that this process trained.  A resumed run has those of the process that trained
        it last, and of several ranks those of the first.  Sizes are whole bytes.
        """
        if not self._ended:
            return None
        phase, parts = max(self._ended, key=lambda each: each.parts.total)
        found: dict[str, Any] = {"phase": phase} if phase else {}
        found |= {f"{name}_bytes": size for name, size in asdict(parts).items()}
        resident = peak_resident_memory()
        if not self._on_gpu:
            return found | _compared("process", parts.total, resident, parts.process)
        allocated, reserved = self.note_gpu_peaks()
        found |= _compared("process", parts.on_host, resident, parts.process)
        found |= _compared("gpu", parts.on_device, allocated, 0)
        return found | {"gpu_reserved_peak_bytes": reserved}


def _compared(what: str, predicted: int, measured: int, process: int) -> dict[str, Any]:
    """Return a sum of parts beside what the system saw, and its share in that.

    The shares are of all, and of what is beyond the process itself, None where that is nothing.
    """
    found: dict[str, Any] = {
        f"{what}_predicted_peak_bytes": predicted,
        f"{what}_measured_peak_bytes": measured,
        f"{what}_explained_share": _share(predicted, measured),
    }
    if process:
        share = _share(predicted - process, measured - process)
        found[f"{what}_explained_share_of_training"] = share
    return found


def _share(predicted: int, measured: int) -> float | None:
    return round(predicted / measured, 4) if measured > 0 else None


Storages = dict[int, int]
"""Bytes of distinct storages, by their addresses."""


def storages(tensors: Iterable[Tensor]) -> Storages:
    """Return the distinct storages of tensors; views of one count once."""
    found = Storages()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def weights_of(trainer: Trainer) -> Storages:
    """Return the storages of all weights."""
    parameters, average = trainer.parameters, trainer.step.average
    return storages(
        [
            parameters.own.master,
            parameters.own.compute,
            parameters.compute,
            *parameters.frozen.values(),
            *parameters.frozen_compute,
            *trainer.model.parameters(),
            *trainer.model.buffers(),
            *([] if average is None else [average.weights]),
        ]
    )


def gradients_of(trainer: Trainer) -> Storages:
    """Return the storages of the task gradients."""
    return storages([trainer.parameters.rows, trainer.parameters.own.rows])


def moments_of(trainer: Trainer) -> Storages:
    """Return the storages of the optimizer's tensors; of torch's, weights are among them."""
    optimizer = trainer.optimizer
    further = [value for value in vars(optimizer).values() if isinstance(value, Tensor)]
    return storages([*optimizer.vectors.values(), *optimizer.state.values(), *further])


@dataclass(slots=True)
class Rows:
    """Arrays of the examples.

    Attributes:
        own: bytes of those in memory.
        mapped: bytes of those that are mapped from files.
        files: these files.
    """

    own: int
    mapped: int
    files: set[Path]


def rows_of(trainer: Trainer) -> Rows:
    """Return the arrays of all examples that a trainer holds, and of the order they come in."""
    owners = {}
    for array in _arrays([trainer.train_sets, trainer.dev_sets, trainer.samplers], set()):
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        owners[owner.__array_interface__["data"][0]] = owner
    rows = Rows(0, 0, set())
    for owner in owners.values():
        if isinstance(owner, np.memmap):
            rows.mapped += owner.nbytes
            rows.files.add(Path(str(owner.filename)).resolve())
        else:
            rows.own += owner.nbytes
    return rows


def _arrays(value: object, seen: set[int]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the arrays in containers, and in the attributes of objects of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    below: Iterable[object] = ()
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        below = value.values()
    elif isinstance(value, list | tuple | deque):
        # Numbers and texts, of which there may be many, have no arrays.
        below = (each for each in value if not isinstance(each, str | bytes | int | float))
    elif type(value).__module__.partition(".")[0] == _OURS:
        names = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        own = [getattr(value, name) for name in names if hasattr(value, name)]
        below = [*own, *getattr(value, "__dict__", {}).values()]
    for each in below:
        yield from _arrays(each, seen)


def most_tokens(trainer: Trainer) -> int:
    """Return the tokens of this rank's largest batch, of 512 steps at most, evenly spaced.

    Of several micro-batches each has about its share of them.  0 where a task's examples are
    streamed: nothing of later batches is known.
    """
    if any(isinstance(examples, StreamedExamples) for examples in trainer.train_sets):
        return 0
    count = min(trainer.total_steps, _MOST_BATCHES)
    steps = np.unique(np.linspace(0, trainer.total_steps - 1, count).astype(int)).tolist()
    most = 0
    for step in steps:
        scheduled = trainer.task_schedule.batches(step)
        samplers = [trainer.samplers[each.task] for each in scheduled]
        shares = deal(
            [sampler.batch(each.batch) for sampler, each in zip(samplers, scheduled, strict=True)],
            [sampler.by_rank for sampler in samplers],
            *trainer.ranks.shard,
        )
        sizes = [
            trainer.train_sets[each.task].sequence_sizes(share, step)
            for each, share in zip(scheduled, shares, strict=True)
        ]
        most = max(most, sum(int(own.sum()) for own in sizes))
    return -(-most // trainer.recipe.micro_batches)


def _evaluate_largest(trainer: Trainer) -> None:
    """Compute the scores of the largest evaluation batch of each dev split, and memory for all."""
    model = trainer.model
    was_training = model.training
    model.eval()
    with trainer.scored_weights(), torch.inference_mode():
        for task, split in trainer.dev_sets.items():
            for _, batch in evaluation_batches(split, MAX_TOKENS):
                (scores,) = model(batch.to(trainer.device), [task])
                torch.empty(int(split.answer_offsets[-1]), *scores.shape[1:])
                break
    model.train(was_training)
