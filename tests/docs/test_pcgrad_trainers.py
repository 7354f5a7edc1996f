"""The trainers of the page on PCGrad in trainers do what a loop of one's own does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernels import PCGrad
from tests.conftest import REPOSITORY
from tests.docs.pages import Page
from tests.docs.test_pcgrad_loop import Batch, Model, assert_close, assert_equal, batches_of

PAGE = Page("pcgrad-trainers")

# What the libraries say about their own settings.
pytestmark = pytest.mark.filterwarnings("ignore")


def clipped_loop(batches: list[Batch], accumulate: int = 1) -> Model:
    """The weights after the same steps in a plain loop."""
    model = Model()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-3))
    for number, batch in enumerate(batches, 1):
        optimizer.pc_backward([loss / accumulate for loss in model(batch)])
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let an Accelerator have settings of its own, which a process keeps for all of them."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.usefixtures("fresh_accelerator")
def test_accelerate() -> None:
    model, batches = Model(), batches_of(4)
    PAGE.run_python("accelerate", model=model, batches=batches)
    assert_equal(model, clipped_loop(batches, accumulate=2))


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    (batch,) = batches_of(1)
    plain = Model()
    optimizer = PCGrad(torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0), seed=42)
    optimizer.pc_backward(plain(batch))
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    settings = transformers.TrainingArguments(
        tmp_path,
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )

    def loss_of(task: int) -> Any:
        def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return model(batch)[task]

        return loss

    model = Model()
    scope = PAGE.run_python(
        "transformers' Trainer",
        model=model,
        settings=settings,
        rows=[{"x": 0.0}],
        sst_loss=loss_of(0),
        sts_loss=loss_of(1),
    )
    assert_close(model, plain)
    assert scope["trainer"].state.global_step == 1


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    model, batches = Model(), batches_of(3)
    scope = PAGE.run_python("Lightning", model=model)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(scope["Module"](), DataLoader(batches, batch_size=None))
    assert_equal(model, clipped_loop(batches))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"]
    assert state["param_groups"][0]["drawn_orders"] == 3


def test_the_sentence_transformers_code_is_that_of_the_example() -> None:
    """Which tests/examples trains."""
    example = (REPOSITORY / "examples/pcgrad_sentence_transformers.py").read_text(encoding="utf-8")
    (code,) = PAGE.blocks("python", "sentence-transformers")
    for line in code.splitlines():
        assert line in example, line


def test_examples_that_the_page_names_exist() -> None:
    named = {part.split("`")[0] for part in PAGE.text.split("`examples/")[1:]}
    assert len(named) >= 4
    assert all((REPOSITORY / "examples" / name).is_file() for name in named)
