"""Every public layer as a function of one stream, for tests that hold all to the same rules."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Columns, EmbeddingRows, LookupPlan, TaskRows, TaskSegments

WIDTH, HEADS, TABLE_ROWS = 64, 2, 50


class Stream(NamedTuple):
    """A batch, the parameters of all layers, and where two tasks' gradients go."""

    x: Tensor  # [T, 3 * WIDTH]
    ids: Tensor  # [T]
    cu_seqlens: Tensor
    longest: int
    seed: Tensor
    segments: TaskSegments
    weight: Tensor  # [WIDTH]
    bias: Tensor  # [WIDTH]
    matrix: Tensor  # [WIDTH, WIDTH]
    table: Tensor  # [TABLE_ROWS, WIDTH]
    buffer: Tensor  # [2, P], the gradient rows of all layers
    columns: tuple[Columns, ...]
    planned: Tensor  # the data of a plan of the table's lookups

    @classmethod
    def of(cls, tokens: int, device: str = "cpu") -> "Stream":
        """Two sequences, one of each task, and a row behind them that belongs to nobody."""
        half = tokens // 2

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape).to(device).requires_grad_()

        weight, bias = leaf(WIDTH), leaf(WIDTH)
        matrix, table = leaf(WIDTH, WIDTH), leaf(TABLE_ROWS, WIDTH)
        shapes = [weight.shape, bias.shape, matrix.shape, bias.shape, table.shape]
        starts = accumulate((shape.numel() for shape in shapes), initial=0)
        *columns, of_table = map(Columns, starts, shapes)
        x = leaf(tokens, 3 * WIDTH)
        ids, offsets = torch.randint(0, TABLE_ROWS, (tokens,)), (0, half, tokens - 1)
        return cls(
            x=x,
            ids=ids.to(device),
            cu_seqlens=torch.tensor([0, half, tokens - 1], dtype=torch.int32, device=device),
            longest=half,
            seed=torch.tensor(5, device=device),
            segments=TaskSegments(offsets),
            weight=weight,
            bias=bias,
            matrix=matrix,
            table=table,
            buffer=torch.zeros(2, of_table.stop, device=device),
            columns=(*columns, of_table),
            planned=kernels.plan_lookups([ids], [of_table], offsets).data.to(device),
        )

    @property
    def vector_rows(self) -> TaskRows:
        """Of a layer norm."""
        return TaskRows(self.buffer, *self.columns[:2])

    @property
    def biased_rows(self) -> TaskRows:
        """Of a layer norm that adds a bias to its input."""
        return TaskRows(self.buffer, *self.columns[:2], self.columns[3])

    @property
    def matrix_rows(self) -> TaskRows:
        """Of a linear layer."""
        return TaskRows(self.buffer, *self.columns[2:4])

    @property
    def table_rows(self) -> TaskRows:
        """Of an embedding."""
        return TaskRows(self.buffer, self.columns[4])

    @property
    def plan(self) -> LookupPlan:
        """Of the lookups in the table."""
        return LookupPlan(self.planned, self.columns[4:])

    def to(self, device: str, dtype: torch.dtype | None = None) -> "Stream":
        """The same stream on another device, or of another dtype."""
        parts = (
            part.detach().to(device, dtype if part.is_floating_point() else None)
            if isinstance(part, Tensor)
            else part
            for part in self
        )
        stream = Stream(*parts)
        for leaf in (stream.x, stream.weight, stream.bias, stream.matrix, stream.table):
            leaf.requires_grad_()
        return stream

    @property
    def own(self) -> Tensor:
        """A strided part of x, ``[T, WIDTH]``."""
        return self.x[:, :WIDTH]

    @property
    def other(self) -> Tensor:
        """Another one."""
        return self.x[:, WIDTH : 2 * WIDTH]

    def run(self, layer: Callable[["Stream"], Tensor]) -> list[Tensor]:
        """Output, gradients of all leaves, and the rows."""
        self.buffer.zero_()
        leaves = [self.x, self.weight, self.bias, self.matrix, self.table]
        out = layer(self)
        grads = torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)
        return [out.detach(), *(g for g in grads if g is not None), self.buffer.clone()]


def _attention(s: Stream) -> Tensor:
    q, k, v = s.x.view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
    sizes = (s.cu_seqlens, s.cu_seqlens, s.longest, s.longest)
    return kernels.flash_attn_varlen_func(q, k, v, *sizes, 0.1, seed=s.seed)


