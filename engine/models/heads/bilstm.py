"""A bidirectional LSTM over packed sequences, without asking the host for their lengths.

On a GPU torch's LSTM is cuDNN's.  By torch's documentation its gradients repeat to the bit only
with ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the environment.
"""

import torch
from torch import Tensor, nn

from ..._kernels import kernels


class BiLstm(nn.Module):
    """An LSTM in each direction over the tokens after [CLS]; its output joins both last states.

    Args:
        width: of the tokens, H; each direction has H / 2 units.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(width, width // 2, batch_first=True)
        self.backwards = nn.LSTM(width, width - width // 2, batch_first=True)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Reduce each sequence of ``tokens [T, H]`` to one vector.

        Args:
            tokens: ``[T, H]``.
            cu_seqlens: ``[S + 1]`` int32; one token sequences give the states of no token.
            max_seqlen: tokens in the longest sequence, or more.

        Returns:
            ``[S, H]``.
        """
        first, end = cu_seqlens[:-1].long() + 1, cu_seqlens[1:].long()
        place = torch.arange(max(1, max_seqlen - 1), device=tokens.device)
        lengths = (end - first)[:, None]
        inside = place < lengths
        last = (lengths - 1).clamp(min=0).squeeze(1)
        last += torch.arange(len(last), device=tokens.device) * len(place)
        states = []
        for lstm, index in (
            (self.forwards, first[:, None] + place),
            (self.backwards, end[:, None] - 1 - place),
        ):
            # -1 stands for zeros.
            padded = kernels.take_rows(tokens, index.where(inside, -1).flatten())
            output, _ = lstm(padded.unflatten(0, index.shape))
            states.append(kernels.take_rows(output.flatten(0, 1), last))
        return torch.cat(states, dim=1)
