"""Where a run computes, and in what."""

import torch

from ..errors import InputError


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU if there is one, else the CPU.

    Raises:
        InputError: no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: {reason}; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not supported; give cpu or cuda")
    return device


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Return whether the hardware has bf16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return what a recipe's ``precision`` means on ``device``."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16_fast(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
