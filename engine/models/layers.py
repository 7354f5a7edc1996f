"""The three kinds of parameter user a BERT has, each able to write task gradients.

A module here is an ordinary layer until :class:`~engine.gradients.flat_parameters.FlatParameters`
gives it ``rows``, its views of the ``[K, P]`` gradient buffer, and a forward pass names the
``segments``, which stream rows belong to which task.  Without segments (evaluation) it is an
ordinary layer again.
"""

import torch
from torch import Tensor, nn

from .._kernels import kernels


class Linear(nn.Module):
    """``y = x W^T + b``; weights ~ N(0, ``init_std``), bias 0."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(0, init_std))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.rows: kernels.TaskRows | None = None

    def forward(self, x: Tensor, segments: kernels.TaskSegments | None = None) -> Tensor:
        """Map ``[T, I]`` to ``[T, O]``."""
        rows = self.rows if segments is not None else None
        return kernels.linear(x, self.weight, self.bias, rows=rows, segments=segments)


class Embedding(nn.Module):
    """A table ``[N, H]`` looked up by index; entries ~ N(0, ``init_std``)."""

    def __init__(self, num_embeddings: int, width: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width).normal_(0, init_std))
        self.rows: kernels.TaskRows | None = None

    def forward(self, index: Tensor, segments: kernels.TaskSegments | None = None) -> Tensor:
        """Map ``[T]`` int64 to ``[T, H]``."""
        rows = self.rows if segments is not None else None
        return kernels.embedding(index, self.weight, rows=rows, segments=segments)

    def wipe_rows(self, index: Tensor, offsets: tuple[int, ...]) -> None:
        """Zero the gradient rows that a backward pass over ``index`` has touched."""
        rows = None if self.rows is None else self.rows.weight
        if rows is not None:
            kernels.wipe_(rows, index, offsets)


class LayerNorm(nn.Module):
    """``LN(x)``, or BERT's post-norm ``LN(residual + dropout(x))`` in one pass."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.rows: kernels.TaskRows | None = None

    def forward(self, x: Tensor, segments: kernels.TaskSegments | None = None) -> Tensor:
        """Normalise the rows of ``x [T, H]``."""
        rows = self.rows if segments is not None else None
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, rows=rows, segments=segments)

    def add(
        self,
        x: Tensor,
        residual: Tensor,
        *,
        dropout_p: float,
        seed: Tensor | None,
        stream: int,
        segments: kernels.TaskSegments | None = None,
    ) -> Tensor:
        """Normalise ``residual + dropout(x)``, both ``[T, H]``; ``stream`` is the dropout site."""
        rows = self.rows if segments is not None else None
        out = kernels.dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout_p,
            self.eps,
            training=self.training,
            seed=seed,
            stream=stream,
            rows=rows,
            segments=segments,
        )
        assert isinstance(out, Tensor)
        return out
