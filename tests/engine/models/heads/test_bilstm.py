"""The BiLSTM reader against torch's own, over packed sequences."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn

from engine.models.heads.bilstm import BiLstm

from .cases import WIDTH, head_of, states_of


def test_a_bilstm_reads_what_follows_cls_from_both_ends():
    """Against torch's bidirectional LSTM over packed sequences, joined with [CLS]."""
    sizes = [4, 9, 2, 6]
    tokens = torch.randn(sum(sizes), WIDTH)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    head = head_of("sst", "bilstm")
    lstm: BiLstm = head.lstm
    theirs = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
    state = lstm.forwards.state_dict()
    state |= {f"{name}_reverse": t for name, t in lstm.backwards.state_dict().items()}
    theirs.load_state_dict(state)

    behind_cls = [tokens[a + 1 : b] for a, b in pairwise(bounds.tolist())]
    packed = nn.utils.rnn.pack_sequence(behind_cls, enforce_sorted=False)
    with torch.no_grad():
        _, (last, _) = theirs(packed)
        cls = tokens[torch.from_numpy(bounds[:-1])]
        joined = head.joint(torch.cat([cls, last[0], last[1]], dim=1)).relu()
        expected = head.output(joined)
        found = head(
            states_of(cls)._replace(
                tokens=tokens,
                cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
                max_seqlen=max(sizes) + 3,
            )
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
