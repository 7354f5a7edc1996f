"""BERT's embeddings in one pass: the sum of three table rows, layer norm, dropout.

    h_t = word[i_t] + position[p_t] + token_type[s_t]          i, p, s [T];  tables [N, H]
    xhat = (h - mean) rstd,  y = f (xhat weight + bias)        f: dropout factors

    dh as in `kernels.layer_norm`, from f dy
    dword_k[i] = sum of dh_t over the rows t of task k with i_t = i, and so for the other tables

Only y and the float32 statistics are kept; the backward pass computes h again, which reads no more
memory than a stored h.  With task rows it writes the K gradients of tables, weight and bias there.

The lookups of a table's padding row give no gradient.  In a gradient of this layer's own the row is
zeroed; task rows may hold a gradient of another layer there, as those of a word table do that a
decoder shares, so zeros are added to them instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension  # noqa: F401  (registers the operators)
from ..dropout.dropout import check_dropout, dropout, new_seed
from ..embedding.embedding import embedding, embedding_task_gradients_
from ..embedding.embedding_checks import check_embedded, check_padding
from ..embedding.lookup_plan import LookupPlan, add_planned_gradients_
from ..layer_norm.layer_norm import layer_norm
from ..layer_norm.layer_norm_checks import check_norm, check_norm_backward
from ..layer_norm.layer_norm_parameters import (
    check_parameter,
    parameter_gradients,
    parameter_rows,
    save,
)
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.deprecation import renamed_argument
from ..registration.differentiation import differentiable_once, refuse_vmap, register_derivative
from ..registration.validation import (
    DTYPES,
    are_checked,
    check_data,
    check_index,
    check_number,
    check_tensor,
)
from ..task_rows import NO_COLUMN, TaskRows, TaskSegments, rows_at

_ops = torch.ops.superbert


class EmbeddingRows(NamedTuple):
    """Task-gradient rows of an embedding layer; all in one buffer.

    Attributes:
        word: of the word table; zero before the first backward pass of a step, added to, and zeroed
            after use by `kernels.zero_rows_`.  So are the other tables.
        position: of the position table.
        token_type: of the table of token types.
        norm: of the layer norm's weight and bias.
    """

    word: TaskRows
    position: TaskRows
    token_type: TaskRows
    norm: TaskRows


PaddingRows = tuple[int | None, int | None, int | None]
"""Of words, positions and token types: the row whose lookups give no gradient; None for none."""

NO_ROW = -1
"""In the operator's argument: the table has no padding row."""


# ---- reference ----------------------------------------------------------------------------------


def embedding_layer_norm_reference(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: EmbeddingRows | None = None,
    segments: TaskSegments | None = None,
    plan: LookupPlan | None = None,
    padding: PaddingRows = (None, None, None),
) -> Tensor:
    """The sum and its norm by separate layers."""
    *table_rows, norm_rows = (None,) * 4 if rows is None else rows

    def looked_up(index: Tensor, table: Tensor, own: TaskRows | None, row: int | None) -> Tensor:
        planned = plan if own is not None and own.weight_columns else None
        out = embedding(index, table, rows=own, segments=segments, plan=planned)
        if row is None:
            return out
        return torch.where((index == row % len(table))[..., None], out.detach(), out)

    lookups = zip(ids, tables, table_rows, padding, strict=True)
    word, position, token_type = (looked_up(*lookup) for lookup in lookups)
    return layer_norm(
        word + position + token_type, weight, bias, eps, rows=norm_rows, segments=segments
    )


# ---- registration -------------------------------------------------------------------------------


