"""Checkpoints: weights, moments, the step's number, in folders that are whole or not there.

    checkpoints/step-00000376/   everything that training needs to go on; the newest is kept
    checkpoints/best-00000188/   the weights that scored best on the dev sets

What a balancing method remembers lies with the moments.  Random numbers and the order of the
examples follow from the recipe's seed and the step, so no generator needs saving.  Tensors are
stored as safetensors: no pickle is written or read.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..model.multitask import MultitaskModel
from ..multitask.flat_parameters import FlatParameters
from ..multitask.optimizers import Optimizer
from .files import whole_folder

_NAME = re.compile(r"(step|best)-(\d{8})")


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        best_score: best overall dev score so far; None before the first evaluation.
        best_step: the step that reached it.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints`` in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, kind: str) -> Path | None:
        """Return the newest checkpoint of ``kind`` (``step`` or ``best``), or None."""
        if not self.folder.is_dir():
            return None
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return max((path for path in found if path.name.startswith(kind)), default=None)

    def save(
        self,
        progress: Progress,
        model: MultitaskModel,
        parameters: FlatParameters,
        optimizer: Optimizer,
        step_state: Mapping[str, Tensor],
    ) -> None:
        """Write a checkpoint to go on from, then drop the older ones."""
        with whole_folder(self.folder / f"step-{progress.step:08}") as partial:
            save_file(weights(model, parameters), partial / "model.safetensors")
            moments = {
                f"{moment}.{name}": tensor.contiguous()
                for moment in ("exp_avg", "exp_avg_sq")
                for name, tensor in parameters.named_views(getattr(optimizer, moment))
            }
            moments["updates"] = optimizer.updates
            moments |= step_state
            save_file(moments, partial / "optimizer.safetensors")
            _write_progress(partial, progress)
        self._drop_older("step", progress.step)

    def save_best(
        self, progress: Progress, model: MultitaskModel, parameters: FlatParameters
    ) -> None:
        """Write the weights alone, as the best so far, then drop the ones before."""
        with whole_folder(self.folder / f"best-{progress.step:08}") as partial:
            save_file(weights(model, parameters), partial / "model.safetensors")
            _write_progress(partial, progress)
        self._drop_older("best", progress.step)

    def load(
        self,
        model: MultitaskModel,
        parameters: FlatParameters,
        optimizer: Optimizer,
        step_state: Mapping[str, Tensor],
    ) -> Progress:
        """Restore the newest ``step`` checkpoint; without one, leave everything as it is.

        Returns:
            How far the run had come.

        Raises:
            InputError: the checkpoint cannot be read or belongs to another model.
        """
        path = self.find("step")
        if path is None:
            return Progress()
        progress = read_progress(path)
        load_weights(path, model, parameters)
        moments = _read_tensors(path / "optimizer.safetensors")
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, view in parameters.named_views(getattr(optimizer, moment)):
                _copy(view, moments, f"{moment}.{name}", path / "optimizer.safetensors")
        for name, tensor in [
            ("updates", optimizer.updates),
            *step_state.items(),
        ]:
            _copy(tensor, moments, name, path / "optimizer.safetensors")
        return progress

    def _drop_older(self, kind: str, step: int) -> None:
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and match[1] == kind and int(match[2]) < step:
                shutil.rmtree(path, ignore_errors=True)


def weights(model: MultitaskModel, parameters: FlatParameters) -> dict[str, Tensor]:
    """Return all weights by name, fp32: the master's, and those of heads that are not trained."""
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    state.update(parameters.named_views(parameters.master))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def load_weights(
    checkpoint: Path, model: MultitaskModel, parameters: FlatParameters | None = None
) -> None:
    """Read a checkpoint's weights into a model, through its flat parameters if it has them.

    Raises:
        InputError: they cannot be read or belong to another model.
    """
    file = checkpoint / "model.safetensors"
    tensors = _read_tensors(file)
    targets = dict(model.state_dict())
    if parameters is not None:
        targets.update(parameters.named_views(parameters.master))
    for name, target in targets.items():
        _copy(target, tensors, name, file)
    if parameters is not None:
        parameters.refresh_compute()


def _copy(target: Tensor, tensors: dict[str, Tensor], name: str, file: Path) -> None:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != target.shape:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise InputError(f"{file}: {name} is {found}, expected {list(target.shape)}")
    with torch.no_grad():
        target.copy_(tensor)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None


def _write_progress(folder: Path, progress: Progress) -> None:
    (folder / "progress.json").write_text(json.dumps(progress._asdict()) + "\n", encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Read how far a run had come when it wrote this checkpoint.

    Raises:
        InputError: the file is missing or damaged.
    """
    file = folder / "progress.json"
    try:
        return Progress(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: not a checkpoint's progress ({error})") from None
