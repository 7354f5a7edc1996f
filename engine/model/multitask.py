"""One encoder, a head for each task."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ..data.formats import FileFormat
from ..data.pack import PackedBatch
from ..rooms import kernels
from .adapters import AdaptersOfBatch, ProjectedAttention
from .config import EncoderConfig
from .encoder import Encoder
from .heads import SHARED_INPUT, Head, HeadSettings, Scores, build_head, head_class
from .layers import Linear
from .named_modules import NamedModules
from .states import SharedLayers, TaskStates, pool

_ONE_TASKS = ("heads", "adapters")


class MultitaskModel(nn.Module):
    """A BERT shared by several tasks.

    Args:
        config: the encoder's shape.
        tasks: in order, what each predicts.
        features: by task, see :mod:`engine.model.heads`.
        pooling: ``"cls"`` or ``"mean"``.
        dropout_p: dropout before the heads.
        losses: by task, one of LOSSES (engine/model/heads); the default for those left out.
        adapter_width: of each task's projected attention (engine/model/adapters.py); 0 for none.
        objectives: by name, what their heads are built from; they have no adapters.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tasks: Sequence[FileFormat],
        features: Mapping[str, str],
        *,
        pooling: str,
        dropout_p: float,
        losses: Mapping[str, str] | None = None,
        adapter_width: int = 0,
        objectives: Mapping[str, HeadSettings] | None = None,
    ) -> None:
        super().__init__()
        # The order in which weights are drawn, and so the order of what follows, never changes.
        of_objectives = {name: build_head(each) for name, each in (objectives or {}).items()}
        self.encoder = Encoder(config)
        self.pooling = pooling
        width, losses = config.hidden_size, losses or {}
        of_tasks = {
            task.task: HeadSettings(
                kind=task.kind,
                name=task.task,
                config=config,
                task=task,
                features=features[task.task],
                loss=losses.get(task.task, "default"),
                dropout_p=dropout_p,
                site=self.encoder.num_sites + position,
            )
            for position, task in enumerate(tasks)
        }
        all_heads = (*of_tasks.values(), *(objectives or {}).values())
        shares = any("pair" in head_class(each.kind).layers_used(each) for each in all_heads)
        self.pair = Linear(SHARED_INPUT * width, width) if shares else None
        self.heads = NamedModules()
        self.heads.update({name: build_head(each) for name, each in of_tasks.items()})
        self.adapters = NamedModules()
        if adapter_width:
            first_site = self.encoder.num_sites + len(tasks)
            for position, name in enumerate(self.heads):
                self.adapters[name] = ProjectedAttention(
                    config,
                    adapter_width,
                    first_site=first_site + position * config.num_hidden_layers,
                )
        self.heads.update(of_objectives)

    def head(self, name: str) -> Head:
        """Return the head of a task or objective."""
        return cast(Head, self.heads[name])

    @property
    def task_heads(self) -> dict[str, Head]:
        """The heads of the tasks, without those of objectives."""
        return {name: self.head(name) for name in self.heads if self.head(name).is_scored}

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
            return tuple(task for task in tasks if "pair" in self.head(task).uses)
        return tuple(tasks)

    def writes_once(self, parameter: str, tasks: Iterable[str]) -> bool:
        """Return whether a backward pass overwrites a parameter's rows, or its end wipes them.

        To other rows (those of heads, of layers that some tasks share, of a word table that is
        decoded with) it adds, so they have to be cleared before.
        """
        if parameter == "encoder.embeddings.word.weight":
            return not any("word" in self.head(task).uses for task in tasks)
        return parameter.startswith("encoder.")

    def forward(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        *,
        seed: Tensor | None = None,
        task_rows: bool = False,
        accumulate: bool = False,
    ) -> list[Scores]:
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
        scores: list[Scores] = []
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
        self, scores: Sequence[Scores], batch: PackedBatch, tasks: Sequence[str]
    ) -> list[Tensor]:
        """Return each task's mean loss, 0-dim, from what :meth:`forward` returned.

        That of a task without an example is 0.

        Raises:
            ValueError: the batch has no labels of a task.
        """
        return [
            own.sum()
            if isinstance(own, Tensor) and not own.numel()
            else self.head(task).loss(own, labels)
            for task, own, labels in zip(tasks, scores, batch.labels, strict=True)
        ]
