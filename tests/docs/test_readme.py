"""The README is short, and what it shows runs and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from engine import train
from engine.gradients.balancing import METHODS
from examples import five_tasks
from kernels import restore

from .pages import Page

README = Page("README")
LOOP, MODEL = README.blocks("diff")


class TwoTasks(nn.Module):
    """Returns the losses of two tasks that pull one body apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.body(x).tanh()
        outputs = [head(hidden) for head in self.heads]
        return [
            (output.square() - goal * output).mean()
            for output, goal in zip(outputs, (3, -2), strict=True)
        ]


def version(diff: str, sign: str) -> str:
    """Return the code before (``-``) or after (``+``) a diff."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def names() -> dict[str, object]:
    torch.manual_seed(0)
    model = TwoTasks()
    return {"torch": torch, "model": model, "batches": [torch.randn(32, 8) for _ in range(3)]}


def test_it_is_short() -> None:
    assert len(README.text.split()) <= 900
    first_command = README.text.partition("\n    ")[0]
    assert len(first_command.split()) < 250


def test_the_methods_are_counted() -> None:
    assert f"PCGrad (Yu et al. 2020) or one of {len(METHODS) - 1} other methods" in README.text


def test_the_commands_of_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, run = README.commands("Three ways to use it")[:2]
    five_tasks.main(shlex.split(make.removeprefix("python -m examples.five_tasks ")))
    capsys.readouterr()
    arguments = shlex.split(run.removeprefix("python -m engine.train "))
    assert train.main([*arguments, "--max-steps", "2"]) == 0
    row = r"│ (\w+) +│ (accuracy|pearson) +│ -?\d\.\d{3} │"
    printed = re.findall(row, capsys.readouterr().out)
    assert re.findall(row, README.text) == printed  # all but overall, a mean


def test_the_diff_of_a_torch_loop(capsys: pytest.CaptureFixture[str]) -> None:
    exec(version(LOOP, "-"), names())
    assert not capsys.readouterr().out
    exec(version(LOOP, "+"), names())
    # All but the rounding of another vector unit, in the last of four digits
    (printed,) = re.findall(r"^tensor\(\[\[(.*), (.*)\]\]\)$", capsys.readouterr().out)
    (shown,) = re.findall(r"^    tensor\(\[\[(.*), (.*)\]\]\)$", README.text, re.MULTILINE)
    assert [float(weight) for weight in printed] == pytest.approx(
        [float(weight) for weight in shown], abs=1e-3
    )


def test_the_diff_of_a_transformers_model(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    hf.BertForSequenceClassification(config).eval().save_pretrained(tmp_path)
    code = {sign: version(MODEL, sign) for sign in "-+"}
    assert all('"bert-base-uncased"' in text for text in code.values())
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    logits = []
    for text in code.values():
        scope = {"AutoModelForSequenceClassification": hf.AutoModelForSequenceClassification}
        exec(text.replace('"bert-base-uncased"', repr(str(tmp_path))), scope)
        model = scope["model"].eval()
        logits.append(model(**inputs).logits)
    restore(model)
    assert type(model) is hf.BertForSequenceClassification
    # Two roundings of sixteen products each, of logits below 1
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
