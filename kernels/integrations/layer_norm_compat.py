"""Norms under the names that BERT trainers import: apex's modules, flash-attn's function."""

import torch
from torch import Tensor, nn

from ..layer_norm.layer_norm import dropout_add_layer_norm, layer_norm, refuse_given, rms_norm


class FusedLayerNorm(nn.LayerNorm):
    """Layer norm as a module, with the arguments of apex's.

    A `torch.nn.LayerNorm` to whoever asks, as those do who exempt norms from weight decay.

    Args:
        normalized_shape: width of the last dimension, as a number or a sequence of one.
        eps: added to the variance.
        elementwise_affine: whether there is a weight and a bias.
        memory_efficient: accepted for apex's sake; nothing more is kept than the input, which the
            caller keeps anyway.

    Raises:
        ValueError: more than one normalised dimension.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"normalized_shape: expected one dimension, got {self.normalized_shape}"
            )
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension.

        Args:
            input: ``[..., N]``, any floating dtype.

        Returns:
            ``[..., N]`` in the dtype of ``input``.

        Raises:
            ValueError: its last dimension is not N.
        """
        if input.shape[-1:] != self.normalized_shape:
            raise ValueError(
                f"input: expected [..., {self.normalized_shape[0]}], got {list(input.shape)}"
            )
        return layer_norm(input, self.weight, self.bias, self.eps)


class FusedRMSNorm(nn.RMSNorm):
    """RMS norm as a module, with the arguments of apex's; a `torch.nn.RMSNorm` to whoever asks.

    Args:
        normalized_shape: the last dimensions, or the width of the last.
        eps: added to the mean square.
        elementwise_affine: whether there is a weight.
        memory_efficient: accepted for apex's sake, as :class:`FusedLayerNorm` does.
    """

    eps: float

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimensions, together.

        Args:
            input: ``[..., *normalized_shape]``, any floating dtype.

        Returns:
            The shape and the dtype of ``input``.

        Raises:
            ValueError: its last dimensions are others.
        """
        dims = len(self.normalized_shape)
        if tuple(input.shape[-dims:]) != tuple(self.normalized_shape):
            raise ValueError(
                f"input: expected [..., {', '.join(map(str, self.normalized_shape))}], "
                f"got {list(input.shape)}"
            )
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(input.flatten(-dims), weight, self.eps).view(input.shape)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Give ``layer_norm(residual + dropout(x))``, with flash-attn's arguments and defaults.

    Args:
        x: ``[..., N]``, any floating dtype.
        weight: ``[N]``, any floating dtype.
        bias: ``[N]`` or None.
        residual: shape of ``x``, or None.
        x1: not supported, nor are weight1, bias1, rowscale, zero_centered_weight,
            return_dropout_mask, out and residual_out, which a BERT has no use for.
        weight1: see x1.
        bias1: see x1.
        eps: added to the variance.  BERT's is 1e-12.
        dropout_p: probability to drop an element of ``x``; 0 outside training.
        rowscale: see x1.
        prenorm: return ``residual + dropout(x)`` too, as `dropout_add_layer_norm` does.
        residual_in_fp32: keep that sum in float32 where there is no residual.
        zero_centered_weight: see x1.
        is_rms_norm: RMS norm, which takes no mean off.
        return_dropout_mask: see x1.
        out_dtype: dtype of the result; x's when None.
        out: see x1.
        residual_out: see x1.

    Returns:
        ``[..., N]`` in ``out_dtype``; with ``prenorm`` also the sum, ``[..., N]`` in the wider
        dtype of x and residual.

    Raises:
        NotImplementedError: an argument that is not supported; the message names it.
        ValueError: a shape, dtype, device or range that does not fit; the message names it.
    """
    refuse_given(
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        rowscale=rowscale,
        zero_centered_weight=zero_centered_weight,
        return_dropout_mask=return_dropout_mask,
        out=out,
        residual_out=residual_out,
    )
    result = dropout_add_layer_norm(
        *(x, residual, weight, bias, dropout_p, eps),
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    dtype = x.dtype if out_dtype is None else out_dtype
    if isinstance(result, Tensor):
        return result.to(dtype)
    normalised, hidden = result
    return normalised.to(dtype), hidden
