"""Every function in a graph, with each optional argument left out and each output unused.

The calls of a group share one graph, forward and backward, since compiling takes most of the time.
Inductor, which compiles for seconds, takes those that differ in what its operators return.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import EmbeddingRows, TaskRows

from .balancing.methods import METHODS
from .layer_cases import HEADS, WIDTH, Stream
from .operator_calls import public_calls

# Inductor warns of what torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_prims_common:FutureWarning"),
]

Call = Callable[[Stream], Tensor | Sequence[Tensor]]
TOKENS = 21


# ---- layers --------------------------------------------------------------------------------------


def _of_own(function: Callable[..., Tensor], *names: str, **options: object) -> Call:
    """A function of a part of x and of the named tensors of a stream, None where there is none."""

    def call(s: Stream) -> Tensor | Sequence[Tensor]:
        return function(s.own, *(getattr(s, name) if name else None for name in names), **options)

    return call


def _by_task(function: Callable[..., Tensor], rows: str, *names: str, **without: None) -> Call:
    """Likewise, the gradients by task; columns that are named in ``without`` are not wanted."""

    def call(s: Stream) -> Tensor:
        tensors = [getattr(s, name) for name in names]
        tensors = [
            x.detach() if name in ("weight", "bias", "matrix") and name in without else x
            for name, x in zip(names, tensors, strict=True)
        ]
        own: TaskRows = getattr(s, rows)
        own = own._replace(
            **{"weight_columns" if name != "bias" else "bias_columns": None for name in without}
        )
        return function(s.own, *tensors, rows=own, segments=s.segments)

    return call


def _parameters(function: Callable[..., Tensor], *before: str) -> dict[str, Call]:
    """A norm with and without its parameters."""
    return {
        "weight and bias": _of_own(function, *before, "weight", "bias"),
        "weight": _of_own(function, *before, "weight", ""),
        "bias": _of_own(function, *before, "", "bias"),
        "neither": _of_own(function, *before, "", ""),
    }


def _dropout_add(x: Tensor, *arguments: Tensor | None, **options: object) -> Tensor:
    return kernels.dropout_add_layer_norm(x, *arguments, 0.1, seed=torch.tensor(5), **options)


def _layer_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> Tensor:
    return kernels.layer_norm_fn(x, weight, bias, **options)


LAYER_NORM: dict[str, Call] = {
    **_parameters(kernels.layer_norm),
    "of a constant, weight and bias": lambda s: kernels.layer_norm(
        s.own.detach(), s.weight, s.bias
    ),
    "frozen": lambda s: kernels.layer_norm(s.own, s.weight.detach(), s.bias.detach()),
    "by task": _by_task(kernels.layer_norm, "vector_rows", "weight", "bias"),
    "by task, frozen bias": _by_task(
        kernels.layer_norm, "vector_rows", "weight", "bias", bias=None
    ),
    "by task, frozen weight": _by_task(
        kernels.layer_norm, "vector_rows", "weight", "bias", weight=None
    ),
    "module": lambda s: _MODULE(s.own),
    "module without parameters": lambda s: _PLAIN_MODULE(s.own),
    "layer_norm_fn": lambda s: kernels.layer_norm_fn(s.own, s.weight, s.bias, s.other),
    "layer_norm_fn, no bias": lambda s: kernels.layer_norm_fn(s.own, s.weight, None, s.other),
    "layer_norm_fn, no residual": lambda s: kernels.layer_norm_fn(s.own, s.weight, s.bias),
    "layer_norm_fn, dropout": lambda s: kernels.layer_norm_fn(
        s.own, s.weight, s.bias, s.other, dropout_p=0.1
    ),
    "layer_norm_fn, prenorm": lambda s: kernels.layer_norm_fn(
        s.own, s.weight, s.bias, s.other, prenorm=True
    ),
    "layer_norm_fn, its sum alone": lambda s: kernels.layer_norm_fn(
        s.own, s.weight, s.bias, s.other, prenorm=True
    )[1],
}
_MODULE = kernels.FusedLayerNorm(WIDTH)
_PLAIN_MODULE = kernels.FusedLayerNorm(WIDTH, elementwise_affine=False)
DROPOUT_ADD: dict[str, Call] = {
    **_parameters(_dropout_add, "other"),
    "no residual": _of_own(_dropout_add, "", "weight", "bias"),
    "no dropout": lambda s: kernels.dropout_add_layer_norm(s.own, s.other, s.weight, s.bias),
    "no dropout, neither": lambda s: kernels.dropout_add_layer_norm(s.own, s.other, None, None),
    "no seed": lambda s: kernels.dropout_add_layer_norm(s.own, s.other, s.weight, s.bias, 0.1),
    "bias of x": lambda s: _dropout_add(s.own, s.other, s.weight, s.bias, x_bias=s.bias),
    "not training": lambda s: _dropout_add(s.own, s.other, s.weight, s.bias, training=False),
    "prenorm": _of_own(_dropout_add, "other", "weight", "bias", prenorm=True),
    "prenorm by task": lambda s: _dropout_add(
        *(s.own, s.other, s.weight, s.bias),
        **{"prenorm": True, "rows": s.vector_rows, "segments": s.segments},
    ),
    "prenorm, norm alone": lambda s: _dropout_add(s.own, s.other, s.weight, s.bias, prenorm=True)[
        0
    ],
    "prenorm, sum alone": lambda s: _dropout_add(s.own, s.other, s.weight, s.bias, prenorm=True)[1],
    "constant x": lambda s: _dropout_add(s.own.detach(), s.other, s.weight, s.bias),
    "constant residual": lambda s: _dropout_add(s.own, s.other.detach(), s.weight, s.bias),
    "by task": _by_task(_dropout_add, "vector_rows", "other", "weight", "bias"),
    "by task, frozen bias": _by_task(
        _dropout_add, "vector_rows", "other", "weight", "bias", bias=None
    ),
}


def _rms_add(x: Tensor, *arguments: Tensor | None, **options: object) -> Tensor:
    return kernels.dropout_add_rms_norm(x, *arguments, 0.1, seed=torch.tensor(5), **options)


def _rms_by_task(function: Callable[..., Tensor], *names: str, **options: object) -> Call:
    """An RMS norm, which has no bias, with gradients by task."""

    def call(s: Stream) -> Tensor:
        rows = s.vector_rows._replace(bias_columns=None)
        own = {"rows": rows, "segments": s.segments, **options}
        return function(s.own, *(getattr(s, name) if name else None for name in names), **own)

    return call


RMS_NORM: dict[str, Call] = {
    "weight": lambda s: kernels.rms_norm(s.own, s.weight),
    "no weight": lambda s: kernels.rms_norm(s.own),
    "of a constant": lambda s: kernels.rms_norm(s.own.detach(), s.weight),
    "frozen": lambda s: kernels.rms_norm(s.own, s.weight.detach()),
    "by task": _rms_by_task(kernels.rms_norm, "weight"),
    "module": lambda s: _RMS_MODULE(s.own),
    "module without parameters": lambda s: _PLAIN_RMS_MODULE(s.own),
    "add": _of_own(_rms_add, "other", "weight", ""),
    "add, no weight": _of_own(_rms_add, "other", "", ""),
    "add, no residual": _of_own(_rms_add, "", "weight", ""),
    "prenorm": _of_own(_rms_add, "other", "weight", "", prenorm=True),
    "prenorm, sum alone": lambda s: _rms_add(s.own, s.other, s.weight, None, prenorm=True)[1],
    "add by task": _rms_by_task(_rms_add, "other", "weight", ""),
    "prenorm by task": _rms_by_task(_rms_add, "other", "weight", "", prenorm=True),
    "layer_norm_fn": lambda s: kernels.layer_norm_fn(
        s.own, s.weight, None, s.other, prenorm=True, is_rms_norm=True
    ),
}
_RMS_MODULE = kernels.FusedRMSNorm(WIDTH)
_PLAIN_RMS_MODULE = kernels.FusedRMSNorm(WIDTH, elementwise_affine=False)


def _attention(s: Stream, p: float = 0.1, seeded: bool = True, **options: object) -> object:
    q, k, v = s.x.view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
    lengths = (s.cu_seqlens, s.cu_seqlens, s.longest, s.longest)
    seed = s.seed if seeded else None
    return kernels.flash_attn_varlen_func(q, k, v, *lengths, p, seed=seed, **options)


def _one_of_qkv(s: Stream, wanted: int) -> Tensor:
    parts = s.x.view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
    q, k, v = (x if i == wanted else x.detach() for i, x in enumerate(parts))
    lengths = (s.cu_seqlens, s.cu_seqlens, s.longest, s.longest)
    return kernels.flash_attn_varlen_func(q, k, v, *lengths)


def _packed(s: Stream, p: float = 0.1, **options: object) -> object:
    qkv = s.x.view(-1, 3, HEADS, WIDTH // HEADS)
    return kernels.flash_attn_varlen_qkvpacked_func(qkv, s.cu_seqlens, s.longest, p, **options)


def _plan(s: Stream) -> kernels.AttentionPlan:
    return kernels.attention_plan(s.cu_seqlens, s.x.shape[0])


ATTENTION: dict[str, Call] = {
    "plain": lambda s: _attention(s, p=0.0),
    "dropout": _attention,
    "no seed": lambda s: _attention(s, seeded=False),
    "causal, scale": lambda s: _attention(s, causal=True, softmax_scale=0.3),
    "log-sum-exp too": lambda s: _attention(s, return_attn_probs=True)[:2],
    "log-sum-exp alone": lambda s: _attention(s, return_attn_probs=True)[1],
    "output alone": lambda s: _attention(s, return_attn_probs=True)[0],
    **{f"gradient of {name}": partial(_one_of_qkv, wanted=i) for i, name in enumerate("qkv")},
    "packed": lambda s: _packed(s, p=0.0),
    "packed, dropout": lambda s: _packed(s, seed=s.seed),
    "packed, no seed": _packed,
    "packed, dropout, plan": lambda s: _packed(s, seed=s.seed, plan=_plan(s)),
    "dropout, plan": lambda s: _attention(s, plan=_plan(s)),
    "plan alone": lambda s: [x.float() for x in _plan(s)],
    "window": lambda s: _attention(s, window_size=(3, 5)),
    "window of one side, plan": lambda s: _attention(s, window_size=(-1, 2), plan=_plan(s)),
    "packed, causal in a window": lambda s: _packed(s, 0.0, causal=True, window_size=(4, -1)),
    "packed, causal": lambda s: _packed(s, 0.0, causal=True),
    "packed, log-sum-exp alone": lambda s: _packed(s, 0.0, return_attn_probs=True)[1],
}


def _embedded(s: Stream, *parameters: Tensor | None, **options: object) -> Tensor:
    tables = (s.table, s.table, s.table)
    return kernels.embedding_layer_norm(s.ids, s.ids, s.ids, *tables, *parameters, **options)


def _embedded_by_task(s: Stream, *frozen: str, planned: bool = False) -> Tensor:
    rows = {"word": s.table_rows, "position": s.table_rows, "token_type": s.table_rows}
    tables = dict.fromkeys(rows, s.table)
    for name in frozen:
        rows[name] = rows[name]._replace(weight_columns=None)
        tables[name] = tables[name].detach()
    of_all = EmbeddingRows(**rows, norm=s.vector_rows)
    return kernels.embedding_layer_norm(
        *(s.ids, s.ids, s.ids, *tables.values(), s.weight, s.bias),
        rows=of_all,
        segments=s.segments,
        plan=s.plan if planned else None,
    )


EMBEDDING: dict[str, Call] = {
    "weight and bias": lambda s: _embedded(s, s.weight, s.bias),
    "weight": lambda s: _embedded(s, s.weight, None),
    "bias": lambda s: _embedded(s, None, s.bias),
    "neither": lambda s: _embedded(s, None, None),
    "padding": lambda s: _embedded(s, s.weight, s.bias, padding_idx=(0, None, -1)),
    "dropout": lambda s: _embedded(s, s.weight, s.bias, dropout_p=0.1, seed=s.seed),
    "dropout, neither": lambda s: _embedded(s, None, None, dropout_p=0.1, seed=s.seed),
    "no seed": lambda s: _embedded(s, s.weight, s.bias, dropout_p=0.1),
    "frozen tables": lambda s: _embedded(s._replace(table=s.table.detach()), s.weight, s.bias),
    "by task": _embedded_by_task,
    "by task, frozen positions": lambda s: _embedded_by_task(s, "position"),
    "table": lambda s: kernels.embedding(s.ids, s.table),
    "table by task": lambda s: kernels.embedding(
        s.ids, s.table, rows=s.table_rows, segments=s.segments
    ),
    "by task and plan": lambda s: _embedded_by_task(s, "position", "token_type", planned=True),
    "table by task and plan": lambda s: kernels.embedding(
        s.ids, s.table, rows=s.table_rows, segments=s.segments, plan=s.plan
    ),
}


def _feed_forward_by_task(s: Stream, frozen: tuple[str, ...] = ()) -> Tensor:
    parameters = {name: getattr(s, name) for name in ("matrix", "bias", "table")}
    for name in frozen:
        parameters[name] = parameters[name].detach()
    up, down = s.matrix_rows, s.table_rows
    if "matrix" in frozen:
        up = up._replace(weight_columns=None)
    if "bias" in frozen:
        up = up._replace(bias_columns=None)
    if "table" in frozen:
        down = down._replace(weight_columns=None)
    rows = {"up_rows": up, "down_rows": down, "segments": s.segments}
    return kernels.feed_forward(s.own, *parameters.values(), **rows)


LINEAR: dict[str, Call] = {
    "bias": _of_own(kernels.linear, "matrix", "bias"),
    "no bias": _of_own(kernels.linear, "matrix"),
    "of a constant": lambda s: kernels.linear(s.own.detach(), s.matrix),
    "by task": _by_task(kernels.linear, "matrix_rows", "matrix", "bias"),
    "by task, frozen bias": _by_task(kernels.linear, "matrix_rows", "matrix", "bias", bias=None),
    "by task, frozen weight": _by_task(
        kernels.linear, "matrix_rows", "matrix", "bias", matrix=None
    ),
    "by task, no bias": lambda s: kernels.linear(
        s.own, s.matrix, rows=s.matrix_rows._replace(bias_columns=None), segments=s.segments
    ),
    "by task, of a constant": lambda s: kernels.linear(
        s.own.detach(), s.matrix, s.bias, rows=s.matrix_rows, segments=s.segments
    ),
    "feed-forward": _of_own(kernels.feed_forward, "matrix", "bias", "table"),
    "feed-forward, no bias": _of_own(kernels.feed_forward, "matrix", "", "table"),
    "feed-forward by task": _feed_forward_by_task,
    "feed-forward by task, frozen weight": partial(_feed_forward_by_task, frozen=("matrix",)),
    "feed-forward by task, frozen bias": partial(_feed_forward_by_task, frozen=("bias",)),
    "feed-forward by task, frozen second weight": partial(_feed_forward_by_task, frozen=("table",)),
    "feed-forward by task, of a constant": lambda s: _feed_forward_by_task(
        s._replace(x=s.x.detach())
    ),
    "rows": lambda s: kernels.take_rows(s.own, s.cu_seqlens[:-1].long()),
    "rows of a constant": lambda s: kernels.take_rows(s.own.detach(), s.cu_seqlens.long() - 1),
    "dropout": lambda s: kernels.dropout(s.own, 0.1, seed=s.seed),
    "dropout, no seed": lambda s: kernels.dropout(s.own, 0.1),
    "no dropout": lambda s: kernels.dropout(s.own, 0.0),
    "not training": lambda s: kernels.dropout(s.own, 0.1, training=False),
}


def _heads(s: Stream) -> Tensor:
    return s.x.view(-1, 3, 2, 32)


def _turned(s: Stream, **options: object) -> Tensor:
    tables = kernels.rotary_tables(len(s.x), 32)
    return kernels.apply_rotary_emb(_heads(s)[:, 0], *tables, **options)


def _turned_packed(s: Stream, qkv: Tensor, **options: object) -> Tensor:
    tables = kernels.rotary_tables(len(s.x), 16)
    return kernels.apply_rotary_emb_qkv_(qkv, *tables, **options)


def _turned_by_hand(s: Stream) -> Tensor:
    qkv = 2 * _heads(s)
    _turned_packed(s, qkv, cu_seqlens=s.cu_seqlens)
    return qkv


ROTARY: dict[str, Call] = {
    "packed": lambda s: _turned(s, cu_seqlens=s.cu_seqlens),
    "positions": lambda s: _turned(s, position_ids=s.ids % 4),
    "in place": lambda s: kernels.apply_rotary_emb(
        2 * _heads(s)[:, 1],
        *kernels.rotary_tables(len(s.x), 32),
        interleaved=True,
        inplace=True,
        cu_seqlens=s.cu_seqlens,
    ),
    "qkv": lambda s: _turned_packed(s, (2 * s.x).view(-1, 3, 2, 32), position_ids=s.ids % 4),
    "qkv, its own tensor": _turned_by_hand,
    "qkv, all heads": lambda s: _turned_packed(
        s, (2 * s.x).view(-1, 6, 32), num_heads_q=2, cu_seqlens=s.cu_seqlens, interleaved=True
    ),
    "batch": lambda s: kernels.apply_rotary_emb(
        _heads(s).view(3, -1, 6, 32), *kernels.rotary_tables(len(s.x), 32), seqlen_offsets=1
    ),
}


def _geglu(s: Stream, **options: object) -> Tensor:
    return kernels.geglu(s.x[:, : 2 * WIDTH], **options)


GATED: dict[str, Call] = {
    "geglu": _geglu,
    "geglu, dropout": lambda s: _geglu(s, dropout_p=0.1, seed=s.seed),
    "geglu, no seed": partial(_geglu, dropout_p=0.1),
    "geglu by tanh": partial(_geglu, approximate="tanh"),
    "geglu, not training": partial(_geglu, dropout_p=0.1, training=False),
    "swiglu": lambda s: kernels.swiglu(s.x[:, WIDTH:]),
    "swiglu, dropout": lambda s: kernels.swiglu(s.x[:, WIDTH:], dropout_p=0.1, seed=s.seed),
    "swiglu of a constant": lambda s: kernels.swiglu(s.x[:, WIDTH:].detach()),
}


def _padded(s: Stream) -> Tensor:
    longest = len(s.x) // 3
    mask = torch.arange(longest) < torch.tensor([longest, 2, 5])[:, None]
    hidden = s.x.view(3, longest, -1)
    stream = kernels.unpad_input(hidden, mask, total=longest + 9, max_seqlen=longest)
    return kernels.pad_input(stream.hidden_states, stream.indices, 3, longest)


def _all_tokens(s: Stream) -> Tensor:
    hidden = s.x.view(3, len(s.x) // 3, -1)
    mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64)
    return kernels.unpad_input(hidden, mask, total=len(s.x), max_seqlen=hidden.shape[1])[0]


PADDING: dict[str, Call] = {
    "there and back": _padded,
    "stream alone": _all_tokens,
}


# ---- gradient surgery ----------------------------------------------------------------------------


def _rows(s: Stream) -> Tensor:
    """Task gradients, whose columns are the model's parameters, whatever the tokens."""
    return s.x[:12].view(3, -1)


