"""Ranks tell each other arrays and values, and fail together."""

from pathlib import Path

import numpy as np
import pytest

from engine.distributed.ranks import Ranks
from engine.utils.errors import InputError

from ...launch import start_ranks


def test_three_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = start_ranks(3, ["tests.engine.distributed.gathering_rank"], log)
    assert [process.wait(timeout=120) for process in processes] == [0] * 3, log.read_text()
    for rank in range(3):
        assert f"rank {rank} is done" in log.read_text()


def test_one_rank() -> None:
    array = np.arange(3)
    (found,) = Ranks().gather_array(array)
    assert found is array
    assert Ranks().gather_values({"a": 1}) == [{"a": 1}]
    with pytest.raises(InputError, match=r"^bad$"), Ranks().failing_together():
        raise InputError("bad")
