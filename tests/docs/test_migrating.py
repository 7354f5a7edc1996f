"""The changes that the migration page shows run, and give what the code they replace gives."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import PCGrad, TaskGradients, balancing
from tests.docs.diffs import sides
from tests.docs.pages import Page
from tests.kernels.published_pcgrad import published_update

PAGE = Page("migrating")

LIBMTL = [
    "EW",
    "GradNorm",
    "MGDA",
    "UW",
    "DWA",
    "GLS",
    "GradDrop",
    "PCGrad",
    "GradVac",
    "IMTL",
    "CAGrad",
    "Nash_MTL",
    "RLW",
    "MoCo",
    "Aligned_MTL",
    "DB_MTL",
    "STCH",
    "ExcessMTL",
    "FairGrad",
    "FAMO",
    "MoDo",
    "SDMGrad",
    "UPGrad",
    "AutoLambda",
    "MOML",
    "FORUM",
]
"""Its methods, in its package ``weighting`` and its trainers."""


def changed(heading: str, number: int = 0, **names: object) -> dict[str, Any]:
    """Apply a diff of a section and run the code behind it; return all names."""
    _, after = sides(PAGE.blocks("diff", heading)[number])
    scope = {"torch": torch, **names}
    exec(compile(after, f"migrating.md, {heading}", "exec"), scope)
    return scope


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def losses_of(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 3, generator=generator)
    return list((model(x) - y).square().mean(0))


def jacobian(losses: list[Tensor], model: nn.Module) -> Tensor:
    """The task gradients ``[K, P]``, one backward pass each."""
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def combined(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def losses_by_name(model: nn.Module) -> dict[str, Tensor]:
    return dict(zip(("loss_a", "loss_b", "loss_c"), losses_of(model), strict=True))


def test_every_section_of_code_shows_its_diff_first() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.text, re.MULTILINE)
    assert sections[-1] == "A transformers model"
    for heading in sections[:-1]:
        before, after = sides(PAGE.blocks("diff", heading)[0])
        compile(before, heading, "exec")
        assert "from kernels import" in after


# ---- the copied class ------------------------------------------------------------------------


def test_the_copied_class(model: nn.Module) -> None:
    rows = jacobian(losses_of(model), model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    changed("The widely copied PCGrad class", model=model, **losses_by_name(model))
    assert not any(map(torch.equal, before, model.parameters()))
    # The mean of projections; no method moves it out of the span of the task gradients.
    gradient = combined(model)
    coefficients = torch.linalg.lstsq(rows.T, gradient[:, None]).solution
    torch.testing.assert_close(rows.T @ coefficients, gradient[:, None])
    assert (coefficients > 1 / 3 - 1e-3).all()


def test_the_copied_class_is_the_same_with_its_orders(model: nn.Module) -> None:
    """``include_self`` and an order replay its update, which is the sum's mean."""
    rows = jacobian(losses_of(model), model)
    for permutation in itertools.permutations(range(3)):
        order = torch.tensor([permutation] * 3)
        model.zero_grad()
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), include_self=True)
        optimizer.pc_backward(losses_of(model), order=order)
        torch.testing.assert_close(combined(model), published_update(rows, order) / 3)


class TwoHeads(nn.Module):
    """A linear encoder and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16))
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])


def two_tasks() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "x_a": torch.randn(7, 6, generator=draw),
        "y_a": torch.randint(3, (7,), generator=draw),
        "x_b": torch.randn(5, 6, generator=draw),
        "y_b": torch.randint(3, (5,), generator=draw),
        "loss_of": [F.cross_entropy] * 2,
    }


def test_one_backward_pass_instead_of_one_for_each_task() -> None:
    before, _ = sides(PAGE.blocks("diff", "The widely copied PCGrad class")[1])
    by_task, at_once = TwoHeads(), TwoHeads()
    names = two_tasks()
    exec(before.replace("from pcgrad", "from kernels"), {"torch": torch, "model": by_task} | names)
    scope = changed("The widely copied PCGrad class", 1, model=at_once, **names)
    assert isinstance(scope["tasks"], TaskGradients)
    torch.testing.assert_close(combined(at_once), combined(by_task))


# ---- TorchJD ---------------------------------------------------------------------------------


def test_torchjd(model: nn.Module) -> None:
    """Both sides run; they solve one quadratic program, TorchJD's to 1e-4 of the trace."""
    pytest.importorskip("torchjd")
    before, _ = sides(PAGE.blocks("diff", "TorchJD")[0])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    exec(before, {"torch": torch, "model": model, **losses_by_name(model)})
    theirs = combined(model)
    model.load_state_dict(start)
    changed("TorchJD", model=model, **losses_by_name(model))
    torch.testing.assert_close(combined(model), theirs, rtol=1e-3, atol=1e-4)


