"""Read a GPU's own sensors by NVIDIA's management library (the package ``nvidia-ml-py``)."""

from collections.abc import Callable
from typing import Any

import torch

_MIB = 1 << 20


class GpuMeter:
    """A reader of one GPU's sensors; no reading waits for the GPU's work.

    Args:
        library: the module ``pynvml``, initialised.
        handle: the GPU, as that library knows it.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def find(cls, device: torch.device) -> "GpuMeter | None":
        """Return the meter of a device, or None where there are no sensors to read."""
        if device.type != "cuda":
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
            # By its UUID: the library counts GPUs that CUDA_VISIBLE_DEVICES hides, too.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            return None

    def read(self) -> dict[str, float]:
        """Return the readings; what a GPU has no sensor for is left out.

        Power in W, energy since the driver was loaded in J, temperature in °C, memory in use by
        all processes in MiB, clocks of the multiprocessors and the memory in MHz, utilization in %.
        """
        nvml, handle = self._library, self._handle
        readings: dict[str, Callable[[], float]] = {
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _MIB,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        }
        values = {}
        for name, read in readings.items():
            try:
                values[name] = float(read())
            except nvml.NVMLError:
                continue
        return values
