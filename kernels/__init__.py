"""Kernels for BERT trainers: attention, layer norm and gradient surgery.

Each works on a GPU (Triton, CUDA) and on a CPU (C++, torch) under the same name;
:func:`backend` tells which one runs.

Under autocast, :func:`linear` computes in autocast's dtype, as torch's does.  All others take and
return the dtype that they are given and compute in float32 inside: attention on what linear layers
give is in bfloat16, and a norm whose residual is float32 stays in float32.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import balancing
from . import gradient_buffer as gradient_buffer
from . import gradient_queue as gradient_queue
from ._namesake import namesake_attribute
from .attention.attention import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from .attention.attention_plan import AttentionPlan, attention_plan
from .attention.relative_attention import relative_attention as relative_attention
from .balancing.pcgrad import draw_order, pcgrad_weights
from .distributed.weights_checksum import weights_checksum as weights_checksum
from .dropout.dropout import dropout
from .embedding.embedding import embedding, zero_rows_
from .embedding.lookup_plan import LookupPlan, plan_lookups, zero_planned_rows_
from .embedding_layer_norm.embedding_layer_norm import EmbeddingRows, embedding_layer_norm
from .freed_memory import keep_freed_memory
from .gated_activation.gated_activation import geglu, swiglu
from .integrations.layer_norm_compat import FusedLayerNorm, FusedRMSNorm, layer_norm_fn
from .integrations.packing_collator import PackingCollator
from .integrations.padding import pad_input, unpad_input
from .lamb import lamb_update_
from .layer_norm.layer_norm import (
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm,
    rms_norm,
)
from .linear.feed_forward import feed_forward
from .linear.linear import linear
from .registration.backend import backend
from .registration.backend import backends as backends
from .registration.deprecation import renamed_attribute
from .registration.validation import check_cu_seqlens, checked_values
from .rotary.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from .rotary.rotary_embedding import RotaryEmbedding, rotary_tables
from .surgery.surgery import (
    combine,
    combine_adamw_,
    combine_adamw_segments_,
    gram,
    update_guard,
)
from .surgery.update_summary import update_summary
from .take_rows.take_rows import take_rows
from .task_rows import Columns, TaskRows, TaskSegments, new_task_rows

if TYPE_CHECKING:
    from .integrations.balanced_optimizer import BalancedOptimizer
    from .integrations.balanced_sentence_transformers_trainer import (
        PCGradSentenceTransformerTrainer as PCGradSentenceTransformerTrainer,
    )
    from .integrations.balanced_trainer import PCGradTrainer as PCGradTrainer
    from .integrations.pcgrad import PCGrad
    from .integrations.transformers_patch import accelerate, restore
    from .task_gradients.task_gradients import TaskGradients

__all__ = [
    "AttentionPlan",
    "BalancedOptimizer",
    "Columns",
    "EmbeddingRows",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "LookupPlan",
    "PCGrad",
    "PackingCollator",
    "RotaryEmbedding",
    "TaskGradients",
    "TaskRows",
    "TaskSegments",
    "accelerate",
    "apply_rotary_emb",
    "apply_rotary_emb_qkv_",
    "attention_plan",
    "backend",
    "balancing",
    "check_cu_seqlens",
    "checked_values",
    "combine",
    "combine_adamw_",
    "combine_adamw_segments_",
    "draw_order",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "embedding",
    "embedding_layer_norm",
    "feed_forward",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "geglu",
    "gram",
    "keep_freed_memory",
    "lamb_update_",
    "layer_norm",
    "layer_norm_fn",
    "linear",
    "new_task_rows",
    "pad_input",
    "pcgrad_weights",
    "plan_lookups",
    "restore",
    "rms_norm",
    "rotary_tables",
    "swiglu",
    "take_rows",
    "unpad_input",
    "update_guard",
    "update_summary",
    "zero_planned_rows_",
    "zero_rows_",
]


_OLD_NAMES = {"implementation": "backend", "wipe_": "zero_rows_"}
_ON_FIRST_USE = {  # they import the library that they extend, or torch's compiler, which takes 2 s
    "BalancedOptimizer": "integrations.balanced_optimizer",
    "PCGrad": "integrations.pcgrad",
    "PCGradSentenceTransformerTrainer": "integrations.balanced_sentence_transformers_trainer",
    "PCGradTrainer": "integrations.balanced_trainer",
    "TaskGradients": "task_gradients.task_gradients",
    "accelerate": "integrations.transformers_patch",
    "restore": "integrations.transformers_patch",
}


def __getattr__(name: str) -> object:
    if name in _ON_FIRST_USE:
        value = getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
        return globals().setdefault(name, value)
    if name in _OLD_NAMES:
        return renamed_attribute(name, globals(), _OLD_NAMES)
    return namesake_attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
