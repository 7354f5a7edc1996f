"""The snippets of the migration page run, and give what the code they replace gives."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.aggregation import UPGrad

from kernels import PCGrad, TaskGradients, balancing
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "migrating.md").read_text(encoding="utf-8")


def run_snippet(heading: str, **names: object) -> dict[str, object]:
    """Run the Python of a section; return all names."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope = {"torch": torch, **names}
    exec(compile(code, f"migrating.md, {heading}", "exec"), scope)
    return scope


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def losses_of(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 3, generator=generator)
    return list((model(x) - y).square().mean(0))


def jacobian(model: nn.Module) -> Tensor:
    """The task gradients ``[K, P]``, one backward pass each."""
    rows = []
    for loss in losses_of(model):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("heading", ["The widely copied PCGrad class", "TorchJD"])
def test_wrapped_optimizers(model: nn.Module, heading: str) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rows = jacobian(model)
    loss_a, loss_b, loss_c = losses_of(model)
    run_snippet(heading, model=model, loss_a=loss_a, loss_b=loss_b, loss_c=loss_c)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )
    combined = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    if heading == "TorchJD":
        # Both solve the same quadratic program; theirs to 1e-4 of the trace at least.
        torch.testing.assert_close(combined, UPGrad()(rows), rtol=1e-3, atol=1e-4)
    else:
        # The mean of projections; no method moves it out of the span of the task gradients.
        coefficients = torch.linalg.lstsq(rows.T, combined[:, None]).solution
        torch.testing.assert_close(rows.T @ coefficients, combined[:, None])
        assert (coefficients > 1 / 3 - 1e-3).all()


def test_pcgrad_inside_a_trainer(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    optimizer = PCGrad(torch.optim.AdamW(plain.parameters(), lr=1e-3))
    optimizer.pc_backward(losses_of(plain))
    optimizer.step()
    run_snippet("PCGrad inside a trainer", model=model, losses=losses_of)
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.filterwarnings("ignore")  # what Trainer says about its own settings
def test_pcgrad_inside_transformers_trainer(model: nn.Module, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    plain = copy.deepcopy(model)
    optimizer = PCGrad(torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0), seed=42)
    optimizer.pc_backward(losses_of(plain)[:2])
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
    run_snippet(
        "PCGrad inside transformers' Trainer",
        model=model,
        settings=settings,
        rows=[{"x": 0.0}],
        sst_loss=lambda model, inputs: losses_of(model)[0],
        sts_loss=lambda model, inputs: losses_of(model)[1],
    )
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_attention() -> None:
    torch.manual_seed(0)
    hidden, attention_mask = (
        torch.randn(3, 5, 8),
        torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 2, 3)]),
    )
    scope = run_snippet("flash-attn", hidden=hidden, attention_mask=attention_mask, heads=2)
    query = hidden.view(3, 5, 2, 4).transpose(1, 2)
    mask = attention_mask.bool()[:, None, None]
    expected = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    expected = expected.transpose(1, 2).flatten(2) * attention_mask[..., None]
    torch.testing.assert_close(scope["padded"], expected)


def test_dropout_add_layer_norm() -> None:
    torch.manual_seed(0)
    hidden, residual = torch.randn(2, 7, 48)
    weight, bias = torch.randn(2, 48)
    names = {"hidden": hidden, "residual": residual, "weight": weight, "bias": bias}
    scope = run_snippet("flash-attn's layer norm", **names)
    total = scope["total"]
    kept = (total - residual).abs() > 0
    assert 0.8 < kept.float().mean() < 1
    torch.testing.assert_close(total, residual + kept * hidden / 0.9)
    torch.testing.assert_close(scope["normalised"], F.layer_norm(total, (48,), weight, bias, 1e-12))


def test_layer_norm() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 48)
    scope = run_snippet("apex", hidden=hidden)
    torch.testing.assert_close(scope["normalised"], F.layer_norm(hidden, (48,), eps=1e-12))


def test_the_methods_that_the_page_names_exist() -> None:
    named = set(re.findall(r"balancing\.(?!md\b)(\w+)", PAGE))
    methods: list[Callable[..., Tensor]] = [getattr(balancing, name) for name in named]
    assert len(methods) >= 10


def test_snippets_of_a_transformers_model() -> None:
    """Means of packed hidden states, and three tasks in one pass."""
    transformers = pytest.importorskip("transformers")
    section = PAGE.split("\n## A transformers model\n")[1].split("\n## ")[0]
    first, means, tasks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=60, intermediate_size=48, **sizes)
    model = nn.Module()
    model.bert = transformers.BertModel(config).eval()
    model.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(3))
    rows = [{"input_ids": list(range(3, 6 + i % 7))} for i in range(96)]
    one_by_one = [model.bert(torch.tensor([row["input_ids"]]))[0].mean(1) for row in rows]

    scope: dict[str, object] = {"torch": torch, "model": model}
    exec(first.splitlines()[0], scope)
    accelerate, collator = scope["accelerate"], scope["PackingCollator"]
    accelerate(model, packed=True)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True)
    scope["outputs"] = model.bert(ids, attention_mask=ids != 0)
    exec(means, scope)
    torch.testing.assert_close(scope["means"], torch.cat(one_by_one), rtol=1e-4, atol=1e-5)

    before = [parameter.detach().clone() for parameter in model.heads.parameters()]
    scope |= {
        **{"PCGrad": PCGrad, "TaskGradients": TaskGradients, "collate": collator(), "rows": rows},
        "loss_of": [F.cross_entropy] * 3,
        "labels": [torch.arange(32) % 2] * 3,
    }
    exec(tasks, scope)
    assert not any(map(torch.equal, before, model.heads.parameters()))
