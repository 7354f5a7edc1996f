"""One rank that gathers arrays and values: ``python -m tests.engine.distributed.gathering_rank``.

Arrays are sent in pieces of a few bytes; the first line of what it prints says that all is as
expected.
"""

import sys

import numpy as np
import pytest
import torch

from engine.distributed import ranks as module
from engine.distributed.ranks import Ranks
from engine.utils.errors import InputError


def own(rank: int, dtype: type) -> np.ndarray:
    """Return what a rank sends: rank 1 has nothing."""
    return np.arange(6 * rank * (rank - 1), dtype=dtype).reshape(-1, 2) + rank


def fail(ranks: Ranks, failing: set[int]) -> None:
    """Fail on some ranks: on all of them with the same line."""
    with ranks.failing_together():
        if ranks.rank in failing:
            raise InputError("bad" + f" {ranks.rank}" * (len(failing) < 3))


def be_a_rank() -> None:
    """Gather, and fail together."""
    module._CHUNK = 10
    ranks = Ranks.from_environment()
    with ranks.init(torch.device("cpu"), 60):
        for dtype in (np.uint16, np.int32, np.int64):
            sent = own(ranks.rank + 1, dtype)
            sent.flags.writeable = False
            for rank, found in enumerate(ranks.gather_array(sent)):
                np.testing.assert_array_equal(found, own(rank + 1, dtype))
                assert found.dtype == dtype
        words = ["", "ä", None]
        assert ranks.gather_values(words[ranks.rank]) == words
        for failing, line in (({1, 2}, "rank 1 of 3: bad 1"), ({0, 1, 2}, "bad")):
            with pytest.raises(InputError, match=f"^{line}$"):
                fail(ranks, failing)
        with ranks.failing_together():
            pass
    sys.stdout.write(f"rank {ranks.rank} is done\n")


if __name__ == "__main__":
    be_a_rank()
