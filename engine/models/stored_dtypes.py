"""Read the dtypes of the tensors of safetensors files from their headers.

The library does not know every dtype that files have, and loading converts silently.  Weights are
read as F64, F32, F16 and BF16.  A float8 or smaller is refused too: its values mean nothing without
scales, which are stored elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..data.rows import shorten
from ..utils.errors import InputError
from ..utils.untrusted_io import parse_json

_FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
)
_INTEGERS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_DTYPES = {**_FLOATS, **_INTEGERS}

_LONGEST_HEADER = 100_000_000
"""Bytes; the library reads no longer one."""


def stored_dtypes(file: Path) -> dict[str, str]:
    """Return the dtype of each tensor of a file, as its header spells it.

    Nothing for a file without such a header, which the library refuses.
    """
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = parse_json(content.read(length)) if length <= _LONGEST_HEADER else None
    except (OSError, ValueError):
        return {}
    if not isinstance(header, dict):
        return {}
    return {
        name: str(entry.get("dtype"))
        for name, entry in header.items()
        if name != "__metadata__" and isinstance(entry, dict)
    }


def check_stored_dtypes(
    files: Iterable[Path], expected: Callable[[str], torch.dtype | None] = lambda _: None
) -> None:
    """Refuse files with tensors of unfamiliar dtypes, or of others than expected.

    Args:
        files: safetensors files.
        expected: the dtype that a tensor of a name has to have; None for any float or integer.

    Raises:
        InputError: the message names the first such tensor and its dtype.
    """
    for file in files:
        for name, dtype in stored_dtypes(file).items():
            wanted = expected(name)
            if dtype not in _DTYPES or wanted not in (None, _DTYPES[dtype]):
                known = next((key for key in _DTYPES if _DTYPES[key] == wanted), "")
                raise _unfamiliar(file, name, dtype, known or ", ".join(_FLOATS))


def check_floats(where: Path, name: str, tensor: Tensor) -> None:
    """Refuse a weight that is no floating-point number, rather than convert it.

    Raises:
        InputError: the message names it and its dtype.
    """
    if tensor.dtype not in _FLOATS.values():
        found = next((key for key in _DTYPES if _DTYPES[key] == tensor.dtype), str(tensor.dtype))
        raise _unfamiliar(where, name, found, ", ".join(_FLOATS))


def _unfamiliar(where: Path, name: str, found: str, expected: str) -> InputError:
    return InputError(
        f"{where}: weight {shorten(name, 120)} is stored as {shorten(found)}, expected {expected}; "
        "give a copy that is stored so"
    )
