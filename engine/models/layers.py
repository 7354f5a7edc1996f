"""Layers that can write a gradient for each task: linear, embedding table, layer norm.

A layer writes task gradients if :meth:`TaskLayer.attach_rows` has given it its columns of the
``[K, P]`` gradient buffer, and the context of a forward pass has ``segments``, which say which rows
belong to which task.  Otherwise, as in evaluation, it is an ordinary layer.
"""

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._kernels import kernels
from .context import Context, RowContext


class GradientWrite(Enum):
    """Ways in which a backward pass writes task gradients into the gradient buffer."""

    OVERWRITTEN = "overwritten"
    """It overwrites all of them: nothing has to be zeroed."""
    ADDED = "added"
    """It adds to them, or may not reach them: they are zeroed before the step."""
    SPARSE = "sparse"
    """It adds to a few rows of a table: these are zeroed by index after the step."""


class TaskLayer(nn.Module):
    """A layer with a ``weight``, maybe a ``bias``, whose backward pass can write task gradients.

    Attributes:
        gradient_write: how it writes task gradients.
        rows: the rows that it writes them to; None for ordinary gradients.
    """

    gradient_write: ClassVar[GradientWrite] = GradientWrite.OVERWRITTEN
    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.rows: kernels.TaskRows | None = None

    def attach_rows(self, buffer: Tensor, columns: Mapping[str, kernels.Columns]) -> None:
        """Set the gradient buffer that task gradients are written to.

        Args:
            buffer: ``[K, P]``, in the dtype of the parameters.
            columns: of the trained parameters, by their names in this layer; without any the layer
                is an ordinary one.
        """
        self.rows = (
            kernels.TaskRows(buffer, columns.get("weight"), columns.get("bias"))
            if columns
            else None
        )

    def _target(
        self, context: RowContext | None
    ) -> tuple[kernels.TaskRows | None, kernels.TaskSegments | None]:
        """Return the rows that this pass writes task gradients to, and their segments."""
        segments = None if context is None else context.segments
        return (None if segments is None else self.rows), segments


