"""Deal files to ranks: a function of what each of them sees."""

import itertools
import random

import pytest

from engine.runs.rank_files import deal
from engine.training.rank_sets import shares
from engine.utils.errors import InputError

ALL = {"a": 50, "b": 30, "c": 30, "d": 10, "e": 5}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([ALL], ["abcde"]),
        ([ALL, ALL], ["ade", "bc"]),
        ([ALL, ALL, ALL], ["a", "bd", "ce"]),
        ([{"a": 1}, {"b": 1}], ["a", "b"]),
        ([{"a": 9, "b": 1}, {"a": 9}], ["b", "a"]),  # what one rank alone sees comes first
        ([{"a": 9, "b": 9}, {"a": 9, "b": 9}, {"c": 1}], ["a", "b", "c"]),
        ([{"a": 0, "b": 0}] * 2, ["a", "b"]),
        ([{}, {"a": 1}], ["", "a"]),
        ([{"a": 1}] * 3, ["a", "", ""]),
        ([{}, {}], ["", ""]),
    ],
)
def test_files_go_to_those_that_see_them(seen: list[dict[str, int]], expected: list[str]) -> None:
    assert ["".join(sorted(own)) for own in deal(seen)] == expected


@pytest.mark.parametrize(
    ("ranks", "files", "machines"), [*itertools.product([2, 5], [5, 40], [1, 2])]
)
def test_each_file_once_and_evenly(ranks: int, files: int, machines: int) -> None:
    draw = random.Random(f"{ranks} {files} {machines}")
    sizes = {f"part-{number}": draw.randint(100, 200) for number in range(files)}
    of_machine = [
        {name: size for at, (name, size) in enumerate(sizes.items()) if at % machines == machine}
        for machine in range(machines)
    ]
    seen = [of_machine[rank * machines // ranks] for rank in range(ranks)]
    dealt = deal(seen)
    assert sorted(file for own in dealt for file in own) == sorted(sizes)
    assert all(set(own) <= seen[rank].keys() for rank, own in enumerate(dealt))
    for machine in of_machine:
        held = [
            sum(sizes[file] for file in own)
            for own, files_seen in zip(dealt, seen, strict=True)
            if files_seen is machine
        ]
        assert max(held) - min(held) <= 200
    backwards = [dict(reversed(own.items())) for own in seen]
    assert deal(backwards) == dealt


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [
        ([5, 7], 0, [5, 7]),
        ([5, 7], 12, [5, 7]),
        ([10, 30], 20, [5, 15]),
        ([1, 1000], 10, [1, 9]),
        ([1, 1, 4], 3, [1, 1, 1]),
        ([10, 10, 10], 11, [4, 4, 3]),
    ],
)
def test_shares_of_a_limit(rows: list[int], limit: int, expected: list[int]) -> None:
    assert shares(rows, limit, "mood") == expected


def test_a_limit_below_the_number_of_ranks() -> None:
    with pytest.raises(InputError, match="max_train_examples = 1: too few for the 2 ranks"):
        shares([3, 4], 1, "mood")