def _forward_fake(
    word_ids: Tensor, _position_ids: Tensor, _token_type_ids: Tensor, word: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = word_ids.shape[0], word.shape[1]
    out = word.new_empty((tokens, width))
    mean, rstd = (word.new_empty((tokens,), dtype=torch.float32) for _ in range(2))
    return out, mean, rstd


def _backward_fake(
    _grad_out: Tensor,
    word_ids: Tensor,
    _position_ids: Tensor,
    _token_type_ids: Tensor,
    word: Tensor,
    *_: object,
) -> Tensor:
    return word.new_empty((word_ids.shape[0], word.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *ids_and_tables, weight, bias, ctx.dropout_p, _eps, ctx.seed, ctx.rng_offset = inputs[:12]
    *row_arguments, plan, ctx.padding = inputs[12:]
    _, mean, rstd = output
    save(ctx, (*ids_and_tables, weight, bias, mean, rstd, plan), row_arguments)
    ctx.mark_non_differentiable(mean, rstd)


_NAME = "embedding_layer_norm"
_INSTEAD = "torch.nn.functional.embedding and layer_norm, or float64"


@differentiable_once(_NAME, _INSTEAD)
def _backward(
    ctx: Any, saved: tuple[Tensor, ...], grad_out: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    *ids_and_tables, weight, bias, mean, rstd, plan = saved
    norm_arguments = parameter_rows(ctx, weight, bias, mean, first=3)
    grad_sum = _ops.embedding_layer_norm_backward(
        *(grad_out, *ids_and_tables, weight, mean, rstd, *norm_arguments),
        *(ctx.dropout_p, ctx.seed, ctx.rng_offset),
    )
    ids, tables = ids_and_tables[:3], ids_and_tables[3:]
    grads: list[Tensor | None] = [None, None, None]
    if ctx.rows is not None:
        _add_task_gradients(ctx, grad_sum, ids, tables, plan)
    else:
        for i, (index, table) in enumerate(zip(ids, tables, strict=True)):
            if ctx.needs_input_grad[3 + i]:
                grad = table.new_zeros((1, *table.shape))
                embedding_task_gradients_(grad_sum, index, grad, (0, index.shape[0]))
                if ctx.padding[i] != NO_ROW:
                    grad[0, ctx.padding[i]].zero_()
                grads[i] = grad[0]
    parameters = parameter_gradients(ctx, *norm_arguments[:2])
    return None, None, None, *grads, *parameters, *[None] * 10


def _add_task_gradients(
    ctx: Any,
    grad_sum: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    plan: Tensor | None,
) -> None:
    """Add the gradient of the sum ``[T, H]`` to the task rows of the tables that have some."""
    trained = [i for i, column in enumerate(ctx.columns[:3]) if column != NO_COLUMN]
    entries = [len(tables[i]) for i in trained]
    if plan is not None and all(ctx.padding[i] == NO_ROW for i in trained):
        add_planned_gradients_(grad_sum, plan, ctx.rows, entries, ctx.offsets)
        return
    for number, i in enumerate(trained):
        grad = grad_sum
        if ctx.padding[i] != NO_ROW:
            grad = grad_sum.masked_fill((ids[i] == ctx.padding[i])[:, None], 0)
        if plan is not None:
            add_planned_gradients_(grad, plan, ctx.rows, entries, ctx.offsets, number)
        else:
            rows = rows_at(ctx.rows, ctx.columns[i], tables[i].shape)
            embedding_task_gradients_(grad, ids[i], rows, ctx.offsets)


_FAKES: dict[str, Callable[..., Any]] = {
    "embedding_layer_norm": _forward_fake,
    "embedding_layer_norm_backward": _backward_fake,
}
for _name, _fake in _FAKES.items():
    register_fake(_name)(_fake)
    declare(_name, cpu="cpp", cuda="triton")


@register_cuda("embedding_layer_norm")
def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import embedding_layer_norm_triton

    ids, tables, given = arguments[:3], arguments[3:6], arguments[6:12]
    plan, padding = arguments[16:]
    check_embedded(ids, tables)
    check_padding(padding, tables)
    if plan is not None:
        check_tensor("plan", plan, (plan.numel(),), torch.int64, tables[0].device)
    weight, bias, dropout_p, eps, seed, rng_offset = given
    word = tables[0]
    check_norm(word, weight, bias, eps, None, None, dropout_p, seed, rng_offset)
    return embedding_layer_norm_triton.forward(ids, tables, *given)


@register_cuda("embedding_layer_norm_backward")
def _cuda_backward(grad_out: Tensor, *arguments: Any) -> Tensor:
    from . import embedding_layer_norm_triton

    ids, tables, given = arguments[:3], arguments[3:6], arguments[6:]
    check_embedded(ids, tables)
    word = tables[0]
    shape = (ids[0].numel(), word.shape[1])
    check_tensor("grad_out", grad_out, shape, word.dtype, word.device)
    weight, mean, rstd, weight_rows, bias_rows, offsets, _accumulate, *dropout_arguments = given
    statistics, rows = (weight, mean, rstd), (weight_rows, bias_rows, None)
    check_norm_backward(grad_out, grad_out, *statistics, *rows, offsets, *dropout_arguments)
    return embedding_layer_norm_triton.backward(grad_out, ids, tables, *given)


register_derivative(_NAME, _backward, _setup_context, name=_NAME, instead=_INSTEAD)
refuse_vmap(f"{_NAME}_backward", name=_NAME, instead=_INSTEAD)


# ---- public -------------------------------------------------------------------------------------


def _check_tables(
    ids: dict[str, Tensor], tables: dict[str, Tensor], word_ids: Tensor, word: Tensor
) -> None:
    for (name, index), table in zip(ids.items(), tables.values(), strict=True):
        if index.dtype != torch.int64 or index.shape != word_ids.shape:
            raise ValueError(
                f"{name}: expected int64 {list(word_ids.shape)} as word_ids, "
                f"got {index.dtype} {list(index.shape)}"
            )
        if index.device != word.device:
            raise ValueError(f"{name}: expected on {word.device}, got {index.device}")
        if are_checked(word):
            check_data(**{name: index})
            check_index(name, index, len(table))
    for name, table in tables.items():
        if table.dim() != 2 or table.shape[1:] != word.shape[1:] or word.shape[1] == 0:
            raise ValueError(f"{name}: expected [rows, width] as word, got {list(table.shape)}")
        if table.dtype not in DTYPES or table.dtype != word.dtype:
            raise ValueError(f"{name}: expected a floating dtype as word, got {table.dtype}")
        if table.device != word.device:
            raise ValueError(f"{name}: expected on {word.device}, got {table.device}")


def _planned(plan: LookupPlan | None, rows: EmbeddingRows) -> Tensor | None:
    """Return the data of a plan for these rows."""
    if plan is None:
        return None
    columns = tuple(own.weight_columns for own in rows[:3] if own.weight_columns is not None)
    if plan.columns != columns:
        raise ValueError(f"plan: expected one for {columns}, got one for {plan.columns}")
    return plan.data


def _padding_rows(given: PaddingRows, tables: dict[str, Tensor]) -> PaddingRows:
    """Return the padding rows, counted from the first row of their tables."""
    if not isinstance(given, tuple | list) or len(given) != len(tables):
        raise ValueError(f"padding_idx: expected a row of each table or None, got {given!r}")
    rows: list[int | None] = []
    for row, (name, table) in zip(given, tables.items(), strict=True):
        if row is not None and not (isinstance(row, int) and -len(table) <= row < len(table)):
            raise ValueError(
                f"padding_idx: expected a row of {name}, {-len(table)} to {len(table) - 1}, or "
                f"None, got {row!r}"
            )
        rows.append(row + len(table) if row is not None and row < 0 else row)
    return rows[0], rows[1], rows[2]


def embedding_layer_norm(
    word_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    stream: int | None = None,
    rows: EmbeddingRows | None = None,
    segments: TaskSegments | None = None,
    plan: LookupPlan | None = None,
    padding_idx: PaddingRows = (None, None, None),
) -> Tensor:
    """BERT's embedding layer: ``dropout(layer_norm(word + position + token type))``.

    A torch function mode sees this call itself, with the parameters as they are.

    Args:
        word_ids: ``[...]`` int64, rows of ``word``; ``[T]`` with rows.
        position_ids: the same shape, rows of ``position``.
        token_type_ids: the same shape, rows of ``token_type``.
        word: ``[N, H]``, any floating dtype.
        position: ``[P, H]``, dtype of ``word``.
        token_type: ``[S, H]``, dtype of ``word``.
        weight: ``[H]`` of the norm, any floating dtype; None stands for ones.
        bias: ``[H]`` of the norm; None stands for zeros.
        dropout_p: probability to drop an element of the result.
        eps: added to the variance.
        training: without it there is no dropout.
        seed: of dropout; int64, one element, on the tables' device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.
        stream: the old name of ``rng_offset``, deprecated.
        rows: where task gradients go; ``grad`` of tables, weight and bias then stays None.
        segments: which tokens belong to which task; needed with ``rows``.
        plan: of these ids, by `kernels.plan_lookups` for the columns of all tables that have some;
            on a GPU the backward pass then need not sort.  The gradients are the same.
        padding_idx: of word, position and token type, as of `torch.nn.Embedding`: the row whose
            lookups give no gradient, counted from the end where it is negative; None for none.
            What other layers add to the gradient of that row, in task rows too, stays.

    Returns:
        ``[..., H]`` in the tables' dtype.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, or an index that is not in
            its table; the message names it.  On CUDA tensors, where looking at an index would wait
            for the device, see `kernels.checked_values`.
    """
    if stream is not None:
        rng_offset = renamed_argument("stream", stream, "rng_offset", rng_offset, 0)
    tensors = (word_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
    if has_torch_function(tensors):
        options: dict[str, Any] = {
            **{"dropout_p": dropout_p, "eps": eps, "training": training, "seed": seed},
            **{"rng_offset": rng_offset, "rows": rows, "segments": segments, "plan": plan},
            "padding_idx": padding_idx,
        }
        out: Tensor = handle_torch_function(embedding_layer_norm, tensors, *tensors, **options)
        return out
    ids = {"word_ids": word_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    tables = {"word": word, "position": position, "token_type": token_type}
    _check_tables(ids, tables, word_ids, word)
    padding = _padding_rows(padding_idx, tables)
    check_parameter("weight", weight, word)
    check_parameter("bias", bias, word)
    check_dropout(dropout_p, seed, rng_offset, word.device)
    row_arguments: tuple[Any, ...] = (None, (), (), False, None)
    if rows is None and plan is not None:
        raise ValueError("plan: of no use without rows")
    if rows is not None:
        if word_ids.dim() != 1 or weight is None:
            raise ValueError("rows: task gradients need ids of shape [tokens] and a weight")
        for own, table in zip(rows[:3], tables.values(), strict=True):
            if own.buffer is not rows.norm.buffer:
                raise ValueError("rows: expected all tables and the norm in one buffer")
            own.checked(segments, table, None, word_ids)
        segments = rows.norm.checked(segments, weight, bias, word_ids)
        starts = (*(own.starts[0] for own in rows[:3]), *rows.norm.starts)
        row_arguments = (rows.norm.buffer, starts, *segments, _planned(plan, rows))
    p = dropout_p if training else 0.0
    check_data(**ids)
    if word.dtype == torch.float64:
        check_data(**tables, weight=weight, bias=bias)
        check_number("eps", eps)
        out = embedding_layer_norm_reference(
            (word_ids, position_ids, token_type_ids),
            (word, position, token_type),
            *(weight, bias, eps, rows, segments, plan, padding),
        )
        return dropout(out, p, seed=seed, rng_offset=rng_offset)
    if p > 0 and seed is None:
        seed = new_seed(word.device)
    flat = [index.reshape(-1).contiguous() for index in ids.values()]
    y: Tensor = _ops.embedding_layer_norm(
        *(*flat, word, position, token_type, weight, bias, p, eps, seed, rng_offset),
        *(*row_arguments, [NO_ROW if row is None else row for row in padding]),
    )[0]
    return y.view(*word_ids.shape, word.shape[1])
