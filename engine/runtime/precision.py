"""Choose a run's device and the dtype that it computes in."""

import torch

from ..utils.errors import InputError, first_line


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU if there is one, else the CPU.

    Raises:
        InputError: no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"--device {name}: not supported; give cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {first_line(error)}; give cpu or cuda") from None
    return device


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Return whether the hardware has bf16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights, activations and gradients for a recipe's ``precision``."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16_fast(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Make torch round the factors of fp32 products for ``tf32``, and not for anything else.

    Raises:
        InputError: tf32 on a device that does not have it.
    """
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not has_tf32:
        raise InputError(
            "precision = tf32: needs a GPU of compute capability 8.0 or higher (A100, RTX 3090, "
            "L4, H100, …); take fp32"
        )
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
