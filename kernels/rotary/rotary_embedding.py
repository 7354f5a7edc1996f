"""Cosines and sines of rotary position embeddings, and flash-attn's module that has its own."""

from typing import Any

import torch
from torch import Tensor, nn

from .rotary import apply_rotary_emb_qkv_
from .rotary_checks import check_columns


def rotary_tables(
    num_positions: int,
    rotary_dim: int,
    base: float = 10000.0,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions.

    Angles are products of float32 numbers, rounded to float32, as transformers' and flash-attn's
    are; models were trained with them.  In float64 angles would be exact, and cosines another by
    5e-4 at 8,192 positions.

    Args:
        num_positions: N.
        rotary_dim: R, even: columns of a head that are rotated.
        base: of the frequencies ``base ** (-2 i / R)``.
        device: of the tables, which the CPU computes.

    Returns:
        cos and sin ``[N, R / 2]``, float32.

    Raises:
        ValueError: a number is out of range.
    """
    if num_positions < 0:
        raise ValueError(f"num_positions: expected at least 0, got {num_positions}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number of at least 2, got {rotary_dim}")
    if not 0 < base < float("inf"):
        raise ValueError(f"base: expected a finite number above 0, got {base}")
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    frequencies = 1.0 / base ** (torch.arange(0, rotary_dim, 2, **on_cpu) / rotary_dim)
    angles = torch.arange(num_positions, **on_cpu)[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


class RotaryEmbedding(nn.Module):
    """`apply_rotary_emb_qkv_` with tables of its own, in the manner of flash-attn's module.

    The tables are float32 whatever the module's dtype, in no state dict, and computed anew where a
    call needs more positions or another device; a CUDA graph is recorded after a call that needed
    as many.

    Args:
        dim: R, even: columns of a head that are rotated.
        base: of the frequencies.
        interleaved: pairs are columns 2i and 2i + 1, not i and i + R / 2.
        scale_base: not supported (XPos).
        device: of the first tables.

    Raises:
        ValueError: as `rotary_tables`.
        NotImplementedError: ``scale_base`` is given.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scale_base is not None:
            raise NotImplementedError("scale_base: not supported by this rotary embedding")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self._tables = rotary_tables(0, dim, self.base, device=device)

    def tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the first positions.

        Args:
            num_positions: how many are needed.
            device: of the tables.

        Returns:
            Two tables ``[N, R / 2]``, float32, of ``num_positions`` or more.
        """
        cos, _ = self._tables
        if len(cos) < num_positions or cos.device != device:
            count = max(num_positions, len(cos))
            self._tables = rotary_tables(count, self.dim, self.base, device=device)
        return self._tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Rotate queries and keys in place, as `apply_rotary_emb_qkv_`.

        Args:
            qkv: shapes and dtypes as there, and so are num_heads_q, cu_seqlens and position_ids.
            kv: not supported.
            seqlen_offset: as ``seqlen_offsets`` there.
            max_seqlen: positions that the tables have at least.  Needed where a tensor says them:
                with position_ids, or offsets that are a tensor; else the length of a batch entry,
                or of the stream, plus the offset.
            num_heads_q: see qkv.
            cu_seqlens: see qkv.
            position_ids: see qkv.

        Returns:
            qkv, or another view of its memory.

        Raises:
            ValueError: as `apply_rotary_emb_qkv_`, and so are the other exceptions; or
                max_seqlen is needed.
        """
        if kv is not None:
            raise NotImplementedError("kv: not supported by this rotary embedding")
        check_columns("qkv", qkv)
        is_known = position_ids is None and not isinstance(seqlen_offset, Tensor)
        if max_seqlen is None:
            if not is_known:
                raise ValueError("max_seqlen: needed with position_ids, or offsets in a tensor")
            if qkv.dim() < 2:
                raise ValueError(f"qkv: expected at least 3 dimensions, got {list(qkv.shape)}")
            max_seqlen = qkv.shape[0 if cu_seqlens is not None else 1]
        offset = 0 if isinstance(seqlen_offset, Tensor) else max(0, seqlen_offset)
        cos, sin = self.tables(max_seqlen + offset, qkv.device)
        return apply_rotary_emb_qkv_(
            *(qkv, cos, sin, None, None, self.interleaved, seqlen_offset, num_heads_q),
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
        )

    def extra_repr(self) -> str:
        """Return what torch prints of it."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
