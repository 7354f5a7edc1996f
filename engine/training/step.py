"""One training step: forward, one backward for K gradients, surgery, update.

Nothing here reads a value back from the device.  The host writes the learning rate and the seed
into tensors that stay in place, and the step's report is made of tensors.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from .._kernels import kernels
from ..data.collate import PackedBatch
from ..distributed.gradient_sync import NoSync
from ..gradients.balancing import Balancer
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import ParamGroups
from ..metrics.step_report import StepReport
from ..models.multitask import MultitaskModel
from ..models.step_scores import StepScores
from ..optim.build import Optimizer
from ..optim.loss_scale import LossScale
from ..optim.weight_average import WeightAverage
from ..runtime.execution import Execution
from .step_scores import StepScoresGatherer

_MICRO_BATCH_BIT = 24
_SEED_BIT = 32
"""A seed's bits: 0-23 the step, 24-31 the micro-batch, from 32 on the recipe's seed."""
_NO_SCORES: Mapping[str, StepScores] = MappingProxyType({})
_RANK_FACTOR = 0x9E3779B1
"""Odd, so that its multiples modulo 2^31 differ for all ranks; their bits differ everywhere."""


class MultitaskStep:
    """A training step of a multitask model by task gradients.

    Args:
        model: in training mode, its parameters held by ``parameters``.
        tasks: the trained tasks; a batch has all of them, in the order of their rows, or, if
            there is only one row, one of them.
        parameters: flat storage and gradient rows of ``model``.
        optimizer: updates ``parameters``.
        groups: parameter groups that are balanced separately.
        balancer: maps the Gram matrices of the groups to the weights of the task gradients.
        watched: groups whose Gram matrices are reported, which costs one more pass over the rows;
            None for none.
        loss_weights: a factor on the loss of each of ``tasks``, and so on its gradient.
        loss_scale: for gradients in fp16; None for other dtypes.
        clip_norm: largest norm of the combined gradient; None for no clipping.
        seed: below 2^31; with the step's number it decides dropout and the order of surgery.
        average: of the weights, taken after each step; None for none.
        execution: eager by default.
        sync: exchanges gradients with other ranks; each rank has dropout masks of its own.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Sequence[str],
        parameters: FlatParameters,
        optimizer: Optimizer,
        groups: ParamGroups,
        balancer: Balancer,
        *,
        watched: ParamGroups | None = None,
        loss_weights: Sequence[float],
        loss_scale: LossScale | None = None,
        clip_norm: float | None,
        seed: int,
        average: WeightAverage | None = None,
        execution: Execution | None = None,
        sync: NoSync | None = None,
    ) -> None:
        self.model, self.tasks, self.parameters = model, tuple(tasks), parameters
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.groups, self.balancer, self.loss_scale = groups, balancer, loss_scale
        self.watched, self.average = watched, average
        self.sync = sync or NoSync()
        self._step_scores = StepScoresGatherer(model, self.tasks, self.sync)
        self._first_seed = seed << _SEED_BIT
        self._of_rank = self.sync.rank * _RANK_FACTOR % 2**31 << _SEED_BIT
        device = parameters.master.device
        factors = torch.tensor(loss_weights, device=device)
        self._loss_weights = {self.tasks: factors}
        self._weighs_losses = any(weight != 1 for weight in loss_weights)
        self._segments = {self.tasks: groups.segments}
        if len(parameters.rows) < len(self.tasks):
            for number, task in enumerate(self.tasks):
                self._loss_weights[task,] = factors[number : number + 1]
                # Weights and moments of the other tasks' heads do not change.
                self._segments[task,] = groups.segments_of(parameters.columns_used_by(task))
        self._lr = torch.zeros((), device=device)
        self._seed = torch.full((), self._first_seed, device=device)
        self._order_step = torch.zeros_like(self._seed)  # the seed holds the step's number
        self.execution = execution or Execution("eager", device)
        # Other exchanges read gradients during the backward pass.
        is_alone = type(self.sync) is NoSync
        self._gradient_queue = self.execution.gradient_queue if is_alone else None
        self.execution.keep_static(parameters.rows)
        self._losses_of = self.execution.compiled(self._losses)
        self._run = self.execution.recorded(self._on_device)

    @property
    def state(self) -> dict[str, Tensor]:
        """Further state of a checkpoint, besides weights and moments, by name."""
        state = {f"balance.{name}": tensor for name, tensor in self.balancer.state.items()}
        if self.loss_scale is not None:
            state |= {f"loss_scale.{name}": t for name, t in self.loss_scale.state.items()}
        return state

    @property
    def shared_state(self) -> dict[str, list[Tensor]]:
        """What all ranks have the same after a step, by what messages call it; it stays in place.

        Gradients and, of shards, masters and moments are each rank's own.
        """
        parameters, state = self.parameters, [self.optimizer.updates, *self.state.values()]
        return {
            "weights": [parameters.compute, *parameters.frozen_compute],
            "seed or step number": [self._seed, self._order_step],
            "learning rate": [self._lr],
            "state of optimizer, balancing or loss scale": state,
        }

    def __call__(
        self, batch: PackedBatch | Sequence[PackedBatch], step: int, lr: float
    ) -> StepReport:
        """Train on one batch.

        Args:
            batch: on the model's device, of all tasks or of the one that this step trains; or the
                micro-batches that it was split into to save memory.
            step: the step's number, from 0; with the seed it decides all randomness.
            lr: learning rate of this step.
        """
        self._lr.fill_(lr)
        self._seed.fill_(self._first_seed + step)
        return self._run((batch,) if isinstance(batch, PackedBatch) else batch)

    def forward_losses(self, micro_batches: Sequence[PackedBatch]) -> Tensor:
        """Return the first micro-batch's losses ``[K]``, computed eagerly, without a backward pass.

        Nothing of the training changes: masks are those that the seed gives the last step.
        """
        batch = micro_batches[0]
        totals = batch.step_terms or batch.terms
        return self._losses(batch, totals, self._seed_of(0), False, _NO_SCORES)

    def _on_device(self, micro_batches: Sequence[PackedBatch]) -> StepReport:
        """Run the step; all other inputs than the batches are tensors that stay in place."""
        losses = self._task_gradients(micro_batches)
        report = self._update(losses, micro_batches[0].tasks)
        for batch in micro_batches:
            self.model.zero_sparse_rows(batch)
        self.sync.gather_params()
        return report

    def _task_gradients(self, micro_batches: Sequence[PackedBatch]) -> Tensor:
        """Fill the K gradient rows by a forward and a backward pass of each micro-batch.

        Returns:
            ``[K]``, the share of these examples in the mean losses of the step.
        """
        self.parameters.clear_partial_gradients()
        factors = self._loss_weights[micro_batches[0].tasks]
        if self.loss_scale is not None:
            factors = factors * self.loss_scale.scale
        totals = micro_batches[0].step_terms or [
            sum(counts) for counts in zip(*(b.terms for b in micro_batches), strict=True)
        ]
        seeds = [self._seed_of(number) for number in range(len(micro_batches))]
        of_step: Sequence[Mapping[str, StepScores]] = [_NO_SCORES] * len(micro_batches)
        if len(micro_batches) > 1 and self._step_scores.needed(micro_batches):
            of_step = self._step_scores.compute(micro_batches, seeds, totals)
        losses: Tensor | None = None
        for number, batch in enumerate(micro_batches):
            if number == len(micro_batches) - 1:
                self.sync.start()
            own = self._losses_of(batch, totals, seeds[number], number > 0, of_step[number])
            # Each loss depends on its own task's tokens alone: one backward pass of the sum of all,
            # times their factors, gives all K gradients.
            with kernels.gradient_queue.queued(self.parameters.rows, self._gradient_queue):
                own.backward(factors)
            losses = own.detach() if losses is None else losses + own.detach()
        assert losses is not None  # there is a micro-batch
        self.sync.wait()
        return losses

    def _seed_of(self, number: int) -> Tensor:
        """Return the dropout seed of a micro-batch of this rank."""
        # Of rank 0 and the first micro-batch as it is: each operation is a launch.
        seed = self._seed ^ self._of_rank if self._of_rank else self._seed
        return seed + (number << _MICRO_BATCH_BIT) if number else seed

    def _losses(
        self,
        batch: PackedBatch,
        totals: Sequence[int],
        seed: Tensor,
        accumulate: bool,
        of_step: Mapping[str, StepScores],
    ) -> Tensor:
        """Return ``[K]``, a batch's share in the mean losses of ``totals`` terms a task."""
        scores = self.model(batch, batch.tasks, seed=seed, task_rows=True, accumulate=accumulate)
        if not of_step and self._step_scores.needed((batch,)):
            (of_step,) = self._step_scores.gather((batch,), (scores,), totals)
        means = self.model.losses(scores, batch, batch.tasks, of_step)
        return torch.stack(
            [
                mean
                if here == total or (here and task in of_step)
                else mean * (here / total if here else 0.0)
                for task, mean, here, total in zip(
                    batch.tasks, means, batch.terms, totals, strict=True
                )
            ]
        )

    def _update(self, losses: Tensor, tasks: tuple[str, ...]) -> StepReport:
        """Balance the task gradients and update the weights."""
        partitions = [self.groups, *([] if self.watched is None else [self.watched])]
        own_grams = [groups.grams(self.parameters.own.rows) for groups in partitions]
        losses, (scaled_grams, *watched) = self.sync.total(losses, own_grams)
        scale = None if self.loss_scale is None else self.loss_scale.scale
        grams = scaled_grams if scale is None else scaled_grams / scale.square()
        order = kernels.draw_order(len(tasks), self._seed, self._order_step)
        # Of the losses whose gradients they are; each operation is a launch.
        weighted = losses * self._loss_weights[tasks] if self._weighs_losses else losses
        weights = self.balancer(grams, order, weighted, self._seed)
        summary = kernels.update_summary(
            scaled_grams,
            weights,
            losses,
            self.groups.shares,
            max_norm=self.clip_norm,
            loss_scale=scale,
        )
        if self.loss_scale is not None:
            self.loss_scale.update(summary.skip)
        self.optimizer.step(
            weights, self._segments[tasks], lr=self._lr, scale=summary.scale, skip=summary.skip
        )
        if self.average is not None:
            self.average.update(self.parameters.master, self.optimizer.updates, summary.skip)
        return StepReport(
            losses,
            summary.gram,
            summary.weights,
            summary.norm,
            summary.skipped,
            tasks,
            watched[0] if watched else None,
        )
