"""One training step: forward, one backward for K gradients, surgery, update.

Nothing here reads a value back from the device.  What a step needs from the host (rate, seed,
order of surgery) is written into tensors that stay in place, and what it reports stays a tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.pack import PackedBatch
from ..model.multitask import MultitaskModel
from ..rooms import kernels
from .balance import Balance
from .flat_parameters import FlatParameters
from .optimizer import AdamW
from .parts import Parts


class StepReport(NamedTuple):
    """What one step did, as fp32 tensors on its device.

    Attributes:
        losses: ``[K]``, each as its task defines it, unweighted.
        gram: ``[K, K]``, the dot products of the task gradients.
        weights: ``[K]``, by which they were combined; averaged over the parts of the parameters
            where surgery goes by layer or by tensor.
        grad_norm: 0-dim, of the combined gradient before clipping.
        skipped: 0-dim, 1 where a gradient was not finite and nothing was updated.
    """

    losses: Tensor
    gram: Tensor
    weights: Tensor
    grad_norm: Tensor
    skipped: Tensor


class MultitaskStep:
    """Trains a model by task gradients.

    Args:
        model: in training mode, its parameters held by ``parameters``.
        tasks: the K trained tasks, in the order of their rows.
        parameters: flat storage and gradient rows of ``model``.
        optimizer: updates ``parameters``.
        parts: what gets weights of its own.
        balance: from the Gram matrices of the parts to the weights of the sum.
        loss_weights: K factors on the losses, and so on the task gradients.
        clip_norm: largest norm of the combined gradient; None for no clipping.
        seed: decides dropout and the order of surgery, together with the step's number.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Sequence[str],
        parameters: FlatParameters,
        optimizer: AdamW,
        parts: Parts,
        balance: Balance,
        *,
        loss_weights: Sequence[float],
        clip_norm: float | None,
        seed: int,
    ) -> None:
        self.model, self.tasks, self.parameters = model, tuple(tasks), parameters
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.parts, self.balance = parts, balance
        self._first_seed = seed << 32
        device = parameters.master.device
        self._loss_weights = torch.tensor(loss_weights, device=device)
        self._lr = torch.zeros((), device=device)
        self._seed = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, batch: PackedBatch, step: int, lr: float) -> StepReport:
        """Train on one batch.

        Args:
            batch: a batch of each task, in the order of ``tasks``, on the model's device.
            step: the step's number, from 0; with the seed it decides all randomness.
            lr: learning rate of this step.
        """
        self._lr.fill_(lr)
        self._seed.fill_(self._first_seed + step)

        losses = self._task_gradients(batch)
        grams = self.parts.grams(self.parameters.rows)
        order = kernels.draw_order(len(self.tasks), self._seed)
        weights = self.balance(grams, order, losses)
        guard = kernels.update_guard(grams, weights, max_norm=self.clip_norm)
        self.optimizer.step(
            weights, self.parts.regions, lr=self._lr, scale=guard.scale, skip=guard.skip
        )
        self.model.encoder.embeddings.wipe_rows(batch, batch.token_offsets)
        return StepReport(
            losses, grams.sum(0), self.parts.average(weights), guard.norm, guard.skip.float()
        )

    def _task_gradients(self, batch: PackedBatch) -> Tensor:
        """Fill the K gradient rows by one forward and one backward pass; return the losses."""
        scores = self.model(batch, self.tasks, seed=self._seed, task_rows=True)
        losses = torch.stack(self.model.losses(scores, batch, self.tasks))
        # Each loss reaches its own part of the stream only, so their sum is all K at once.
        (losses * self._loss_weights).sum().backward()
        return losses.detach()
