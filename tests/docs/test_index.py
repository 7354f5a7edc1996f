"""The home page's code and figures."""

import re

import torch
import transformers as hf
from torch import nn

from engine.gradients.balancing import METHODS
from kernels import restore

from .pages import Page

PAGE = Page("index")


def test_it_is_short() -> None:
    assert len(re.sub(r"\]\([^)]*\)", "]", PAGE.text).split()) < 400


def test_the_code_runs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    hf_model = hf.BertModel(config).eval()
    scope = PAGE.run_python(
        torch=torch,
        model=model,
        task_losses=lambda model: list((model(x) - y).square().mean(0)),
        hf_model=hf_model,
    )
    assert len(scope["optimizer"].weights.flatten()) == 2
    assert all(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )
    assert type(hf_model) is not hf.BertModel
    restore(hf_model)


def test_the_figures_are_those_of_the_readme_and_the_records() -> None:
    assert f"PCGrad or one of {len(METHODS) - 1} other methods" in PAGE.text
    results = Page("results").text
    assert "takes 2.2 times as long with summed losses, and 4.9 times with PCGrad" in results
    for figure in ("2.2 and 4.9 times", "0.23 to 0.49", "10.5 ms"):
        assert figure in PAGE.text