def _attention_packed(s: Stream) -> Tensor:
    qkv = s.x.view(-1, 3, HEADS, WIDTH // HEADS)
    return kernels.flash_attn_varlen_qkvpacked_func(
        qkv, s.cu_seqlens, s.longest, 0.1, seed=s.seed, rng_offset=1
    )


def _rotary(s: Stream) -> Tensor:
    x, tables = s.own.view(-1, HEADS, WIDTH // HEADS), _rotary_tables(s)
    return kernels.apply_rotary_emb(x, *tables, cu_seqlens=s.cu_seqlens)


def _rotary_packed(s: Stream) -> Tensor:
    qkv = (2 * s.x).view(-1, 3, HEADS, WIDTH // HEADS)  # a leaf must not be overwritten
    return kernels.apply_rotary_emb_qkv_(qkv, *_rotary_tables(s), cu_seqlens=s.cu_seqlens)


def _rotary_tables(s: Stream) -> tuple[Tensor, Tensor]:
    return kernels.rotary_tables(len(s.x), WIDTH // HEADS, device=s.x.device)


def _add_norm(s: Stream, **options: object) -> Tensor:
    options |= {"dropout_p": 0.1, "seed": s.seed, "x_bias": s.bias}
    return kernels.dropout_add_layer_norm(s.own, s.other, s.weight, s.bias, **options)


def _prenorm(s: Stream, **options: object) -> Tensor:
    options |= {"dropout_p": 0.1, "seed": s.seed, "x_bias": s.bias, "prenorm": True}
    normed, summed = kernels.dropout_add_rms_norm(s.own, s.other, s.weight, None, **options)
    return normed + summed


def _embedding_norm(s: Stream, **options: object) -> Tensor:
    ids, tables = (s.ids, s.ids, s.ids), (s.table, s.table, s.table)
    options |= {"dropout_p": 0.1, "seed": s.seed}
    return kernels.embedding_layer_norm(*ids, *tables, s.weight, s.bias, **options)


def _embedding_rows(s: Stream) -> EmbeddingRows:
    return EmbeddingRows(s.table_rows, s.table_rows, s.table_rows, s.vector_rows)


def _halves(s: Stream) -> Tensor:
    return s.x[:, : 2 * WIDTH]


LAYERS: dict[str, Callable[[Stream], Tensor]] = {
    "flash_attn_varlen_func": _attention,
    "flash_attn_varlen_qkvpacked_func": _attention_packed,
    "dropout": lambda s: kernels.dropout(s.own, 0.1, seed=s.seed),
    "geglu": lambda s: kernels.geglu(_halves(s), dropout_p=0.1, seed=s.seed),
    "swiglu": lambda s: kernels.swiglu(_halves(s), dropout_p=0.1, seed=s.seed),
    "layer_norm": lambda s: kernels.layer_norm(s.own, s.weight, s.bias),
    "layer_norm by task": lambda s: kernels.layer_norm(
        s.own, s.weight, s.bias, rows=s.vector_rows, segments=s.segments
    ),
    "rms_norm": lambda s: kernels.rms_norm(s.own, s.weight),
    "layer_norm_fn": lambda s: kernels.layer_norm_fn(s.own, s.weight, s.bias, s.other),
    "dropout_add_layer_norm": _add_norm,
    "dropout_add_layer_norm by task": lambda s: _add_norm(
        s, rows=s.biased_rows, segments=s.segments
    ),
    "dropout_add_rms_norm": _prenorm,
    "dropout_add_rms_norm by task": lambda s: _prenorm(
        s, rows=s.biased_rows._replace(bias_columns=None), segments=s.segments
    ),
    "embedding_layer_norm": _embedding_norm,
    "embedding_layer_norm by task": lambda s: _embedding_norm(
        s, rows=_embedding_rows(s), segments=s.segments
    ),
    "embedding": lambda s: kernels.embedding(s.ids, s.table),
    "embedding by task": lambda s: kernels.embedding(
        s.ids, s.table, rows=s.table_rows, segments=s.segments
    ),
    "embedding by task and plan": lambda s: kernels.embedding(
        s.ids, s.table, rows=s.table_rows, segments=s.segments, plan=s.plan
    ),
    "apply_rotary_emb": _rotary,
    "apply_rotary_emb_qkv_": _rotary_packed,
    "take_rows": lambda s: kernels.take_rows(s.own, s.cu_seqlens[:-1].long()),
    "linear": lambda s: kernels.linear(s.own, s.matrix, s.bias),
    "linear by task": lambda s: kernels.linear(
        s.own, s.matrix, s.bias, rows=s.matrix_rows, segments=s.segments
    ),
    # Divided, so that two derivatives of its third power are near one; not x, which may be freed.
    "feed_forward": lambda s: kernels.feed_forward(s.own, s.matrix, s.bias, s.table) / 64,
    "feed_forward by task": lambda s: kernels.feed_forward(
        *(s.own, s.matrix, s.bias, s.table),
        up_rows=s.matrix_rows,
        down_rows=s.table_rows,
        segments=s.segments,
    ),
}
