"""The interface of an encoder.  Each encoder has a file of its own, such as engine/models/bert.py.

An encoder is a sequence of stages.  The first one embeds the tokens, the others map hidden states
to hidden states.  Layer-wise balancing, the exchange of gradients, activation checkpointing and
reports work stage by stage.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._kernels import kernels
from .config import EncoderConfig
from .context import Context
from .layers import Embedding, GradientWrite, TaskLayer


class Stage(NamedTuple):
    """A module whose gradients a backward pass completes together.

    Attributes:
        name: the module's name in the model, in checkpoints and in reports.
        module: in an encoder, called ``module(x, context)``.
        task: the one task that it belongs to; None for a stage that tasks share.
        bucket: the name of the bucket that its gradients are sent in; empty for its own.
    """

    name: str
    module: nn.Module
    task: str | None = None
    bucket: str = ""


class Projection(NamedTuple):
    """Where each layer of an encoder computes a projection that low-rank updates can be of.

    Attributes:
        layer: the name of the linear layer in its stage.
        part: which of the equal parts that the layer's outputs are divided into; from 0.
        parts: their number.
    """

    layer: str
    part: int = 0
    parts: int = 1


class Encoder(nn.Module):
    """Token ids to hidden states ``[T, H]``.

    Args:
        config: shape and constants; the dropout rates act in training mode only.

    Attributes:
        checkpoint_layers: in training, keep only the input of each stage and compute its
            activations again in the backward pass.
        projections: those of its layers, by the names of recipes (engine/models/lora.py); an
            encoder without them has no low-rank updates.
        planned: the tables whose lookups are planned (:meth:`choose_planned`).
    """

    projections: ClassVar[Mapping[str, Projection]] = MappingProxyType({})

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.planned: tuple[Embedding, ...] = ()

    def stages(self) -> Sequence[Stage]:
        """Return the stages in the order of the forward pass; every parameter is in one of them."""
        raise NotImplementedError

    @property
    def word_table(self) -> Embedding:
        """The table of words, to which the decoder of masked LM is tied."""
        raise NotImplementedError

    @property
    def num_dropouts(self) -> int:
        """Number of dropouts; the ids of the heads' dropouts follow theirs."""
        raise NotImplementedError

    def lookups(self, input_ids: Tensor, context: Context) -> Iterable[tuple[Embedding, Tensor]]:
        """Return every table, and the entries ``[T]`` int64 that a forward pass looks up in it.

        Entry t is what token t looks up: the backward pass adds the token's gradient there.  It is
        called with tensors on the CPU, too, by the thread that prepares batches for a GPU.
        """
        raise NotImplementedError

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        """Encode a token stream.

        Args:
            input_ids: ``[T]`` int64.
            context: of these tokens.

        Returns:
            Hidden states ``[T, H]`` in the dtype of the weights.
        """
        first, *others = self.stages()
        hidden: Tensor = first.module(input_ids, context)
        for stage in others:
            if self.checkpoint_layers and self.training:
                # Dropout depends on the seed alone: there is no generator's state to keep.
                hidden = checkpoint(
                    stage.module, hidden, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = stage.module(hidden, context)
        return hidden

    def check_lookups(self) -> None:
        """Check that :meth:`lookups` returns every table.

        Raises:
            TypeError: one is left out.
        """
        returned = set(self._tables())
        for name, layer in self.named_modules():
            is_table = isinstance(layer, TaskLayer) and layer.gradient_write is GradientWrite.SPARSE
            if is_table and layer not in returned:
                raise TypeError(
                    f"{type(self).__name__}.lookups leaves out {name}, whose gradient rows would "
                    "never be zeroed; yield it with the entries that a forward pass looks up"
                )

    def _tables(self) -> list[Embedding]:
        """Return the table of each lookup."""
        device = self.word_table.weight.device
        token = torch.zeros(1, dtype=torch.int64, device=device)
        context = Context(
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
            max_seqlen=1,
            position_ids=token,
            token_type_ids=token,
        )
        return [table for table, _ in self.lookups(token, context)]

    def choose_planned(self) -> None:
        """Choose the tables whose lookups are planned: all that gradient rows are attached to.

        It is none where a table is looked up twice or widths differ: a backward pass then finds the
        order of the lookups itself.
        """
        tables = [table for table in self._tables() if table.columns is not None]
        is_simple = len(set(tables)) == len(tables)
        one_width = len({table.weight.shape[1] for table in tables}) == 1
        self.planned = tuple(tables) if is_simple and one_width else ()

    def plan_lookups(
        self, input_ids: Tensor, context: Context, offsets: tuple[int, ...]
    ) -> Tensor | None:
        """Return the data of a plan of a batch's lookups, on the CPU; None if none are planned.

        Args:
            input_ids: ``[T]`` int64, on the CPU.
            context: of these tokens, on the CPU.
            offsets: ``K + 1`` token numbers, where tasks begin.

        Raises:
            ValueError: a token looks up what no table has.
        """
        if not self.planned:
            return None
        entries = dict(self.lookups(input_ids, context))
        indices = [entries[table] for table in self.planned]
        return kernels.plan_lookups(indices, self._planned_columns, offsets).data

    def lookup_plan(self, data: Tensor | None) -> kernels.LookupPlan | None:
        """Return the plan of a batch from what :meth:`plan_lookups` returned."""
        return None if data is None else kernels.LookupPlan(data, self._planned_columns)

    @property
    def _planned_columns(self) -> tuple[kernels.Columns, ...]:
        return tuple(table.columns for table in self.planned if table.columns is not None)

    def zero_sparse_rows(
        self, input_ids: Tensor, context: Context, offsets: tuple[int, ...]
    ) -> None:
        """Zero the task gradients of tables that this batch's backward pass wrote.

        Args:
            input_ids: ``[T]`` int64.
            context: of these tokens.
            offsets: ``K + 1`` token numbers, where tasks begin.
        """
        plan = context.lookup_plan
        if plan is not None and (rows := self.planned[0].rows) is not None:
            kernels.zero_planned_rows_(rows.buffer, plan, offsets)
            return
        for table, index in self.lookups(input_ids, context):
            table.zero_rows(index, offsets)
