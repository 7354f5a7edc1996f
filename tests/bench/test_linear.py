"""The benchmark of linear layers on a CPU."""

import torch

from bench import linear
from kernels.linear.linear import HAS_ONEDNN, MULTIPLIES_BF16

CPU = torch.device("cpu")


def test_every_contestant_is_measured() -> None:
    inputs = linear.Inputs((7, 5), 12, [1, 1, 1], torch.float32, CPU)
    assert inputs.offsets == [0, 4, 8, 12]
    measured = linear.measure(inputs, CPU, rounds=2)
    assert measured["seconds"].keys() == {linear.OURS, linear.PEER, linear.FLOOR}
    assert measured["flops"] == 2 * 12 * 7 * 5
    assert measured["bytes"] == 4 * (12 * (7 + 5) + 3 * 7 * (5 + 1))
    assert linear.measure_products(inputs, rounds=2) == {}


def test_the_other_passes_are_measured_where_their_products_are_ours() -> None:
    inputs = linear.Inputs((7, 5), 12, [3, 1], torch.bfloat16, CPU)
    assert inputs.offsets == [0, 9, 12]
    measured = linear.measure_products(inputs, rounds=2)
    if not MULTIPLIES_BF16:
        assert measured == {}
        return
    onednn = {linear.ONEDNN} if HAS_ONEDNN else set()
    assert measured[linear.FORWARD]["seconds"].keys() == {linear.OURS, linear.TORCH} | onednn
    assert measured[linear.GRAD_INPUT]["seconds"].keys() == {linear.OURS, linear.TORCH}
    for each in measured.values():
        assert each["flops"] == 2 * 12 * 7 * 5
        assert each["bytes"] == 2 * (12 * (7 + 5) + 7 * 5)
