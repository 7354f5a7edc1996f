"""The thirty questions: each answer is short and leads on, and its code does what it says."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import PCGrad
from kernels.integrations.balanced_trainer import PCGradTrainer

from .pages import Page

PAGE = Page("questions")
QUESTIONS = re.findall(r"^### (.*)$", PAGE.text, re.MULTILINE)


def losses_of(heads: nn.ModuleList, x: Tensor) -> list[Tensor]:
    return [(head(x) - goal).square().mean() for head, goal in zip(heads, (1, -1), strict=True)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return losses_of(self.heads, self.body(x).tanh())


def given() -> dict[str, Any]:
    """Return a model, its optimizer without momentum, a batch of eight and its halves."""
    model = Model()
    batch = torch.randn(8, 4)
    return {
        **{"torch": torch, "model": model, "batch": batch, "micro_batches": batch.split(4)},
        "optimizer": PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)),
        "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0),
    }


def after_a_step_of_the_batch(*, clipped: bool) -> list[Tensor]:
    names = given()
    names["optimizer"].pc_backward(names["model"](names["batch"]))
    if clipped:
        norm = nn.utils.clip_grad_norm_(names["model"].parameters(), 1.0)
        assert norm > 1
    names["optimizer"].step()
    return list(names["model"].parameters())


def test_there_are_thirty_short_answers_that_lead_on() -> None:
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 30
    for question in QUESTIONS:
        answer = re.sub(r"```.*?```", "", PAGE.section(question), flags=re.DOTALL)
        assert re.search(r"\]\([\w./#-]+\)", answer), f"{question} leads nowhere"
        assert len(answer.split()) < 90, question


@pytest.mark.parametrize("question", ["How do I use GradScaler?", "How do I accumulate gradients?"])
def test_scaled_and_accumulated_steps_are_those_of_the_batch(question: str) -> None:
    names = PAGE.run_python(question, **given())
    scaled = "GradScaler" in question
    # Scales are powers of two; halves of a batch are summed in another order: a few roundings
    tolerance = {"rtol": 0, "atol": 0} if scaled else {}
    torch.testing.assert_close(
        list(names["model"].parameters()), after_a_step_of_the_batch(clipped=scaled), **tolerance
    )


def test_the_trainer_gives_a_dict_of_losses() -> None:
    (code,) = PAGE.blocks(
        "python", "How do I pass several losses in accelerate, or in transformers' Trainer?"
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    trainer = scope["MyTrainer"]
    assert issubclass(trainer, PCGradTrainer)

    def model(loss: float) -> SimpleNamespace:
        return SimpleNamespace(loss=loss)

    inputs = {"a": {"loss": 1.0}, "b": {"loss": 2.0}}
    assert trainer.compute_loss(None, model, inputs) == {"a": 1.0, "b": 2.0}


def test_a_method_of_ones_own() -> None:
    names = PAGE.run_python("Can I use my own loss, head, encoder or method?", **given())
    optimizer, model = names["optimizer"], names["model"]
    optimizer.backward(model(names["batch"]))
    optimizer.step()
    norms = names["equal_norms"](torch.diag(torch.tensor([1.0, 9.0])))
    torch.testing.assert_close(norms, torch.tensor([2.0, 2 / 3]))
    assert optimizer.weights.shape == (1, 2)


def test_every_block_of_code_is_run_above() -> None:
    assert len(PAGE.blocks("python")) == 4
