"""A valid call of every operator and of every public function, for tests that corrupt arguments."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import (
    Columns,
    LookupPlan,
    TaskGradients,
    TaskRows,
    TaskSegments,
    balancing,
    new_task_rows,
)
from kernels.linear.linear import HAS_ONEDNN, MULTIPLIES_BF16

from .balancing.methods import SOLVERS
from .conftest import VECTOR_UNITS
from .layer_cases import LAYERS, Stream
from .test_operators import attention, bf16_products, norms, others, relative_attention
from .test_surgery_weights import operator_samples

NO_TENSOR_ARGUMENTS = {
    *(
        "AttentionPlan",
        "BalancedOptimizer",
        "PCGrad",
        "PackingCollator",
        "Columns",
        "EmbeddingRows",
        "LookupPlan",
        "TaskRows",
        "TaskSegments",
        "RotaryEmbedding",
        "rotary_tables",
    ),
    *("backend", "checked_values", "accelerate", "restore", "balancing", "keep_freed_memory"),
}

REFUSED = set() if MULTIPLIES_BF16 else set(bf16_products())
"""Operators that no arguments are valid for on this processor."""


def operator_calls() -> dict[str, tuple]:
    """Arguments of every operator that this processor runs, of some twice."""
    torch.manual_seed(0)
    rows = torch.randn(4, 5, dtype=torch.float64)
    calls = {**attention(0.2), **relative_attention(0.2), **norms(by_task=True), **others()}
    calls |= operator_samples()
    calls |= {f"{name} alone": arguments for name, arguments in norms(by_task=False).items()}
    calls |= {name: (rows @ rows.T, *given) for name, given in SOLVERS.items()}
    calls["limit_vector_unit"] = (len(VECTOR_UNITS) - 1,)
    if MULTIPLIES_BF16:
        calls |= bf16_products()
    if HAS_ONEDNN:
        calls["onednn_linear"] = tuple(x.bfloat16() for x in calls["onednn_linear"])
    return calls


Call = tuple[Callable[..., Any], dict[str, Any]]


def layers(dtype: torch.dtype) -> dict[str, Call]:
    """Calls of the layers; float64 takes the references."""
    x, weight, seed = torch.randn(6, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.tensor(3)
    matrix, ids = torch.randn(8, 8, dtype=dtype), torch.tensor([0, 1, 2, 3, 1, 0])
    qkv, cu = torch.randn(6, 3, 2, 4, dtype=dtype), torch.tensor([0, 2, 6], dtype=torch.int32)
    heads = dict(zip(("q", "k", "v"), qkv.unbind(1), strict=True))
    norm = {"weight": weight, "bias": weight.clone()}
    rows, table = new_task_rows(2, weight, weight), new_task_rows(2, matrix)
    down = new_task_rows(2, matrix)
    wide = new_task_rows(2, torch.ones(24, dtype=dtype)).buffer
    biased = TaskRows(wide, *(Columns(start, (8,)) for start in (0, 8, 16)))
    by_task = {"segments": TaskSegments((0, 3, 6))}
    of_table = table.weight_columns
    plan = kernels.plan_lookups([ids], [of_table], (0, 3, 6))
    dropped = {"dropout_p": 0.1, "seed": seed}
    stream = {"x0": x, "residual": x.clone(), **norm, "x_bias": weight.clone(), **dropped}
    tables = {"word": matrix, "position": matrix.clone(), "token_type": matrix.clone()}
    places = {"word_ids": ids, "position_ids": ids.clone(), "token_type_ids": ids.clone()}
    rotary = {
        **dict(zip(("cos", "sin"), kernels.rotary_tables(6, 4), strict=True)),
        "cu_seqlens": cu,
    }
    cu_apart = {"cu_seqlens_q": cu, "cu_seqlens_k": cu.clone(), "max_seqlen_q": 4}
    return {
        "flash_attn_varlen_func": (
            kernels.flash_attn_varlen_func,
            {**heads, **cu_apart, "max_seqlen_k": 4, **dropped, "window_size": (3, 1)},
        ),
        "flash_attn_varlen_qkvpacked_func": (
            kernels.flash_attn_varlen_qkvpacked_func,
            {"qkv": qkv, "cu_seqlens": cu, "max_seqlen": 4, **dropped},
        ),
        "dropout": (kernels.dropout, {"x": x, "p": 0.1, "seed": seed}),
        "geglu": (kernels.geglu, {"x": x, **dropped}),
        "geglu by tanh": (kernels.geglu, {"x": x, "approximate": "tanh"}),
        "swiglu": (kernels.swiglu, {"x": x, **dropped}),
        "layer_norm": (kernels.layer_norm, {"x": x, **norm}),
        "layer_norm by task": (
            lambda buffer, **given: kernels.layer_norm(
                x, **norm, rows=rows._replace(buffer=buffer), **given
            ),
            {"buffer": rows.buffer, **by_task},
        ),
        "rms_norm": (kernels.rms_norm, {"x": x, "weight": weight}),
        "layer_norm_fn": (kernels.layer_norm_fn, {"x": x, **norm, "residual": x.clone()}),
        "dropout_add_layer_norm": (kernels.dropout_add_layer_norm, stream),
        "dropout_add_layer_norm by task": (
            lambda buffer, **given: kernels.dropout_add_layer_norm(
                **stream, rows=biased._replace(buffer=buffer), **given
            ),
            {"buffer": biased.buffer, **by_task},
        ),
        "dropout_add_layer_norm before the norm": (
            kernels.dropout_add_layer_norm,
            stream | {"prenorm": True},
        ),
        "dropout_add_rms_norm": (kernels.dropout_add_rms_norm, stream | {"prenorm": True}),
        "embedding_layer_norm": (
            kernels.embedding_layer_norm,
            {**places, **tables, **norm, **dropped},
        ),
        "embedding": (kernels.embedding, {"index": ids, "weight": matrix}),
        "embedding by task": (
            lambda index, weight, buffer: kernels.embedding(
                index, weight, rows=table._replace(buffer=buffer), **by_task
            ),
            {"index": ids, "weight": matrix, "buffer": table.buffer},
        ),
        "embedding by task and plan": (
            lambda index, weight, plan: kernels.embedding(
                index, weight, rows=table, **by_task, plan=LookupPlan(plan, (of_table,))
            ),
            {"index": ids, "weight": matrix, "plan": plan.data},
        ),
        "apply_rotary_emb": (kernels.apply_rotary_emb, {"x": qkv[:, 0].contiguous(), **rotary}),
        "apply_rotary_emb_qkv_": (kernels.apply_rotary_emb_qkv_, {"qkv": qkv.clone(), **rotary}),
        "take_rows": (kernels.take_rows, {"x": x, "index": torch.tensor([5, 0, -1])}),
        "linear": (kernels.linear, {"x": x, "weight": matrix, "bias": weight}),
        "linear by task": (
            lambda x, weight: kernels.linear(x, weight, rows=table, **by_task),
            {"x": x, "weight": matrix},
        ),
        "feed_forward": (
            kernels.feed_forward,
            {"x": x, "up_weight": matrix, "up_bias": weight, "down_weight": matrix.clone()},
        ),
        "feed_forward by task": (
            lambda x, up_weight, down_weight: kernels.feed_forward(
                *(x, up_weight, None, down_weight), up_rows=table, down_rows=down, **by_task
            ),
            {"x": x, "up_weight": matrix, "down_weight": matrix.clone()},
        ),
        "zero_rows_": (
            kernels.zero_rows_,
            {"rows": table.weight, "index": ids, "offsets": (0, 3, 6)},
        ),
    }


def surgery() -> dict[str, Call]:
    """Calls of what is computed from task gradients."""
    rows, weights = torch.randn(3, 40), torch.ones(3)
    matrix, vector = kernels.gram(rows), torch.zeros(40)
    state = {name: vector.clone() for name in ("master", "exp_avg", "exp_avg_sq")}
    scalars = {"lr": torch.tensor(0.1), "step": torch.tensor(1), "skip": torch.tensor(False)}
    of_rows = {"rows": rows, "weights": weights}
    calls: dict[str, Call] = {
        "gram": (kernels.gram, {"rows": rows}),
        "draw_order": (
            kernels.draw_order,
            {"num_tasks": 3, "seed": torch.tensor(1), "step": torch.tensor(2)},
        ),
        "pcgrad_weights": (
            kernels.pcgrad_weights,
            {"gram": matrix, "order": kernels.draw_order(3, 1)},
        ),
        "combine": (kernels.combine, of_rows),
        "combine into": (kernels.combine, {**of_rows, "out": vector}),
        "combine_adamw_": (
            kernels.combine_adamw_,
            {**of_rows, **state, **scalars, "low_precision": vector.half()},
        ),
        "combine_adamw_segments_": (
            kernels.combine_adamw_segments_,
            {
                **({"rows": rows, "weights": torch.ones(2, 3)} | state | scalars),
                **{"low_precision": vector.half(), "ends": (16, 40), "groups": (1, 0)},
            },
        ),
        "lamb_update_": (
            kernels.lamb_update_,
            {**state, **scalars, "offsets": (0, 10, 40), "low_precision": vector.half()},
        ),
        "update_guard": (kernels.update_guard, {"gram": matrix, "weights": weights}),
        "update_summary": (
            kernels.update_summary,
            {
                **{"gram": matrix[None], "weights": weights[None], "losses": torch.ones(3)},
                **{"shares": torch.ones(1), "loss_scale": torch.tensor(2.0)},
            },
        ),
    }
    for name in ("sum", "mean", "upgrad", "dual_projection", "config", "mgda", "aligned_mtl"):
        calls[f"balancing.{name}"] = (getattr(balancing, name), {"gram": matrix})
    for name in ("cagrad", "nash_mtl", "fairgrad", "krum", "imtl_g", "main_aux"):
        calls[f"balancing.{name}"] = (getattr(balancing, name), {"gram": matrix})
    return calls


def padding_and_modules() -> dict[str, Call]:
    """Calls of the rest."""
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    stream, indices, *_ = kernels.unpad_input(hidden, mask)
    cu, weight = torch.tensor([0, 2], dtype=torch.int32), torch.randn(4, 4)
    ids, columns = torch.tensor([0, 1, 2, 3, 1, 0]), (Columns(2, (4, 4)),)
    plan = kernels.plan_lookups([ids], columns, (0, 3, 6))
    return {
        "unpad_input": (
            kernels.unpad_input,
            {"hidden_states": hidden, "attention_mask": mask},
        ),
        "pad_input": (
            kernels.pad_input,
            {"hidden_states": stream, "indices": indices, "batch": 2, "seqlen": 3},
        ),
        "attention_plan": (kernels.attention_plan, {"cu_seqlens": cu, "total": 2}),
        "check_cu_seqlens": (
            partial(kernels.check_cu_seqlens, "cu_seqlens"),
            {"cu_seqlens": cu, "total": 2},
        ),
        "plan_lookups": (
            lambda indices: kernels.plan_lookups([indices], columns, (0, 3, 6)),
            {"indices": ids},
        ),
        "zero_planned_rows_": (
            lambda buffer, plan: kernels.zero_planned_rows_(
                buffer, LookupPlan(plan, columns), (0, 3, 6)
            ),
            {"buffer": torch.zeros(2, 20), "plan": plan.data},
        ),
        "new_task_rows": (partial(kernels.new_task_rows, 2), {"weight": weight}),
        "FusedLayerNorm": (partial(_norm, kernels.FusedLayerNorm), {"weight": weight[0].clone()}),
        "FusedRMSNorm": (partial(_norm, kernels.FusedRMSNorm), {"weight": weight[0].clone()}),
        "TaskGradients": (_task_gradients, {"weight": weight}),
    }


def _norm(kind: type[torch.nn.Module], weight: Tensor) -> Tensor:
    module = kind(4)
    module.weight = torch.nn.Parameter(weight)
    return module(torch.randn(3, 4))


def _task_gradients(weight: Tensor) -> None:
    module = torch.nn.Linear(4, 4)
    module.weight = torch.nn.Parameter(weight)
    collected = TaskGradients(module, 2)
    with collected.batch([1, 1]):
        out = module(torch.randn(2, 4))
    out.sum().backward()


def public_calls() -> Mapping[str, Call]:
    """Of every public function a call, and some more; the references of float64 too."""
    torch.manual_seed(0)
    in_float64 = {f"{name} in float64": call for name, call in layers(torch.float64).items()}
    return {**layers(torch.float32), **in_float64, **surgery(), **padding_and_modules()}


def backward_calls() -> dict[str, Callable[[], Tensor]]:
    """Forward passes of every layer whose backward passes are this package's."""
    torch.manual_seed(0)
    stream = Stream.of(9)
    of_torch = ("embedding", "feed_forward", "feed_forward by task")
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(layer, stream) for name, layer in LAYERS.items() if name not in of_torch
    }
    if MULTIPLIES_BF16:
        in_bf16 = stream.to("cpu", torch.bfloat16)
        calls |= {
            f"{name} in bf16": partial(LAYERS[name], in_bf16)
            for name in ("linear by task", "feed_forward by task")
        }
    rows = torch.randn(3, 40, requires_grad=True)
    weights = torch.ones(3, requires_grad=True)
    return calls | {
        "gram": lambda: kernels.gram(rows),
        "combine": lambda: kernels.combine(rows, weights),
    }
