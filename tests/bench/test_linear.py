"""The benchmark of weight gradients on a CPU."""

import torch

from bench import linear


def test_every_contestant_is_measured() -> None:
    cpu = torch.device("cpu")
    inputs = linear.Inputs((7, 5), 12, 3, torch.float32, cpu)
    assert inputs.offsets == [0, 4, 8, 12]
    measured = linear.measure(inputs, cpu, rounds=2)
    assert measured["seconds"].keys() == {linear.OURS, linear.PEER, linear.FLOOR}
    assert measured["flops"] == 2 * 12 * 7 * 5
    assert measured["bytes"] == 4 * (12 * (7 + 5) + 3 * 7 * (5 + 1))
