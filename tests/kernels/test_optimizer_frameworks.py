"""The wrappers in accelerate, Lightning, Trainer and torch's distributed checkpoints."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import DataLoader

from kernels import PCGrad

# What the frameworks say about their own settings.
pytestmark = pytest.mark.filterwarnings("ignore")


class Two(nn.Module):
    """Two conflicting tasks on a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def losses(self, x: Tensor) -> list[Tensor]:
        out = self.layer(x)
        targets = (torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 2.0, 1.0]))
        return [(out - target).square().mean() for target in targets]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def plain_loop(steps: int, accumulate: int = 1) -> tuple[Two, PCGrad]:
    """Train in a loop of one's own."""
    model = Two()
    optimizer = PCGrad(adamw(model))
    for number, x in enumerate(batches(steps), 1):
        optimizer.pc_backward([loss / accumulate for loss in model.losses(x)])
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def assert_same(left: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(dict(left.named_parameters()), dict(right.named_parameters()))


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["prepare(PCGrad)", "PCGrad(prepare)"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(wrap: str, accumulate: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = Two()
    if wrap == "prepare(PCGrad)":
        model, optimizer = accelerator.prepare(model, PCGrad(adamw(model)))
        surgery = optimizer.optimizer
    else:
        model, optimizer = accelerator.prepare(model, adamw(model))
        optimizer = surgery = PCGrad(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for x in batches(4):
        with accelerator.accumulate(model):
            surgery.pc_backward([loss / accumulate for loss in model.losses(x)])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert_same(model, plain_loop(4, accumulate)[0])
    assert surgery.param_groups[0]["drawn_orders"] == 4


def test_accelerate_keeps_the_state(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*plain_loop(3))
    accelerator.save_state(str(tmp_path))
    before = copy.deepcopy(optimizer.optimizer.state_dict())
    optimizer.optimizer.pc_backward(model.losses(torch.ones(1, 3)))
    optimizer.step()
    accelerator.load_state(str(tmp_path))
    torch.testing.assert_close(optimizer.state_dict(), before)
    assert before["param_groups"][0]["drawn_orders"] == 3


# ---- Lightning -----------------------------------------------------------------------------------


def lightning_module(automatic: bool = False, accumulate: int = 1) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.two = Two()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return PCGrad(adamw(self))

        def training_step(self, x: Tensor, number: int) -> Tensor | None:
            losses = self.two.losses(x)
            if automatic:
                return sum(losses)
            optimizer = self.optimizers()
            optimizer.pc_backward([loss / accumulate for loss in losses])
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            assert optimizer.gram is optimizer.optimizer.gram
            return None

    return Module()


def fit(module: Any, steps: int, folder: Path, **arguments: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(batches(steps), batch_size=None), **arguments)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path: Path, accumulate: int) -> None:
    module = lightning_module(accumulate=accumulate)
    trainer = fit(module, 4, tmp_path)
    assert_same(module.two, plain_loop(4, accumulate)[0])
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["drawn_orders"] == 4


def test_automatic_optimization_in_lightning_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"pc_backward\(losses\).*automatic_optimization"):
        fit(lightning_module(automatic=True), 2, tmp_path)


# ---- transformers' Trainer -----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["pc_backward", "loss"])
def test_trainer(tmp_path: Path, accumulate: int, method: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers' Trainer needs it

    class Trainer(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            if method == "loss":  # as where somebody forgot
                loss = sum(model.losses(inputs["x"]))
                loss.backward()
                return loss.detach()
            losses = [loss / accumulate for loss in model.losses(inputs["x"])]
            self.optimizer.optimizer.pc_backward(losses)
            return sum(losses).detach()

    model = Two()
    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            tmp_path,
            max_steps=4 // accumulate,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            save_strategy="steps",
            save_steps=2,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"x": row} for batch in batches(4) for row in batch],
        data_collator=lambda rows: {"x": torch.stack([row["x"] for row in rows])},
        optimizers=(
            optimizer := PCGrad(adamw(model)),
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        ),
    )
    trainer._get_train_sampler = lambda *_: None  # in order
    if method == "loss":
        with pytest.warns(UserWarning, match="no gradient is of pc_backward"):
            trainer.train()
        return
    trainer.train()
    assert_same(model, plain_loop(4, accumulate)[0])
    saved = torch.load(
        tmp_path / f"checkpoint-{4 // accumulate}" / "optimizer.pt", weights_only=True
    )
    assert saved["param_groups"][0]["drawn_orders"] == 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_norms_stay_as_the_model_is_cleared(set_to_none: bool) -> None:
    model, (x,) = Two(), batches(1)
    optimizer = PCGrad(adamw(model))
    order = torch.tensor([[0, 1], [1, 0]])
    norms = set()
    for _ in range(4):
        optimizer.pc_backward(model.losses(x), order)
        norms.add(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        model.zero_grad(set_to_none)
    assert len(norms) == 1


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "base", [adamw, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]
)
@pytest.mark.filterwarnings("error")
def test_distributed_checkpoints(base: Callable[..., torch.optim.Optimizer], flat: bool) -> None:
    def steps(model: Two, optimizer: PCGrad, inputs: Iterator[Tensor] | list[Tensor]) -> None:
        for x in inputs:
            optimizer.zero_grad()
            optimizer.pc_backward(model.losses(x))
            optimizer.step()

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Two()
    optimizer = PCGrad(base(model))
    steps(model, optimizer, batches(3))
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    twin = Two()
    restored = PCGrad(base(twin))
    set_state_dict(
        twin, restored, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options
    )
    assert restored.param_groups[0]["drawn_orders"] == 3
    steps(model, optimizer, batches(5)[3:])
    steps(twin, restored, batches(5)[3:])
    assert_same(model, twin)


def test_a_distributed_checkpoint_of_the_wrapped_optimizer() -> None:
    model = Two()
    optimizer = adamw(model)
    sum(model.losses(torch.ones(1, 3))).backward()
    optimizer.step()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    restored = PCGrad(adamw(model))
    set_state_dict(model, restored, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert restored.param_groups[0]["drawn_orders"] == 0
    assert restored.state[model.layer.weight]["step"] == 1
