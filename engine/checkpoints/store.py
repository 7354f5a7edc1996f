"""Find, verify and read the checkpoints of a run.

    checkpoints/step-00000376/   everything that resuming needs; the newest few are kept
    checkpoints/best-00000188/   the weights that scored best on the dev sets
    checkpoints/top-00000188/    weights that the average at the end may need (average_best)
    checkpoints/average-00000376/   that average, if it scores at least as well as the best

A ``step`` checkpoint holds the flat vectors by bucket, as torch.distributed.checkpoint wrote them
(checkpoints/async_writer.py), whatever the number of ranks; the others hold the weights by
name.  Random numbers and the order of the examples follow from the recipe's seed and the step, so
no generator needs saving.  Tensors are stored as safetensors: no pickle is read.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.multitask import MultitaskModel
from ..models.stored_dtypes import check_stored_dtypes
from ..utils.errors import InputError
from ..utils.files import is_partial, remove_folder, whole_folder
from ..utils.finite import all_finite
from .manifest import Manifest, Progress, read_manifest, seal, verify

KINDS = ("step", "best", "top", "average")
_NAME = re.compile(rf"({'|'.join(KINDS)})-(\d{{8}})")
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
        """Return the checkpoints of ``kind``, one of ``KINDS``, the newest first."""
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

    def find_first(self, kinds: Iterable[str]) -> Path | None:
        """Return what :meth:`find` does of the first kind that there is, or None."""
        return next(filter(None, map(self.find, kinds)), None)

    def progress(self) -> Progress:
        """Return the progress of the newest checkpoint to resume from."""
        path = self.find("step")
        return Progress() if path is None else read_manifest(path).progress

    def save_weights(
        self,
        kind: str,
        progress: Progress,
        weights: Mapping[str, Tensor],
        thresholds: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    ) -> None:
        """Write the weights alone.

        ``thresholds`` are those that they were scored with, by task.
        """
        with whole_folder(self.path(kind, progress.step), FILES) as partial:
            save_file(dict(weights), partial / _WEIGHTS)
            seal(partial, Manifest(progress=progress, thresholds=dict(thresholds)))

    def save_best(
        self,
        progress: Progress,
        weights: Mapping[str, Tensor],
        thresholds: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    ) -> None:
        """Write the weights alone, as the best so far, then remove those before."""
        self.save_weights("best", progress, weights, thresholds)
        self.keep("best", 1)

    def keep(self, kind: str, count: int) -> None:
        """Remove all but the newest ``count`` checkpoints of a kind, and those that hold more."""
        self._remove(self.all(kind)[count:])

    def keep_top(self, now: Iterable[Progress]) -> None:
        """Remove the ``top`` checkpoints that neither these name nor any ``step`` checkpoint."""
        named = list(now)
        for path in self.all("step"):
            with suppress(InputError):  # damaged or gone by now: no run goes on from it
                named.append(read_manifest(path).progress)
        needed = {self.path("top", step) for progress in named for step, _ in progress.top}
        self._remove(path for path in self.all("top") if path not in needed)

    @staticmethod
    def _remove(checkpoints: Iterable[Path]) -> None:
        for path in checkpoints:
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


def average_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights of checkpoints of one run, fp32, summed in float64.

    Each tensor is read when its turn comes, so that one set of weights is in memory.

    Args:
        checkpoints: that hold weights by name; at least one.

    Raises:
        InputError: one cannot be read, or has other weights than the first.
    """
    files = [checkpoint / _WEIGHTS for checkpoint in checkpoints]
    check_stored_dtypes(files, lambda _: torch.float32)
    averages = dict[str, Tensor]()
    with ExitStack() as stack:
        archives = [(file, _open(stack, file)) for file in files]
        shapes = [
            {name: archive.get_slice(name).get_shape() for name in archive.keys()}  # noqa: SIM118
            for _, archive in archives
        ]
        for file, own in zip(files, shapes, strict=True):
            for name in sorted(own.keys() | shapes[0].keys()):
                if own.get(name) != shapes[0].get(name):
                    raise InputError(f"{file}: {name} is not as in {files[0]}; train the run again")
        for name in shapes[0]:
            total = torch.zeros(shapes[0][name], dtype=torch.float64)
            for file, archive in archives:
                total += _get(file, archive, name)
            averages[name] = (total / len(files)).float()
    return averages


def _open(stack: ExitStack, file: Path) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None


def _get(file: Path, archive: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = archive.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
    return tensor


def load_weights(checkpoint: Path, model: MultitaskModel) -> Progress:
    """Read a checkpoint's weights and thresholds into a model of whole fp32 parameters.

    Returns:
        How far the run had come.

    Raises:
        InputError: they cannot be read, belong to another model or are not finite in fp32.
    """
    manifest = read_manifest(checkpoint)
    if manifest.places:
        from .step_weights import weights_by_name  # half a second, of torch.distributed.checkpoint

        tensors = dict(weights_by_name(checkpoint, manifest))
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
    try:
        model.set_thresholds(manifest.thresholds)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}; it belongs to another model") from None
    return manifest.progress


def _read_tensors(file: Path) -> dict[str, Tensor]:
    check_stored_dtypes([file], lambda _: torch.float32)
    try:
        return load_file(file)
    except Exception as error:  # of dtypes that torch or the library lack, too
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