class Linear(TaskLayer):
    """``y = x W^T + b``; weights ~ N(0, ``init_std``), bias 0.

    Attributes:
        lora: maps ``x`` and the context to what is added to the output, the low-rank updates of W
            (engine/models/lora.py); None for nothing.
    """

    lora: nn.Module | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(0, init_std))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
        else:
            self.register_parameter("bias", None)
        self.lora = None

    def forward(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Map ``[T, I]`` to ``[T, O]``."""
        rows, segments = self._target(context)
        out = kernels.linear(x, self.weight, self.bias, rows=rows, segments=segments)
        return out if self.lora is None else out + self.lora(x, context)

    def product(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Map ``[T, I]`` to ``x W^T [T, O]``, for a norm that adds the bias (`LayerNorm.add`)."""
        rows, segments = self._target(context)
        of_weight = None if rows is None else kernels.TaskRows(rows.buffer, rows.weight_columns)
        out = kernels.linear(x, self.weight, rows=of_weight, segments=segments)
        return out if self.lora is None else out + self.lora(x, context)


def feed_forward(up: Linear, down: Linear, x: Tensor, context: RowContext | None = None) -> Tensor:
    """Map ``[T, H]`` to ``gelu(up(x)) W^T [T, O]``, W of ``down``, whose bias a norm adds."""
    if up.lora is not None or down.lora is not None:
        return down.product(F.gelu(up(x, context)), context)
    up_rows, segments = up._target(context)
    down_rows, _ = down._target(context)
    of_weight = None if down_rows is None else down_rows._replace(bias_columns=None)
    weights = (up.weight, up.bias, down.weight)
    return kernels.feed_forward(
        x, *weights, up_rows=up_rows, down_rows=of_weight, segments=segments
    )


class Embedding(TaskLayer):
    """A table ``[N, H]`` looked up by index; entries ~ N(0, ``init_std``)."""

    gradient_write = GradientWrite.SPARSE

    def __init__(self, num_embeddings: int, width: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width).normal_(0, init_std))

    @property
    def columns(self) -> kernels.Columns | None:
        """The columns of its task gradients in the gradient buffer; None where it has none."""
        return None if self.rows is None else self.rows.weight_columns

    def forward(self, index: Tensor, context: RowContext | None = None) -> Tensor:
        """Map ``[T]`` int64 to ``[T, H]``."""
        rows, segments = self._target(context)
        plan = context.lookup_plan if rows and isinstance(context, Context) else None
        return kernels.embedding(index, self.weight, rows=rows, segments=segments, plan=plan)

    def decode(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Return the dot product with every entry: ``[m, H]`` to ``[m, N]``.

        The backward pass reaches the whole table, so a head that decodes declares that it uses the
        table (:class:`~engine.models.heads.Head`).
        """
        rows, segments = self._target(context)
        return kernels.linear(x, self.weight, rows=rows, segments=segments)

    def zero_rows(self, index: Tensor, offsets: tuple[int, ...]) -> None:
        """Zero the task gradients that a backward pass over ``index`` wrote; others are zero."""
        rows = None if self.rows is None else self.rows.weight
        if rows is None:
            return
        tasks, entries, _ = rows.shape
        if tasks * entries <= len(index):  # fewer writes, and one call
            rows.zero_()
        else:
            kernels.zero_rows_(rows, index, offsets)


class LayerNorm(TaskLayer):
    """``LN(x)``, or ``LN(residual + dropout(x))`` in one pass: BERT's post-norm, or a pre-norm."""

    def __init__(self, width: int, *, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        if bias:
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.register_parameter("bias", None)
        self.eps = eps

    def forward(self, x: Tensor, context: RowContext | None = None) -> Tensor:
        """Normalise the rows of ``x [T, H]``."""
        rows, segments = self._target(context)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, rows=rows, segments=segments)

    def add(
        self,
        x: Tensor,
        residual: Tensor,
        context: RowContext,
        *,
        dropout_p: float,
        rng_offset: int,
        bias_of: Linear | None = None,
    ) -> Tensor:
        """Normalise ``residual + dropout(x)``, both ``[T, H]``.

        Args:
            x: ``[T, H]``.
            residual: ``[T, H]``.
            context: of the tokens.
            dropout_p: probability to drop an element of ``x``, in training mode.
            rng_offset: the dropout's id.
            bias_of: the layer whose :meth:`Linear.product` is ``x``: its bias, where it has one, is
                added to ``x`` before the dropout.  The norm's backward pass, which holds the rows
                that the bias's gradients are sums of, writes these to the layer's columns.
        """
        out = self._add(x, residual, context, dropout_p, rng_offset, bias_of, prenorm=False)
        assert isinstance(out, Tensor)
        return out

    def add_prenorm(
        self,
        x: Tensor,
        residual: Tensor,
        context: RowContext,
        *,
        dropout_p: float,
        rng_offset: int,
        bias_of: Linear | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the norm as :meth:`add` does, and the sum before it, both ``[T, H]``."""
        out = self._add(x, residual, context, dropout_p, rng_offset, bias_of, prenorm=True)
        assert isinstance(out, tuple)
        return out

    def _add(
        self,
        x: Tensor,
        residual: Tensor,
        context: RowContext,
        dropout_p: float,
        rng_offset: int,
        bias_of: Linear | None,
        *,
        prenorm: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, segments = self._target(context)
        if bias_of is not None and segments is not None:
            rows = _with_bias(rows, bias_of.rows)
        return kernels.dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout_p,
            self.eps,
            prenorm=prenorm,
            x_bias=None if bias_of is None else bias_of.bias,
            training=self.training,
            seed=context.seed,
            rng_offset=rng_offset,
            rows=rows,
            segments=segments,
        )


def _with_bias(
    norm: kernels.TaskRows | None, linear: kernels.TaskRows | None
) -> kernels.TaskRows | None:
    """Return a norm's rows with those of a linear layer's bias; either may have none."""
    if linear is None or linear.bias_columns is None:
        return norm
    columns = (None, None) if norm is None else (norm.weight_columns, norm.bias_columns)
    return kernels.TaskRows(linear.buffer, *columns, linear.bias_columns)
