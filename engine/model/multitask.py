"""One encoder, a head for each task."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..data.formats import FileFormat
from ..data.pack import PackedBatch
from ..rooms import kernels
from .config import EncoderConfig
from .encoder import Encoder
from .heads import TaskHead, pool


class MultitaskModel(nn.Module):
    """A BERT shared by several tasks.

    Args:
        config: the encoder's shape.
        tasks: in order, what each predicts.
        features: by task, see :mod:`engine.model.heads`.
        pooling: ``"cls"`` or ``"mean"``.
        dropout_p: dropout before the heads.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tasks: Sequence[FileFormat],
        features: Mapping[str, str],
        *,
        pooling: str,
        dropout_p: float,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.pooling = pooling
        self.heads = nn.ModuleDict()
        for position, task in enumerate(tasks):
            self.heads[task.task] = TaskHead(
                task,
                features[task.task],
                config.hidden_size,
                dropout_p=dropout_p,
                site=self.encoder.num_sites + position,
            )

    def head(self, task: str) -> TaskHead:
        """Return the head of ``task``."""
        head = self.heads[task]
        assert isinstance(head, TaskHead)
        return head

    def forward(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        *,
        seed: Tensor | None = None,
        task_rows: bool = False,
        accumulate: bool = False,
    ) -> list[Tensor]:
        """Score a packed batch.

        Args:
            batch: its K tasks lie side by side in the stream.
            tasks: their names, in that order.
            seed: 0-dim int64, the dropout seed of this step; needed in training mode.
            task_rows: let the backward pass write task gradients into the attached rows.
            accumulate: let it add to them (later micro-batches).

        Returns:
            For each task the scores of its head, fp32.
        """
        segments = kernels.TaskSegments(batch.token_offsets, accumulate) if task_rows else None
        hidden = self.encoder(batch, segments, seed)
        pooled = pool(hidden, batch.cu_seqlens, self.pooling)
        scores = []
        for task, start, end, count in zip(
            tasks, batch.task_offsets[:-1], batch.task_offsets[1:], batch.examples, strict=True
        ):
            own = kernels.TaskSegments((0, count), accumulate) if task_rows else None
            scores.append(self.head(task)(pooled[start:end], own, seed))
        return scores

    def losses(
        self, scores: Sequence[Tensor], batch: PackedBatch, tasks: Sequence[str]
    ) -> list[Tensor]:
        """Return each task's mean loss, 0-dim, from what :meth:`forward` returned.

        Raises:
            ValueError: the batch has no labels of a task.
        """
        losses = []
        for task, task_scores, labels in zip(tasks, scores, batch.labels, strict=True):
            if labels is None:
                raise ValueError(f"batch.labels: None for task {task!r}, which is to be trained")
            losses.append(self.head(task).loss(task_scores, labels))
        return losses
