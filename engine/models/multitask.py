"""One encoder, a head for each task."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from .._kernels import kernels
from ..data.collate import PackedBatch
from ..data.task_schema import TaskSchema
from .adapters import AdaptersOfBatch, ProjectedAttention
from .bert import Encoder
from .config import EncoderConfig
from .features import SHARED_INPUT
from .heads import Head, TaskHead
from .layers import Linear
from .named_modules import NamedModules
from .pooling import SharedLayers, TaskStates, pool

_ONE_TASKS = ("heads", "adapters")


class MultitaskModel(nn.Module):
    """A BERT shared by several tasks.

    Args:
        config: the encoder's shape.
        tasks: in order, what each predicts.
        features: by task, see :mod:`engine.models.heads`.
        pooling: ``"cls"`` or ``"mean"``.
        dropout_p: dropout before the heads.
        losses: by task, see :class:`~engine.models.heads.TaskHead`; the default for those left out.
        adapter_width: of each task's projected attention (engine/models/adapters.py); 0 for none.
        objectives: heads of objectives by name, each with the interface of a
            :class:`~engine.models.heads.Head`; they have no adapters.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tasks: Sequence[TaskSchema],
        features: Mapping[str, str],
        *,
        pooling: str,
        dropout_p: float,
        losses: Mapping[str, str] | None = None,
        adapter_width: int = 0,
        objectives: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.pooling = pooling
        width, losses = config.hidden_size, losses or {}
        self._sharing = {task for task, features_ in features.items() if features_ == "shared"}
        self.pair = Linear(SHARED_INPUT * width, width) if self._sharing else None
        self.heads = NamedModules()
        for position, task in enumerate(tasks):
            self.heads[task.task] = TaskHead(
                task,
                features[task.task],
                width,
                dropout_p=dropout_p,
                site=self.encoder.num_sites + position,
                loss=losses.get(task.task, "default"),
            )
        self.adapters = NamedModules()
        if adapter_width:
            first_site = self.encoder.num_sites + len(tasks)
            for position, name in enumerate(self.heads):
                self.adapters[name] = ProjectedAttention(
                    config,
                    adapter_width,
                    first_site=first_site + position * config.num_hidden_layers,
                )
        self.heads.update(objectives or {})

    def head(self, task: str) -> TaskHead:
        """Return the head of ``task``."""
        head = self.heads[task]
        assert isinstance(head, TaskHead)
        return head

    @property
    def task_heads(self) -> dict[str, TaskHead]:
        """The heads of the tasks, without those of objectives."""
        return {name: head for name, head in self.heads.items() if isinstance(head, TaskHead)}

    def _adapter(self, task: str) -> ProjectedAttention | None:
        return cast(ProjectedAttention, self.adapters[task]) if task in self.adapters else None

    def owner(self, parameter: str) -> str | None:
        """Return the one task that a parameter belongs to, or None for one that is shared."""
        room, *path = parameter.split(".")
        return path[0] if room in _ONE_TASKS else None

    def reached_by(self, parameter: str, tasks: Iterable[str]) -> tuple[str, ...]:
        """Return those among ``tasks`` whose losses reach a parameter, in their order."""
        owner = self.owner(parameter)
        if owner is not None:
            return tuple(task for task in tasks if task == owner)
        if parameter.startswith("pair."):
            return tuple(task for task in tasks if task in self._sharing)
        return tuple(tasks)

    def writes_once(self, parameter: str, tasks: Iterable[str]) -> bool:
        """Return whether a backward pass overwrites a parameter's rows, or its end wipes them.

        To other rows (those of heads, of layers that some tasks share, of a word table that is
        decoded with) it adds, so they have to be cleared before.
        """
        if parameter == "encoder.embeddings.word.weight":
            return not any(cast(Head, self.heads[task]).decodes_words for task in tasks)
        return parameter.startswith("encoder.")

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
        hidden = self._encode(batch, tasks, seed, task_rows, accumulate)
        pooled = pool(hidden, batch.cu_seqlens, self.pooling)
        shared = SharedLayers(self.encoder.embeddings.word, self.pair)
        scores = []
        for row, (task, tokens, sequences, cu_seqlens) in enumerate(
            zip(
                tasks,
                pairwise(batch.token_offsets),
                batch.own_sequences(),
                batch.task_cu_seqlens(),
                strict=True,
            )
        ):
            states = TaskStates(
                hidden[slice(*tokens)],
                pooled[sequences],
                cu_seqlens,
                batch.max_own_seqlen,
                batch.labels[row],
                seed,
                shared,
                row if task_rows else None,
                len(tasks),
            )
            here = tokens[0] < tokens[1]  # another rank may have all of its examples
            scores.append(self.heads[task](states) if here else hidden.new_zeros(0).float())
        return scores

    def _encode(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        seed: Tensor | None,
        task_rows: bool,
        accumulate: bool,
    ) -> Tensor:
        """Return the hidden states ``[T, H]`` of a batch, or those that it brings along."""
        if batch.states is not None:
            return batch.states.to(self.encoder.embeddings.word.weight.dtype)
        segments = kernels.TaskSegments(batch.token_offsets, accumulate) if task_rows else None
        adapters = None
        of_tasks = [self._adapter(task) for task in tasks]
        if any(adapter is not None for adapter in of_tasks):
            adapters = AdaptersOfBatch(of_tasks, batch, seed)
        return self.encoder(batch, segments, seed, adapters)

    def losses(
        self, scores: Sequence[Tensor], batch: PackedBatch, tasks: Sequence[str]
    ) -> list[Tensor]:
        """Return each task's mean loss, 0-dim, from what :meth:`forward` returned.

        That of a task without an example is 0.

        Raises:
            ValueError: the batch has no labels of a task.
        """
        heads = [cast(Head, self.heads[task]) for task in tasks]
        return [
            head.loss(own, labels) if own.numel() else own.sum()
            for head, own, labels in zip(heads, scores, batch.labels, strict=True)
        ]
