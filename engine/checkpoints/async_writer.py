"""Write checkpoints in the background, by all ranks together.

A thread of torch.distributed.checkpoint writes a copy of the state: each rank its own shard into
one safetensors file.  After all ranks are done, the main rank adds the manifest, renames the
folder, and removes the oldest checkpoint.  A kill at any moment leaves either the new checkpoint or
the ones before.  Several machines need a shared file system.
"""

import math
import warnings
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from ..distributed.ranks import Ranks
from ..models.stored_dtypes import check_stored_dtypes
from ..utils.errors import InputError
from ..utils.files import explained, new_partial_folder, put_folder, remove_folder
from ..utils.json_text import dump_json
from .manifest import Manifest, Progress, seal
from .step_weights import readable
from .store import FILES, Checkpoints


class AsyncWriter:
    """A writer of ``step`` checkpoints in the background, one at a time; it reads them too.

    Args:
        checkpoints: where they lie.
        keep: how many of them stay.
        ranks: the processes of the run.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int, ranks: Ranks) -> None:
        self._checkpoints, self._keep, self._ranks = checkpoints, keep, ranks
        self._writing: Future[Any] | None = None
        self._path = self._partial = checkpoints.folder
        self._latest = Progress()
        if ranks.size == 1:
            quiet_when_alone()

    def save(self, state: dict[str, Tensor], manifest: Manifest) -> None:
        """Begin to write a checkpoint; the tensors must not change any more.

        Raises:
            InputError: the one before could not be written.
        """
        self.wait()
        self._latest = manifest.progress
        self._path = self._checkpoints.path("step", self._latest.step)
        self._partial = self._new_partial()
        writing = async_save(
            state,
            storage_writer=_Writer(
                self._partial, self._path, manifest, self._checkpoints, self._keep
            ),
            process_group=self._ranks.checkpoint_group,
            no_dist=self._ranks.size == 1,
        )
        assert isinstance(writing, Future)
        self._writing = writing

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            InputError: it could not be written; those before it are whole.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:
            with suppress(InputError):
                remove_folder(self._partial, FILES)
            cause, *_ = [cause for cause, _ in error.failures.values()]
            if isinstance(cause, InputError):
                raise cause from error
            if not isinstance(cause, OSError | SafetensorError):
                raise
            reason = (getattr(cause, "strerror", None) or str(cause)).lower()
            raise InputError(
                f"cannot write {self._path}: {reason}; make room and go on with --resume"
            ) from error

    def keep_top(self, progress: Progress) -> None:
        """Remove the ``top`` checkpoints that no run goes on with, from here or a checkpoint."""
        self._checkpoints.keep_top((progress, self._latest))  # that one may not be there yet

    def _new_partial(self) -> Path:
        """Return a new folder to write into, the same on all ranks.

        Raises:
            InputError: it cannot be made.
        """
        partial = problem = None
        if self._ranks.is_main:
            try:
                with explained("write", self._path):
                    self._checkpoints.folder.mkdir(parents=True, exist_ok=True)
                    partial = new_partial_folder(self._path).name
            except InputError as error:
                problem = str(error)
        partial, problem = self._ranks.broadcast([partial, problem])
        if problem is not None:
            raise InputError(problem)
        return self._path.with_name(partial)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Complete the checkpoint, unless that would wait for a lost rank."""
        if kind is None or self._ranks.size == 1:
            self.wait()

    def load(self, path: Path, state: dict[str, Tensor]) -> None:
        """Read a checkpoint into the tensors of ``state``; NaN where it has no values.

        Raises:
            InputError: it lacks one of them, or has it in another size.
        """
        check_stored_dtypes(
            sorted(path.glob("*.safetensors")),
            lambda name: state[name].dtype if name in state else None,
        )
        reader = HuggingFaceStorageReader(str(path))
        # Of several ranks one may be lost meanwhile, which is no damage.
        with readable(path) if self._ranks.size == 1 else nullcontext():
            stored = reader.read_metadata().state_dict_metadata
            for name, tensor in state.items():
                size = getattr(stored.get(name), "size", None)
                if size != tensor.shape:
                    found = "missing" if size is None else f"of shape {list(size)}"
                    raise InputError(f"{path}: {name} is {found}, expected {list(tensor.shape)}")
            for tensor in state.values():
                if (
                    tensor.is_floating_point()
                ):  # what no file covers is not to pass for what was read
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    local.fill_(math.nan)
            load(
                state,
                storage_reader=reader,
                process_group=self._ranks.checkpoint_group,
                no_dist=self._ranks.size == 1,
            )


class _Writer(HuggingFaceStorageWriter):
    """A writer to a temporary name; the main rank completes the folder when all are done."""

    def __init__(
        self, partial: Path, path: Path, manifest: Manifest, checkpoints: Checkpoints, keep: int
    ) -> None:
        super().__init__(str(partial), save_distributed=True)
        self._partial, self._final, self._manifest = partial, path, manifest
        self._checkpoints, self._keep = checkpoints, keep

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy nothing: the state is a copy already."""
        return state_dict

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write a rank's tensors from where they lie: torch's makes a file in memory first."""
        if plan.items:
            tensors = {
                item.index.fqn: cast(Tensor, planner.resolve_data(item)).detach().cpu()
                for item in plan.items
            }
            offsets = {
                item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets}
                for item in plan.items
                if item.tensor_data is not None
            }
            metadata = {
                CUSTOM_METADATA_KEY: dump_json(offsets),
                DCP_VERSION_KEY: str(HF_DCP_VERSION),
                FORMAT_KEY: FORMAT_VALUE,
            }
            name = f"shard-{plan.storage_data['shard_index']:05}-model-00001-of-00001.safetensors"
            save_file(tensors, self._partial / name, metadata)
        done = TorchFuture[list[WriteResult]]()
        done.set_result([])
        return done

    def finish(  # of the main rank alone, when all ranks have written
        self,
        metadata: Metadata,  # noqa: ARG002 (torch's signature)
        results: list[list[WriteResult]],  # noqa: ARG002
    ) -> None:
        seal(self._partial, self._manifest)
        put_folder(self._partial, self._final, FILES)  # one is there only if it was found damaged
        self._checkpoints.keep("step", self._keep)


def quiet_when_alone() -> None:
    """Suppress torch's warning, at each checkpoint, that a run has one process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