def _updated(update: Callable[..., None], copied: bool = False, **options: object) -> list[Tensor]:
    """What an update in place makes of weights, moments and a copy; ``update`` takes these four."""
    master, exp_avg, exp_avg_sq = (torch.full((12,), value) for value in (1.0, 0.5, 0.2))
    copy = torch.zeros(12, dtype=torch.bfloat16) if copied else None
    update(master, exp_avg, exp_avg_sq, copy, lr=0.1, step=torch.tensor(2), **options)
    return [master, exp_avg, exp_avg_sq, *([] if copy is None else [copy.float()])]


def _adamw(s: Stream, **options: object) -> list[Tensor]:
    rows = _rows(s).detach()[:, :12].contiguous()
    return _updated(partial(kernels.combine_adamw_, rows, torch.ones(3)), **options)


def _adamw_segments(s: Stream, **options: object) -> list[Tensor]:
    rows, weights = _rows(s).detach()[:, :12].contiguous(), torch.tensor([[1.0] * 3, [0.5] * 3])
    update = partial(kernels.combine_adamw_segments_, rows, weights)
    return _updated(update, ends=(5, 7, 12), groups=(1, -1, 0), **options)


def _lamb(s: Stream, **options: object) -> list[Tensor]:
    def update(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *copy: Tensor, **own: object):
        kernels.lamb_update_(master, exp_avg, exp_avg_sq, (0, 5, 12), *copy, **own)

    return _updated(update, **options)


