"""Train in one of the loops that people have, on several processes, with checkpoints.

    LAUNCHER -m tests.robustness.loop_program LOOP FOLDER [--steps N] [--timeout S] [--machines N]

Every loop goes on from its newest checkpoint, where there is one.  ``FOLDER/step`` has the number
of the last step; at the end each process writes the bits of its weights to ``FOLDER/rank-N.json``.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels import PCGrad

from ..kernels.distributed.training import TASKS, Examples, Model, batches, model

SAVE_EVERY = 5
_EACH = 4  # examples of a task on a rank
_LR = 0.01
_PAUSE = 0.05  # seconds behind a step, so that faults come while steps are made


class Loop:
    """What all loops share: where they write, and how long they train and wait.

    Args:
        options: the program's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.folder
        self.steps: int = options.steps
        self.machines: int = options.machines
        self.timeout = timedelta(seconds=options.timeout)

    def note(self, step: int) -> None:
        """Write down that a step was made."""
        if dist.get_rank() == 0:
            (self.folder / "step").write_text(str(step))
        time.sleep(_PAUSE)

    def data(self, begin: int) -> Iterator[tuple[int, list[Examples]]]:
        """Yield the numbers of the steps to make, and this rank's examples in each."""
        rank = dist.get_rank()
        made = batches([_EACH * dist.get_world_size()] * TASKS)
        for step in range(begin + 1, self.steps + 1):
            batch = made[step % len(made)]
            yield step, [own.part(rank * _EACH, (rank + 1) * _EACH) for own in batch]

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        return max(self.folder.glob("step-????"), default=None)

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Let all ranks write a checkpoint, where it is due; none is seen before it is whole."""
        if step % SAVE_EVERY:
            return
        unfinished = self.folder / "unfinished"
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        dist.barrier()
        write(unfinished)
        dist.barrier()
        if dist.get_rank() == 0:
            unfinished.rename(self.folder / f"step-{step:04}")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _adamw(own: nn.Module) -> PCGrad:
    return PCGrad(torch.optim.AdamW(own.parameters(), _LR))


def _trained_model() -> Model:
    own = model()
    own.unused.requires_grad_(False)  # what loads states wants one of all that is trained
    return own


def ddp(loop: Loop) -> nn.Module:
    """DistributedDataParallel around a loop of one's own."""
    dist.init_process_group("gloo", timeout=loop.timeout)
    own = _trained_model()
    optimizer, wrapped, begin = _adamw(own), DistributedDataParallel(own), 0
    if (newest := loop.newest()) is not None:
        begin = _step_of(newest)
        saved = torch.load(newest / "state.pt", weights_only=True)
        own.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def write(folder: Path) -> None:
        if dist.get_rank() == 0:
            state = {"model": own.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "state.pt")

    for step, batch in loop.data(begin):
        optimizer.zero_grad()
        optimizer.pc_backward(wrapped(batch))
        optimizer.step()
        loop.save(step, write)
        loop.note(step)
    return own


def fsdp(loop: Loop) -> nn.Module:
    """FSDP2, whose checkpoints are torch.distributed.checkpoint's."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", timeout=loop.timeout)
    own = _trained_model()
    fully_shard(own.layer)
    fully_shard(own)
    optimizer, begin = _adamw(own), 0

    def state() -> dict[str, object]:
        weights, of_optimizer = get_state_dict(own, optimizer)
        return {"model": weights, "optimizer": of_optimizer}

    if (newest := loop.newest()) is not None:
        begin = _step_of(newest)
        saved = state()
        checkpoint.load(saved, checkpoint_id=newest)
        set_state_dict(
            own,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
    for step, batch in loop.data(begin):
        optimizer.zero_grad()
        optimizer.pc_backward(own(batch))
        optimizer.step()
        loop.save(step, lambda folder: checkpoint.save(state(), checkpoint_id=folder))
        loop.note(step)
    return own


def accelerate(loop: Loop) -> nn.Module:
    """Hugging Face's Accelerator."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=loop.timeout)]
    )
    own = _trained_model()
    wrapped, optimizer = accelerator.prepare(own, _adamw(own))
    begin = 0
    if (newest := loop.newest()) is not None:
        begin = _step_of(newest)
        accelerator.load_state(str(newest))
    for step, batch in loop.data(begin):
        optimizer.zero_grad()
        optimizer.optimizer.pc_backward(wrapped(batch))
        optimizer.step()
        loop.save(step, lambda folder: accelerator.save_state(str(folder)))
        loop.note(step)
    return own


def lightning(loop: Loop) -> nn.Module:
    """Lightning with its strategy for DistributedDataParallel, and its checkpoints."""
    import lightning as library
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, IterableDataset

    class Data(IterableDataset):
        """An epoch is as long as the way to the next checkpoint."""

        def __iter__(self) -> Iterator[tuple[int, list[Examples]]]:
            return loop.data(module.global_step)

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own = _trained_model()

        def configure_optimizers(self) -> PCGrad:
            return _adamw(self.own)

        def training_step(self, numbered: tuple[int, list[Examples]]) -> None:
            step, batch = numbered
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.pc_backward(self.own(batch))
            optimizer.step()
            loop.note(step)

    module = Module()
    keep = ModelCheckpoint(
        loop.folder, "{step:04}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = library.Trainer(
        max_steps=loop.steps,
        limit_train_batches=SAVE_EVERY,
        strategy=DDPStrategy(timeout=loop.timeout),
        devices=2 // loop.machines,
        num_nodes=loop.machines,
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
    )
    newest = max(loop.folder.glob("????.ckpt"), default=None)
    trainer.fit(module, DataLoader(Data(), batch_size=None), ckpt_path=newest)
    return module.own


def trainer(loop: Loop) -> nn.Module:
    """PCGradTrainer."""
    from transformers import TrainerCallback

    from ..kernels.distributed import trainer_cases as cases

    class Steps(TrainerCallback):
        def on_step_end(self, _settings: object, state: object, *_: object, **__: object) -> None:
            loop.note(state.global_step)  # type: ignore[attr-defined]

    settings = cases.settings(
        str(loop.folder),
        max_steps=loop.steps,
        per_device_train_batch_size=_EACH,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        ddp_timeout=int(loop.timeout.total_seconds()),
        use_cpu=False,  # by which transformers 5 leaves the timeout out
    )
    own = cases.ByName()
    data = cases.rows(batches([_EACH * dist.get_world_size()] * TASKS))
    made = cases.InOrder(
        own,
        settings,
        train_dataset=data,
        data_collator=cases.stacked,
        callbacks=[Steps()],
    )
    # A killed process leaves a checkpoint without its last file.
    whole = [file.parent for file in loop.folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    made.train(resume_from_checkpoint=None if newest is None else str(newest))
    return own


LOOPS = {loop.__name__: loop for loop in (ddp, fsdp, accelerate, lightning, trainer)}


def main() -> None:
    """Train; write the weights' bits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--timeout", type=float, default=10)
    parser.add_argument("--machines", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    trained = LOOPS[options.loop](Loop(options))
    with torch.no_grad():
        weights = [
            p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained.parameters()
        ]
        bits = [weight.contiguous().view(torch.int32).tolist() for weight in weights]
    path = options.folder / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(bits))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
