"""Find, verify and read the checkpoints of a run.

    checkpoints/step-00000376/   everything that resuming needs; the newest few are kept
    checkpoints/best-00000188/   the weights that scored best on the dev sets

A ``step`` checkpoint holds the flat vectors by bucket, as torch.distributed.checkpoint wrote them
(checkpoints/async_writer.py), whatever the number of ranks; a ``best`` one holds the weights by
name.  Random numbers and the order of the examples follow from the recipe's seed and the step, so
no generator needs saving.  Tensors are stored as safetensors: no pickle is read.
"""

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..models.multitask import MultitaskModel
from ..models.stored_dtypes import check_stored_dtypes
from ..utils.errors import InputError
from ..utils.files import is_partial, remove_folder, whole_folder
from ..utils.finite import all_finite
from .manifest import Manifest, Progress, read_manifest, seal, verify

_NAME = re.compile(r"(step|best)-(\d{8})")
_WEIGHTS = "model.safetensors"

FILES = re.compile(
    r"manifest\.json|\.manifest\.json-[0-9a-f]{8}\.partial|[\w.-]+\.safetensors|\.tmp\w{6}",
    re.ASCII,
)
"""The names of files in a checkpoint, whole or being written (``.tmp…`` by safetensors)."""

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints`` in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"{kind}-{step:08}"

    def all(self, kind: str) -> list[Path]:
        """Return the checkpoints of ``kind`` (``step`` or ``best``), the newest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted((path for path in found if path.name.startswith(kind)), reverse=True)

    def find(self, kind: str) -> Path | None:
        """Return the newest checkpoint of ``kind`` that is as it was written, or None.

        Raises:
            InputError: there are some, but all are damaged.
        """
        damage: InputError | None = None
        looked_at = set[Path]()
        while untried := [path for path in self.all(kind) if path not in looked_at]:
            path = untried[0]
            looked_at.add(path)
            try:
                verify(path)
            except InputError as error:
                if os.path.lexists(path):  # else the process that trains has a newer one
                    damage = damage or error
                    log.warning("%s; looking for an older checkpoint", error)
                continue
            return path
        if damage is not None:
            raise InputError(f"{damage}; no other checkpoint is whole, train the run again")
        return None

    def progress(self) -> Progress:
        """Return the progress of the newest checkpoint to resume from."""
        path = self.find("step")
        return Progress() if path is None else read_manifest(path).progress

    def save_best(self, progress: Progress, weights: Mapping[str, Tensor]) -> None:
        """Write the weights alone, as the best so far, then remove those before."""
        with whole_folder(self.path("best", progress.step), FILES) as partial:
            save_file(dict(weights), partial / _WEIGHTS)
            seal(partial, Manifest(progress=progress))
        self.keep("best", 1)

    def keep(self, kind: str, count: int) -> None:
        """Remove all but the newest ``count`` checkpoints of a kind, and those that hold more."""
        for path in self.all(kind)[count:]:
            try:
                remove_folder(path, FILES)
            except InputError as error:
                log.warning("%s; it stays", error)

    def sweep(self) -> None:
        """Remove the incomplete files of a run that was cut off."""
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if is_partial(path.name, _NAME):
                    with suppress(InputError):  # there is more in it
                        remove_folder(path, FILES)


def load_weights(checkpoint: Path, model: MultitaskModel) -> Progress:
    """Read a checkpoint's weights into a model of whole fp32 parameters.

    Returns:
        How far the run had come.

    Raises:
        InputError: they cannot be read, belong to another model or are not finite in fp32.
    """
    manifest = read_manifest(checkpoint)
    if manifest.places:
        tensors = dict(_weights_by_name(checkpoint, manifest))
    else:
        tensors = _read_tensors(checkpoint / _WEIGHTS)
    for name, target in model.state_dict().items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != target.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise InputError(f"{checkpoint}: {name} is {found}, expected {list(target.shape)}")
        with torch.no_grad():
            target.copy_(tensor)
        if not all_finite([target]):
            raise InputError(
                f"{checkpoint}: {name} holds values that are no finite numbers; train the run "
                "again with a lower lr, or take a checkpoint that is as it was written"
            )
    return manifest.progress


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


def _weights_by_name(checkpoint: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
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


def _read_tensors(file: Path) -> dict[str, Tensor]:
    check_stored_dtypes([file], lambda _: torch.float32)
    try:
        return load_file(file)
    except Exception as error:  # of dtypes that torch or the library lack, too
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
