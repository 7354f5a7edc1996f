"""Read the weights of a ``step`` checkpoint by name.

Apart from :mod:`engine.checkpoints.store`, since commands that read a ``best`` checkpoint need no
torch.distributed.checkpoint, which takes long to import.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..models.stored_dtypes import check_stored_dtypes
from ..utils.errors import InputError
from .manifest import Manifest


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turn errors of torch and safetensors into one line that a checkpoint cannot be read.

    Raises:
        InputError: in place of it.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, CheckpointException) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{checkpoint}: damaged: {reason[-1][:200]}") from error


def weights_by_name(checkpoint: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a ``step`` checkpoint, by one process however many wrote it."""
    weights = ("master.", "frozen.")
    check_stored_dtypes(
        sorted(checkpoint.glob("*.safetensors")),
        lambda name: torch.float32 if name.startswith(weights) else None,
    )
    reader = HuggingFaceStorageReader(str(checkpoint))
    with readable(checkpoint):
        stored = reader.read_metadata().state_dict_metadata
        wanted = {
            name: _unread(name, entry)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(weights)
        }
        with warnings.catch_warnings(action="ignore"):  # of being one process
            load(wanted, storage_reader=reader, no_dist=True)
        _check_places(manifest, {name: tensor.numel() for name, tensor in wanted.items()})
        for name, place in manifest.places.items():
            flat = wanted[f"master.{place.bucket}"].flatten()
            yield name, flat[place.offset : place.offset + math.prod(place.shape)].view(place.shape)
    for name, tensor in wanted.items():
        if name.startswith("frozen."):
            yield name.removeprefix("frozen."), tensor


def _unread(name: str, entry: TensorStorageMetadata) -> Tensor:
    """Return a tensor to read into, NaN so that what no file has cannot pass for a weight.

    Raises:
        ValueError: the pieces of it that the files have do not make it up.
    """
    if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
        raise ValueError(f"the pieces of {name} overlap or leave gaps")
    return torch.full(entry.size, math.nan)


def _check_places(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Check that each parameter has elements of its own.

    Raises:
        ValueError: two share some, or one leaves its bucket.
    """
    end_in = dict[str, int]()
    for name, place in sorted(manifest.places.items(), key=lambda item: item[1].offset):
        end = place.offset + math.prod(place.shape)
        if place.offset < end_in.get(place.bucket, 0):
            raise ValueError(f"the place of {name} overlaps another one")
        if end > sizes.get(f"master.{place.bucket}", 0):
            raise ValueError(f"the place of {name} is outside {place.bucket}")
        end_in[place.bucket] = end