def _combined_into(s: Stream) -> Tensor:
    out = torch.zeros(4 * s.x.shape[1])
    return kernels.combine(_rows(s).detach(), torch.ones(3), out)


def _guard(s: Stream, **options: object) -> list[Tensor]:
    guard = kernels.update_guard(kernels.gram(_rows(s)).detach(), torch.ones(3), **options)
    return [x.float() for x in guard]


def _summary(s: Stream, **options: object) -> list[Tensor]:
    gram = kernels.gram(_rows(s)).detach()[None]
    summary = kernels.update_summary(
        gram, torch.ones(1, 3), torch.ones(3), torch.ones(1), **options
    )
    return [x.float() for x in summary]


def _zeroed(s: Stream) -> Tensor:
    rows = torch.ones(2, *s.table.shape)
    kernels.zero_rows_(rows, s.ids, s.segments.offsets)
    return rows


def _zeroed_as_planned(s: Stream) -> Tensor:
    buffer = torch.ones_like(s.buffer)
    kernels.zero_planned_rows_(buffer, s.plan, s.segments.offsets)
    return buffer


def _weights(s: Stream, method: Callable[[Tensor], Tensor]) -> Tensor:
    return method(kernels.gram(_rows(s)).detach())


SURGERY: dict[str, Call] = {
    "gram": lambda s: kernels.gram(_rows(s)),
    "gram of segments": lambda s: kernels.gram(_rows(s), [0, 5, 4 * s.x.shape[1]]),
    "combine": lambda s: kernels.combine(_rows(s), torch.ones(3)),
    "combine, gradient of the weights": lambda s: kernels.combine(_rows(s).detach(), s.weight[:3]),
    "combine into a tensor": _combined_into,
    "combine_adamw_": _adamw,
    "combine_adamw_, copied": partial(_adamw, copied=True),
    "combine_adamw_, scaled": lambda s: _adamw(s, scale=torch.tensor(0.5)),
    "combine_adamw_, skipped": lambda s: _adamw(s, skip=torch.tensor(True)),
    "combine_adamw_segments_": _adamw_segments,
    "combine_adamw_segments_, copied": partial(_adamw_segments, copied=True, decayed=9),
    "lamb_update_": _lamb,
    "lamb_update_, copied": partial(_lamb, copied=True),
    "lamb_update_, skipped": lambda s: _lamb(s, skip=torch.tensor(True)),
    "draw_order": lambda s: kernels.draw_order(3, 1).float(),
    "draw_order of tensors": lambda s: kernels.draw_order(3, s.seed, s.seed).float(),
    "pcgrad_weights": lambda s: _weights(s, kernels.pcgrad_weights),
    "update_guard": _guard,
    "update_guard, clipped": partial(_guard, max_norm=0.5, loss_scale=2.0),
    "update_summary": _summary,
    "update_summary, scaled": partial(_summary, max_norm=0.5, loss_scale=torch.tensor(2.0)),
    "new_task_rows": lambda s: kernels.new_task_rows(2, s.weight, fill=1.0).buffer,
    "zero_rows_": _zeroed,
    "zero_planned_rows_": _zeroed_as_planned,
    **{f"balancing: {name}": partial(_weights, method=method) for name, method in METHODS.items()},
}
GROUPS = {
    "layer_norm": LAYER_NORM,
    "dropout_add_layer_norm": DROPOUT_ADD,
    "rms_norm": RMS_NORM,
    "attention": ATTENTION,
    "embedding_layer_norm": EMBEDDING,
    "linear, dropout": LINEAR,
    "rotary": ROTARY,
    "gated activations": GATED,
    "padding": PADDING,
    "surgery": SURGERY,
}
# test_compile.py has a model's layers.
FOR_INDUCTOR = {
    "layer_norm": ["neither", "bias", "by task, frozen bias"],
    "dropout_add_layer_norm": ["neither", "prenorm, sum alone", "prenorm by task"],
    "rms_norm": ["prenorm by task", "no weight", "prenorm, sum alone"],
    "attention": ["packed, dropout, plan", "gradient of v", "log-sum-exp alone"],
    "embedding_layer_norm": ["neither", "padding", "by task, frozen positions", "by task and plan"],
    "linear, dropout": ["by task, frozen weight", "dropout, no seed", "rows"],
    "rotary": ["positions", "qkv"],
    "gated activations": ["geglu", "swiglu, dropout"],
    "padding": ["there and back"],
    "surgery": ["gram", "combine into a tensor", "combine_adamw_", "zero_rows_", "balancing: mgda"],
}


