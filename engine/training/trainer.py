"""One phase of a training run: model, data, optimizer, log and checkpoints."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.async_writer import AsyncWriter
from ..checkpoints.manifest import Manifest, Progress, read_manifest
from ..checkpoints.training_state import TrainingState, named_weights
from ..config.recipe import Recipe
from ..data.loader import TrainingLoader
from ..data.sampler import Sampler
from ..data.split import TokenizedSplit
from ..data.streamed import StreamedExamples
from ..data.task_batch import Examples
from ..data.task_schedule import TaskSchedule
from ..distributed.gradient_sync import NoSync
from ..distributed.rank_check import RankCheck
from ..distributed.ranks import Ranks
from ..gradients.flat_parameters import FlatParameters
from ..metrics.log import MetricsLog
from ..metrics.loggers import open_loggers
from ..models.multitask import MultitaskModel
from ..optim.build import Optimizer
from ..optim.lr_schedule import Schedule
from ..runs.run import Run
from ..runs.scoring import deciding_score
from ..runtime.cpu import token_multiple
from ..runtime.execution import RECORDED
from ..runtime.gpu import GpuMeter
from ..utils.errors import InputError
from ..utils.finite import all_finite
from .step import MultitaskStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A training run, or one phase of it.

    Attributes:
        run: its folder and recipe.
        phase: the number of the phase, from 0.
        recipe: of the phase.
        device: of the model.
        train_sets: the examples of each trained task or objective, in the order of the gradient
            rows.
        dev_sets: the dev split of each evaluated task; none in a phase that trains no task.
        samplers: choose the examples of each task's batches.
        model: encoder and heads, in training mode, on flat parameters.
        parameters: master weights, compute weights, gradient rows.
        optimizer: updates the weights.
        step: one training step.
        sync: exchanges gradients and weights with other ranks.
        ranks: the processes that train together.
        rank_check: compares what they must have the same.
        checkpoint_writer: writes and reads checkpoints.
        lr_schedule: the learning rate of each step.
        task_schedule: the batches of each step.
        total_steps: steps of all epochs.
    """

    run: Run
    phase: int
    recipe: Recipe
    device: torch.device
    train_sets: list[Examples]
    dev_sets: dict[str, TokenizedSplit]
    samplers: list[Sampler]
    model: MultitaskModel
    parameters: FlatParameters
    optimizer: Optimizer
    step: MultitaskStep
    sync: NoSync
    ranks: Ranks
    rank_check: RankCheck
    checkpoint_writer: AsyncWriter
    lr_schedule: Schedule
    task_schedule: TaskSchedule
    total_steps: int

    def loader(self, start: int) -> TrainingLoader:
        """Return the batches from step ``start`` of the phase to its end."""
        on_cpu = self.device.type == "cpu"
        return TrainingLoader(
            self.train_sets,
            self.samplers,
            start,
            self.total_steps,
            schedule=self.task_schedule.batches,
            micro_batches=self.recipe.micro_batches,
            shard=self.ranks.shard,
            shapes=self.recipe.max_graphs if self.step.execution.kind in RECORDED else 0,
            token_multiple=token_multiple(self.parameters.compute.dtype) if on_cpu else 1,
            plan_lookups=None if on_cpu else self.model.with_lookup_plan,
            pin_memory=self.device.type == "cuda",
        )

    def go_to(self, start: int) -> None:
        """Read streams on to the first batches that steps from ``start`` on have of them.

        The loader would do it, too, but shows nothing, and a signal would wait for its end.
        """
        steps = range(start, min(start + len(self.samplers), self.total_steps))
        for task, examples in enumerate(self.train_sets):
            if isinstance(examples, StreamedExamples):
                scheduled = (each for step in steps for each in self.task_schedule.batches(step))
                first = next((each.batch for each in scheduled if each.task == task), None)
                if first is not None:
                    examples.go_to(self.samplers[task].batch(first))

    def log(self, start: int) -> MetricsLog:
        """Return the log of the steps from ``start`` on."""
        recipe, folder, watched = self.recipe, self.run.folder, self.step.watched
        loggers = recipe.loggers if self.ranks.is_main else ()
        return MetricsLog(
            folder,
            start,
            recipe.log_every,
            layers=() if watched is None else watched.names,
            layers_every=recipe.log_layer_cosines_every,
            loggers=open_loggers(loggers, folder, recipe.model_dump(mode="json"), start),
            gpu=GpuMeter.find(self.device),
            ranks=self.ranks,
            limit=recipe.log_mib << 20,
            keep=recipe.keep_logs,
        )

    @property
    def name(self) -> str:
        """The name of the phase; empty where the recipe has none."""
        return list(self.run.recipe.in_phases)[self.phase]

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return self.task_schedule.epoch_steps

    def ends_epoch(self, steps_done: int) -> bool:
        """Return whether the phase is at the end of an epoch, or at its own end."""
        return steps_done % self.epoch_steps == 0 or steps_done == self.total_steps

    def is_evaluated(self, steps_done: int) -> bool:
        """Return whether the dev sets, if any, are scored after so many steps of the phase."""
        every = self.recipe.eval_every if self.dev_sets else 0
        return self.ends_epoch(steps_done) or (every > 0 and steps_done % every == 0)

    def stops_early(self, progress: Progress) -> bool:
        """Return whether the phase ends for want of better scores; all ranks return the same."""
        return 0 < self.recipe.patience <= progress.stale

    def has_ended(self, progress: Progress) -> bool:
        """Return whether the phase is at its end."""
        return progress.phase_step >= self.total_steps or self.stops_early(progress)

    def deciding_score(self, scores: Mapping[str, float]) -> float:
        """Return the score by which checkpoints are compared, the same on all ranks.

        It is NaN where any score is not finite.
        """
        is_finite = all(map(math.isfinite, scores.values()))
        score = deciding_score(self.run.recipe, scores) if is_finite else None
        # Processors may differ in the last bit of a metric, and ranks must go the same way.
        score = self.ranks.broadcast(score)
        return math.nan if score is None else float(score)

    def restore(self) -> Progress:
        """Load the newest intact checkpoint, if any; return the run's progress.

        A checkpoint of the phase before is not loaded: the model was built with its weights.

        Raises:
            InputError: the checkpoint belongs to another model, or all of several are damaged.
        """
        checkpoints = self.run.checkpoints
        newest = None
        if self.ranks.is_main:
            checkpoints.sweep()
            newest = checkpoints.find("step")
        name = self.ranks.broadcast(newest and newest.name)
        if name is None:
            return Progress()
        path = checkpoints.folder / name
        manifest, state = read_manifest(path), self.state
        done = manifest.progress
        if done.phase < self.phase:
            return done.in_phase(self.phase)
        state.check_places(path, manifest.places)
        tensors = state.tensors()
        self.checkpoint_writer.load(path, tensors)
        state.restore(tensors)
        if not self.ranks.all(state.is_valid):
            raise InputError(
                f"{path}: weights or moments are no finite numbers, or squares are below zero; "
                "remove it, and go on from the checkpoint before, or train the run again"
            )
        self.sync.gather_params()
        check_range(self.parameters)
        return done

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint to resume from."""
        for examples in self.train_sets:
            if isinstance(examples, StreamedExamples):
                examples.keep_marks(self.run.folder)
        self.checkpoint_writer.wait()  # the copy of the one before is freed before another is made
        state, ranks = self.state, self.ranks.size if self.recipe.divided else 0
        manifest = Manifest(progress=progress, places=state.places, ranks=ranks)
        self.checkpoint_writer.save(state.tensors(), manifest)

    def save_scored(self, progress: Progress) -> None:
        """Write the weights that were scored, or their moving average, where they are worth it.

        They are if their score is the best so far, and if they may be averaged in the end.
        """
        is_best = progress.best_step == progress.step
        is_top = any(step == progress.step for step, _ in progress.top)
        if not is_best and not is_top:
            return
        master = self.sync.gather(self._scored)
        if self.ranks.is_main:
            weights = named_weights(self.parameters, master)
            if is_best:
                self.run.checkpoints.save_best(progress, weights, self.model.thresholds)
            if is_top:
                self.run.checkpoints.save_weights("top", progress, weights)
                self.checkpoint_writer.keep_top(progress)

    @property
    def average_best(self) -> int:
        """How many of the best evaluations are averaged as the phase ends; 0: none."""
        count, is_last = (
            self.run.recipe.average_best,
            self.phase == len(self.run.recipe.in_phases) - 1,
        )
        return count if is_last and count > 1 else 0

    @contextmanager
    def scored_weights(self) -> Iterator[None]:
        """Let the model compute with the weights that are scored; all ranks must call.

        Those are the average of the weights, if there is one.  Afterwards the model has the bits
        that it had.
        """
        if self.step.average is None:
            yield
            return
        with self.computing_with(self.sync.gather(self._scored)):
            yield

    @contextmanager
    def computing_with(self, weights: Tensor) -> Iterator[None]:
        """Let the model compute with other weights ``[P]``; afterwards it has its own bits."""
        compute = self.parameters.compute  # of one rank in fp32 the masters themselves
        trained = compute.clone()
        compute.copy_(weights)
        try:
            yield
        finally:
            compute.copy_(trained)

    @property
    def _scored(self) -> Tensor:
        """The fp32 weights of this process that are scored, ``[S]``."""
        average = self.step.average
        return self.parameters.master if average is None else average.weights

    @property
    def state(self) -> TrainingState:
        """Contents of a checkpoint."""
        average = self.step.average
        vectors = {} if average is None else {"ema": average.weights}
        return TrainingState(self.parameters, self.optimizer, self.step.state, self.ranks, vectors)


def check_range(parameters: FlatParameters) -> None:
    """Check that the weights are within the range of the compute dtype.

    Raises:
        InputError: they are not.
    """
    dtype = parameters.compute.dtype
    if not all_finite([parameters.compute]):
        raise InputError(f"weights are beyond the range of {dtype}; set precision=bf16 or fp32")
