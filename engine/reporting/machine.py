"""The machine and the versions that a report was made with."""

import platform
import subprocess
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..runtime.precision import multiplies_bf16_fast

_REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE = 10.0
"""Seconds that git may take."""


class Machine(BaseModel):
    """Versions and device where a folder was read, which a run's folder does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    engine: str
    """Version of this project."""
    commit: str
    """Of its git checkout, ``+`` behind it where files differ; empty if it is none."""
    torch_version: str
    device: str
    """Name of the GPU or CPU."""
    bf16: bool
    """Whether ``precision = "auto"`` computes in bf16 there; else in fp32."""

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Return this machine."""
        return cls(
            engine=__version__,
            commit=_commit(),
            torch_version=torch.__version__,
            device=_name(device),
            bf16=multiplies_bf16_fast(device),
        )

    def __str__(self) -> str:
        commit = f" ({self.commit})" if self.commit else ""
        auto = "bf16" if self.bf16 else "fp32"
        return (
            f"superbert-engine {self.engine}{commit}, torch {self.torch_version}, {self.device}, "
            f"where precision auto is {auto}"
        )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "CPU")


def _commit() -> str:
    if not (_REPOSITORY / ".git").exists():
        return ""
    commit = _git("rev-parse", "HEAD")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    """Return what git prints; nothing where it is missing or refuses the folder."""
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