# ---- tests ---------------------------------------------------------------------------------------


def test_every_function_has_a_case() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    called = {re.split(r"[ .]", name)[0] for name in public_calls()}
    # Methods are in METHODS; the others run outside of graphs.
    called -= {"balancing", "check_cu_seqlens", "plan_lookups", "TaskGradients"}
    missing = [name for name in called if not re.search(rf"\bkernels\.{name}\b", text)]
    assert missing == [], "GROUPS of tests/kernels/test_compile_options.py has a case for each"


def run(layers: Callable, streams: list[Stream]) -> list[Tensor]:
    """Outputs of all calls, gradients of all leaves, and each call's own rows."""
    first = streams[0]
    torch.manual_seed(3)
    for stream in streams:
        stream.buffer.zero_()
    outputs = layers(streams)
    leaves = [first.x, first.weight, first.bias, first.matrix, first.table]
    loss = sum(out.square().sum() for out in outputs if out.requires_grad)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        *(out.detach() for out in outputs),
        *(grad for grad in grads if grad is not None),
        *(stream.buffer.clone() for stream in streams),
    ]


def compare(
    calls: list[Call],
    backend: str,
    tokens: Sequence[int] = (TOKENS,),
    dynamic: bool | None = None,
) -> None:
    """Compiled in one graph, the calls give what they give eagerly."""

    def layers(streams: list[Stream]) -> list[Tensor]:
        results = [call(s) for call, s in zip(calls, streams, strict=True)]
        outputs = [x for r in results for x in ([r] if isinstance(r, Tensor) else r)]
        # No two alike: Inductor returns equal outputs as one tensor, whatever their gradients.
        return [x + i for i, x in enumerate(outputs)]

    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend=backend, dynamic=dynamic)
    for count in tokens:
        stream = Stream.of(count)
        streams = [stream._replace(buffer=torch.zeros_like(stream.buffer)) for _ in calls]
        with torch._inductor.config.patch(fallback_random=True):
            found = run(compiled, streams)
        for one, other in zip(found, run(layers, streams), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_in_a_graph(group: str) -> None:
    compare(list(GROUPS[group].values()), "aot_eager")


def test_under_inductor() -> None:
    calls = [GROUPS[group][name] for group, names in FOR_INDUCTOR.items() for name in names]
    compare(calls, "inductor")


def test_under_inductor_for_any_number_of_tokens() -> None:
    """A call of each group: what Inductor can do with None does not depend on sizes."""
    calls = [GROUPS[group][names[0]] for group, names in FOR_INDUCTOR.items()]
    compare(calls, "inductor", [TOKENS, 33], dynamic=True)
