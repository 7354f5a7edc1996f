"""The benchmark of weight gradients on a CPU, and the table of a sweep over tiles."""

import torch
from rich.console import Console

from bench import linear, tile_sweep


def test_every_contestant_is_measured() -> None:
    cpu = torch.device("cpu")
    inputs = linear.Inputs((7, 5), 12, 3, torch.float32, cpu)
    assert inputs.offsets == [0, 4, 8, 12]
    measured = linear.measure(inputs, cpu, rounds=2)
    assert measured["seconds"].keys() == {linear.OURS, linear.PEER, linear.FLOOR}
    assert measured["flops"] == 2 * 12 * 7 * 5
    assert measured["bytes"] == 4 * (12 * (7 + 5) + 3 * 7 * (5 + 1))


def test_the_table_of_a_sweep_marks_the_least() -> None:
    seconds = {"one": {"a": [2e-6, 2e-6], "b": [1e-6, 1e-6]}, "two": {"a": [3e-6], "b": [4e-6]}}
    console = Console(width=60, record=True)
    console.print(tile_sweep.table_of("title", "tiles", seconds))
    text = console.export_text()
    assert "1.0 *" in text
    assert "3.0 *" in text
    assert text.count("*") == 2


def test_what_goes_wrong_is_told() -> None:
    def fail() -> None:
        raise RuntimeError("out of shared memory")

    assert tile_sweep.attempt(fail) == "RuntimeError: out of shared memory"
    assert tile_sweep.attempt(list) == ""
