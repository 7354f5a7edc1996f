"""Describe the machine and the installed software, for reports of problems.

Every fact is asked for by itself: what is missing or fails is said in its place, and nothing is
raised.  Names of users, hosts and folders are left out, since people paste the answer.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__

Facts = dict[str, Any]
"""Values by their names: texts, numbers, booleans, lists and further facts."""

PACKAGES = {
    "needed": ("numpy", "tokenizers", "safetensors", "huggingface_hub", "pydantic", "scikit-learn"),
    "for more files and data sets": ("datasets", "pyarrow"),
    "for --onnx": ("onnx", "onnxruntime", "onnxscript"),
    "trainers": ("transformers", "sentence-transformers", "accelerate", "peft", "lightning"),
}
_TOOLS = {
    "c++": ("c++", "--version"),
    "cmake": ("cmake", "--version"),
    "ninja": ("ninja", "--version"),
    "nvcc": ("nvcc", "--version"),
}
_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
_ROOT = Path(__file__).parents[2]


def describe_environment() -> Facts:
    """Return all facts, by topic."""
    topics: dict[str, Callable[[], Facts]] = {
        "project": _project,
        "system": _system,
        "processor": _processor,
        "torch": _torch,
        "gpus": _gpus,
        "tools": _tools,
        "packages": _packages,
        "kernels": _kernels,
    }
    return {topic: _attempted(facts) for topic, facts in topics.items()}


def _attempted(facts: Callable[[], Facts]) -> Facts:
    try:
        return facts()
    except Exception as error:  # whatever is broken here is what the report is for
        return {"failed": f"{type(error).__name__}: {without_folders(str(error))}"}


def without_folders(text: str) -> str:
    """Return a text in which each path is its last name alone, and the home folder ``~``."""
    home = os.path.expanduser("~")  # "~" as it is where nobody knows it
    if home.count("/") > 1:  # "/" or "/root" is nobody's
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(r"(?:/[^\s/:'\"]+)+/(?=[^\s/:'\"])", "…/", text)


def _project() -> Facts:
    installed = __package__.startswith("superbert.")
    facts = {"superbert-engine": __version__, "runs from": "a package" if installed else "a clone"}
    if not installed and (_ROOT / ".git").exists():
        commit = _output("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
        changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "-uno")
        facts["commit"] = f"{commit}, with changes" if changed else commit
    return facts


def _system() -> Facts:
    release = platform.release()
    within = [
        name
        for name, found in {
            "WSL": "microsoft" in release.lower(),
            "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
            "conda": "CONDA_PREFIX" in os.environ,
            "virtual environment": sys.prefix != sys.base_prefix,
        }.items()
        if found
    ]
    return {
        "system": f"{platform.system()} {release} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()) or "unknown",
        "within": within or "none of WSL, container, conda, virtual environment",
        "python": platform.python_version(),
        "memory, GiB": _memory(),
    }


def _memory() -> float | str:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "unknown"
    return round(pages / 2**30, 1)


def _processor() -> Facts:
    import torch

    capabilities = torch.cpu.get_capabilities()
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {
        "model": _model(),
        "cores": os.cpu_count(),
        "usable": len(usable),
        "features": [name for name in _FEATURES if capabilities.get(name)],
    }


def _model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def _torch() -> Facts:
    import torch

    return {
        "torch": torch.__version__,
        "built for CUDA": torch.version.cuda or "no",
        "built for ROCm": torch.version.hip or "no",
        "triton": _version("triton"),
        "CUDA available": torch.cuda.is_available(),
    }


def _gpus() -> Facts:
    import torch

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts: Facts = {"driver": driver.splitlines()[0] if driver else "not found"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        facts[f"cuda:{index}"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, {memory:.0f} GiB"
        )
    return facts


def _tools() -> Facts:
    own = os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", "")])
    found = {}
    for name, (program, argument) in _TOOLS.items():
        path = shutil.which(program, path=own)
        text = _output(path, argument) if path else ""
        version = re.search(r"\d+(?:\.\d+)+", text.partition("release ")[2] or text)
        found[name] = version[0] if version else "not found"
    return found


def _packages() -> Facts:
    return {topic: {name: _version(name) for name in names} for topic, names in PACKAGES.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> Facts:
    """Return how many operators each backend runs, and which ones plain torch runs."""
    from .._kernels import kernels

    declared = kernels.backends()
    facts: Facts = {}
    for device in ("cpu", "cuda"):
        counts = Counter(kind for (_, place), kind in declared.items() if place == device)
        facts[device] = dict(counts.most_common())
        facts[f"torch operations on {device}"] = sorted(
            op for (op, place), kind in declared.items() if (place, kind) == (device, "torch")
        )
    return facts


def _output(*command: str) -> str:
    """Return what a program prints; nothing if it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return run.stdout.strip()
