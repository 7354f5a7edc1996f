"""A bidirectional LSTM over packed sequences, without asking the host for their lengths."""

import torch
from torch import Tensor, nn


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
        inside = (place < lengths)[..., None]
        last = (lengths - 1).clamp(min=0)[..., None]
        states = []
        for lstm, index in (
            (self.forwards, first[:, None] + place),
            (self.backwards, end[:, None] - 1 - place),
        ):
            padded = tokens[index.clamp(0, len(tokens) - 1)] * inside
            output, _ = lstm(padded)
            states.append(output.gather(1, last.expand(-1, -1, output.shape[2])).squeeze(1))
        return torch.cat(states, dim=1)
