"""Kernels for BERT trainers: attention, layer norm and gradient surgery.

Each works on a GPU (Triton, CUDA) and on a CPU (C++, torch) under the same name;
:func:`implementation` tells which one runs.
"""

from . import balancing
from ._namesake import namesake_attribute
from .attention import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from .balanced_optimizer import BalancedOptimizer
from .dropout import dropout
from .embedding import embedding, wipe_
from .implementation import implementation
from .layer_norm import FusedLayerNorm, dropout_add_layer_norm, layer_norm
from .linear import linear
from .pcgrad import PCGrad
from .surgery import combine, combine_adamw_, draw_order, gram, pcgrad_weights, update_guard
from .task_gradients import TaskGradients
from .task_rows import TaskRows, TaskSegments

__all__ = [
    "BalancedOptimizer",
    "FusedLayerNorm",
    "PCGrad",
    "TaskGradients",
    "TaskRows",
    "TaskSegments",
    "balancing",
    "combine",
    "combine_adamw_",
    "draw_order",
    "dropout",
    "dropout_add_layer_norm",
    "embedding",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "gram",
    "implementation",
    "layer_norm",
    "linear",
    "pcgrad_weights",
    "update_guard",
    "wipe_",
]


def __getattr__(name: str) -> object:
    return namesake_attribute(__name__, name)