# ---- LibMTL ----------------------------------------------------------------------------------


def test_libmtl() -> None:
    """The encoder's gradient is the sum of projections, a decoder's that of its own task."""
    draw = torch.Generator().manual_seed(1)
    loaders = {
        task: [(torch.randn(8, 6, generator=draw), torch.randn(8, 2, generator=draw))]
        for task in "ab"
    }
    torch.manual_seed(0)
    decoders = nn.ModuleDict({task: nn.Linear(4, 2) for task in loaders})
    encoders = []

    def encoder() -> nn.Module:
        torch.manual_seed(2)
        encoders.append(nn.Linear(6, 4))
        return encoders[-1]

    loss_of = {"a": F.mse_loss, "b": lambda output, target: F.mse_loss(output, target - 3)}
    reference = encoder()
    names = {"Encoder": encoder, "decoders": decoders, "loss_of": loss_of}
    _, after = sides(PAGE.blocks("diff", "LibMTL")[0])
    one_epoch = after.replace("range(2)", "range(1)")
    assert one_epoch != after
    losses = [loss_of[t](decoders[t](reference(x)), y) for t, ((x, y),) in loaders.items()]
    rows = jacobian(losses, reference)
    own = [torch.autograd.grad(loss, decoders[t].weight)[0] for loss, t in zip(losses, "ab")]  # noqa: B905
    exec(one_epoch, {"torch": torch, "train_loaders": loaders, **names})
    order = torch.tensor([[0, 1], [0, 1]])  # of two tasks all orders are alike
    torch.testing.assert_close(combined(encoders[-1]), published_update(rows, order))
    for task, gradient in zip("ab", own, strict=True):
        torch.testing.assert_close(decoders[task].weight.grad, gradient)


def test_libmtls_methods_are_all_in_the_table() -> None:
    table = PAGE.section("LibMTL").split("| LibMTL's `weighting` | here |")[1].split("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(firsts))
    assert sorted(name for name in named if name != "calpha") == sorted(LIBMTL)


def test_cagrad_has_the_length_of_rescale_0() -> None:
    """A step of ``c |g0|`` from the mean, which no rescaling divides."""
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = balancing.cagrad(rows @ rows.T, c=0.4)
    mean = rows.mean(0)
    torch.testing.assert_close((weights @ rows - mean).norm(), 0.4 * mean.norm())


# ---- kernels ---------------------------------------------------------------------------------


def test_attention() -> None:
    torch.manual_seed(0)
    hidden, attention_mask = (
        torch.randn(3, 5, 8),
        torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 2, 3)]),
    )
    scope = changed("flash-attn", hidden=hidden, attention_mask=attention_mask, heads=2)
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
    scope = changed("flash-attn's layer norm", **names)
    total = scope["total"]
    kept = (total - residual).abs() > 0
    assert 0.8 < kept.float().mean() < 1
    torch.testing.assert_close(total, residual + kept * hidden / 0.9)
    torch.testing.assert_close(scope["normalised"], F.layer_norm(total, (48,), weight, bias, 1e-12))


def test_layer_norm() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 48)
    scope = changed("apex", hidden=hidden)
    torch.testing.assert_close(scope["normalised"], F.layer_norm(hidden, (48,), eps=1e-12))


def test_names_that_the_page_gives_exist() -> None:
    import kernels

    named = set(re.findall(r"balancing\.(?!md\b)(\w+)", PAGE.text))
    methods: list[Callable[..., Tensor]] = [getattr(balancing, name) for name in named]
    assert len(methods) >= 10
    for name in set(re.findall(r"`kernels\.(\w+)", PAGE.text)):
        assert hasattr(kernels, name), name


# ---- transformers ----------------------------------------------------------------------------
def test_snippets_of_a_transformers_model() -> None:
    """Means of packed hidden states, and three tasks in one pass."""
    transformers = pytest.importorskip("transformers")
    section = "A transformers model"
    first, means, tasks = PAGE.blocks("python", section)
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
