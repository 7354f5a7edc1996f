"""Ranks find each other after a restart, in a store that holds what was written before."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from engine.distributed.ranks import _name_attempt

SIZE = 4


def names(store: Store, ranks: range, seconds: float = 30) -> list[tuple[str, bool]]:
    """What each rank is told."""
    patience = timedelta(seconds=seconds)
    with ThreadPoolExecutor(len(ranks)) as pool:
        every = [pool.submit(_name_attempt, store, rank, SIZE, patience) for rank in ranks]
        return [each.result() for each in every]


def test_each_attempt_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torchrun's agents count."""
    store, found = HashStore(), set[str]()
    for count in ("0", "1", "0"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        told = names(store, range(SIZE))
        assert told == [(told[0][0], True)] * SIZE
        found.add(told[0][0])
    assert len(found) == 3


def test_a_rank_that_does_not_come_is_noticed() -> None:
    store = HashStore()
    names(store, range(SIZE))  # words of an attempt before are there
    (name, all_came), *others = names(store, range(SIZE - 1), 0.5)
    assert not all_came
    assert others == [(name, True)] * (SIZE - 2)
    assert names(store, range(1, SIZE), 0.5) == [("", False)] * (SIZE - 1)
