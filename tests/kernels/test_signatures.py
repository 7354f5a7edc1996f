"""Changing an import is enough: arguments, order and defaults of flash-attn's and apex's functions.

As of flash-attention 0251105 and apex 6424da3; arguments of our own follow and take a keyword.
"""

import inspect
from collections.abc import Callable

import pytest

from kernels import (
    FusedLayerNorm,
    FusedRMSNorm,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_qkv_,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    layer_norm_fn,
    pad_input,
    unpad_input,
)

_ATTENTION = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    flash_attn_varlen_func: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        f"{_ATTENTION}, block_table=None"
    ),
    flash_attn_varlen_qkvpacked_func: f"qkv, cu_seqlens, max_seqlen, {_ATTENTION}",
    unpad_input: "hidden_states, attention_mask, unused_mask=None",
    pad_input: "hidden_states, indices, batch, seqlen",
    layer_norm_fn: (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, "
        "dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, "
        "zero_centered_weight=False, is_rms_norm=False, return_dropout_mask=False, "
        "out_dtype=None, out=None, residual_out=None"
    ),
    # flash-attn demands dropout_p and epsilon.
    dropout_add_layer_norm: (
        "x0, residual, weight, bias, dropout_p=0.0, epsilon=1e-12, rowscale=None, layerscale=None, "
        "prenorm=False, residual_in_fp32=False, return_dropout_mask=False"
    ),
    dropout_add_rms_norm: (
        "x0, residual, weight, bias, dropout_p=0.0, epsilon=1e-06, rowscale=None, layerscale=None, "
        "prenorm=False, residual_in_fp32=False, return_dropout_mask=False"
    ),
    FusedLayerNorm: (
        "normalized_shape, eps=1e-05, elementwise_affine=True, memory_efficient=False"
    ),
    FusedRMSNorm: "normalized_shape, eps=1e-05, elementwise_affine=True, memory_efficient=False",
    apply_rotary_emb: (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
        "max_seqlen=None"
    ),
    apply_rotary_emb_qkv_: (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
        "num_heads_q=None"
    ),
    RotaryEmbedding: "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    RotaryEmbedding.forward: (
        "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"
    ),
    FusedLayerNorm.forward: "self, input",
    FusedRMSNorm.forward: "self, input",
}


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES.items(), ids=[f.__qualname__ for f in SIGNATURES]
)
def test_arguments_order_and_defaults(function: Callable[..., object], expected: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional)
    assert ", ".join(found) == expected
