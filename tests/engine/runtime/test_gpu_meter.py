"""The sensors of a GPU that is there."""

import pytest
import torch

from engine.runtime.gpu import GpuMeter


@pytest.mark.gpu
def test_the_meter_of_a_real_gpu():
    meter = GpuMeter.find(torch.device("cuda"))
    assert meter is not None
    readings = meter.read()
    assert 0 < readings["temperature_c"] < 120
    assert readings["memory_mib"] > 0
