"""Gather the scores of a whole step for heads that compare its examples with each other.

See :mod:`~engine.models.step_scores` for why.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.collate import PackedBatch
from ..data.task_batch import TextIds
from ..distributed.gradient_sync import NoSync
from ..models.heads import Scores
from ..models.multitask import MultitaskModel
from ..models.step_scores import StepScores


class StepScoresGatherer:
    """Gathers the scores of those tasks whose loss compares examples.

    Args:
        model: the model.
        tasks: the trained tasks.
        sync: exchanges rows with other ranks.
    """

    def __init__(self, model: MultitaskModel, tasks: Sequence[str], sync: NoSync) -> None:
        self._model, self._sync = model, sync
        self._comparing = frozenset(task for task in tasks if model.head(task).compares)

    def needed(self, micro_batches: Sequence[PackedBatch]) -> bool:
        """Return whether a batch is only a part of the examples that are to be compared."""
        is_part = len(micro_batches) > 1 or self._sync.ranks > 1
        return is_part and not self._comparing.isdisjoint(micro_batches[0].tasks)

    def compute(
        self, micro_batches: Sequence[PackedBatch], seeds: Sequence[Tensor], totals: Sequence[int]
    ) -> list[Mapping[str, StepScores]]:
        """Compute the scores of all micro-batches, without gradients, and gather them.

        Args:
            micro_batches: of this rank.
            seeds: the dropout seed of each, for the same masks as in the passes with gradients.
            totals: the examples of each task in the step, on all ranks.

        Returns:
            For each micro-batch the scores of the step.
        """
        with torch.no_grad():
            scores = [
                self._model(batch, batch.tasks, seed=seed)
                for batch, seed in zip(micro_batches, seeds, strict=True)
            ]
        return self.gather(micro_batches, scores, totals)

    def gather(
        self,
        micro_batches: Sequence[PackedBatch],
        scores: Sequence[Sequence[Scores]],
        totals: Sequence[int],
    ) -> list[Mapping[str, StepScores]]:
        """Gather scores that were computed; otherwise as :meth:`compute`."""
        found: list[dict[str, StepScores]] = [{} for _ in micro_batches]
        for number, task in enumerate(micro_batches[0].tasks):
            if task not in self._comparing:
                continue
            labels = [batch.labels[number] for batch in micro_batches]
            # Of a rank without an example neither has rows.
            of_task = [each[number] for each in scores]
            own = [x.detach() for x in of_task if isinstance(x, Tensor) and len(x)]
            ids = [each.ids for each in labels if isinstance(each, TextIds)]
            whole, all_ids = self._of_all_ranks(task, own, ids, totals[number])
            start = self._sync.rank * self._rows(totals[number])
            for batch, of_batch in zip(micro_batches, found, strict=True):
                of_batch[task] = StepScores(whole, all_ids, start)
                start += batch.examples[number]
        return [*found]

    def _rows(self, total: int) -> int:
        """Return the most examples that a rank has of so many."""
        return -(-total // self._sync.ranks)

    def _of_all_ranks(
        self, task: str, own: Sequence[Tensor], ids: Sequence[Tensor], total: int
    ) -> tuple[Tensor, Tensor]:
        """Return scores and text ids of all ranks, whose rows are filled up to equally many."""
        rows = self._rows(total)
        shape = self._model.head(task).shape_of_scores
        device = self._model.encoder.word_table.weight.device
        filled = torch.zeros(rows, *shape, device=device)
        filled_ids = torch.full((rows, shape[0]), -1, device=device)
        if own:
            scores = torch.cat([*own])
            missing = rows - len(scores)
            filled = F.pad(scores, (0, 0) * len(shape) + (0, missing))
            filled_ids = F.pad(torch.cat([*ids]), (0, 0, 0, missing), value=-1)
        return self._sync.gather_rows(filled), self._sync.gather_rows(filled_ids)
