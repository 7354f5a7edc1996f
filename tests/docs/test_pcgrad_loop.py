"""The loops of the page on PCGrad in your loop run, and do what the page says of them."""

import copy
import functools
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import BalancedOptimizer, PCGrad, TaskGradients, balancing
from tests.docs.diffs import sides
from tests.docs.pages import Page

PAGE = Page("pcgrad-loop")

Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Model(nn.Module):
    """An encoder and two heads; ``forward`` returns the loss of each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 1)])

    def forward(self, batch: Batch) -> list[Tensor]:
        (x_a, y_a), (x_b, y_b) = batch
        return [
            F.cross_entropy(self.heads[0](self.encoder(x_a)), y_a),
            F.mse_loss(self.heads[1](self.encoder(x_b)).squeeze(1), y_b),
        ]


class ThreeTasks(nn.Module):
    """Three tasks that conflict, so that the order of projections matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, batch: Batch) -> list[Tensor]:
        targets = torch.tensor([[3.0, -2.0, 0.0], [-3.0, 0.0, 2.0], [1.0, 3.0, -3.0]])
        outputs = self.layer(batch[0][0])
        return [(outputs - target).square().mean() for target in targets]


def batches_of(count: int, sizes: tuple[int, int] = (8, 5)) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        x_a, x_b = (torch.randn(size, 6, generator=draw) for size in sizes)
        y_a = torch.randint(3, (sizes[0],), generator=draw)
        batches.append(((x_a, y_a), (x_b, torch.randn(sizes[1], generator=draw))))
    return batches


def joined(batches: list[Batch]) -> Batch:
    """All examples of several batches in one."""
    of_a, of_b = (
        tuple(torch.cat(tensors) for tensors in zip(*task, strict=True))
        for task in zip(*batches, strict=True)
    )
    return of_a, of_b  # type: ignore[return-value]


def trained(batches: list[Batch], model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """The weights after the page's first loop."""
    model = model or Model()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-3), **settings)
    for batch in batches:
        optimizer.zero_grad()
        optimizer.pc_backward(model(batch))
        optimizer.step()
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(left: nn.Module, right: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(left.state_dict(), right.state_dict(), **tolerance)


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    assert_close(left, right, rtol=0, atol=0)


# ---- the diff --------------------------------------------------------------------------------


def test_the_diff_leads_from_the_sum_to_pcgrad() -> None:
    (diff,) = PAGE.blocks("diff")
    batches, models = batches_of(3), [Model(), Model()]
    for code, model in zip(sides(diff), models, strict=True):
        scope = {"torch": torch, "model": model, "batches": batches}
        exec(compile(code, "pcgrad-loop.md, the diff", "exec"), scope)

    summed = Model()
    optimizer = torch.optim.AdamW(summed.parameters(), lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        sum(summed(batch)).backward()
        optimizer.step()
    assert_equal(models[0], summed)
    assert_equal(models[1], trained(batches))
    assert "+optimizer = PCGrad(" in diff
    assert diff.count("\n-") + diff.count("\n+") <= 6  # as many lines changed


# ---- one backward pass -----------------------------------------------------------------------


def test_one_backward_pass_gives_the_weights_of_one_for_each_task() -> None:
    model, batches = Model(), batches_of(3)
    PAGE.run_python("All tasks in one backward pass", model=model, batches=batches)
    # Only sums are in another order; AdamW's step is at most its rate, 1e-3.
    assert_close(model, trained(batches), rtol=1e-4, atol=1e-5)


def test_one_backward_pass_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    backward = torch.autograd.backward

    def counted(*arguments: Any, **settings: Any) -> None:
        passes.append(arguments)
        backward(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "backward", counted)
    PAGE.run_python("All tasks in one backward pass", model=Model(), batches=batches_of(3))
    assert len(passes) == 3


# ---- mixed precision -------------------------------------------------------------------------


def test_mixed_precision() -> None:
    """Both loops give what fp32 gives, to the rounding of their dtypes."""
    batches, bf16 = batches_of(4), Model()
    blocks = PAGE.blocks("python", "Mixed precision")
    scope: dict[str, Any] = {"device": "cpu", "model": bf16, "batches": batches}
    exec(blocks[0], scope)
    exact = trained(batches)
    # AdamW moves a weight by its rate, 1e-3, in each of four steps, whatever a gradient's size:
    # only those that change sign in bf16 (eps 8e-3) end elsewhere.
    moved = torch.cat([(p - q).abs().flatten() for p, q in pairs(bf16, exact)])
    assert moved.median() < 1e-4
    assert moved.max() <= 8e-3

    fp16 = Model()
    scope |= {"model": fp16, "optimizer": PCGrad(torch.optim.SGD(fp16.parameters(), lr=0.1))}
    torch_scaler = torch.amp.GradScaler
    scope["torch"].amp.GradScaler = functools.partial(torch_scaler, init_scale=2.0**8)
    try:
        exec(blocks[1], scope)
    finally:
        scope["torch"].amp.GradScaler = torch_scaler
    clipped = Model()
    optimizer = PCGrad(torch.optim.SGD(clipped.parameters(), lr=0.1))
    for batch in batches:
        optimizer.zero_grad()
        optimizer.pc_backward(clipped(batch))
        nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
        optimizer.step()
    # Four steps of norm 0.1 at most; fp16 rounds activations to 5e-4 of their size, of order 1.
    assert_close(fp16, clipped, rtol=0, atol=4 * 0.1 * 1e-2)


def pairs(left: nn.Module, right: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(left.parameters(), right.parameters(), strict=True))


def test_the_update_is_proportional_to_the_scale() -> None:
    """A power of two scales fp32 gradients without rounding."""
    plain, scaled = ThreeTasks(), ThreeTasks()
    (batch,) = batches_of(1)
    PCGrad(torch.optim.SGD(plain.parameters(), lr=0.1)).pc_backward(plain(batch))
    optimizer = PCGrad(torch.optim.SGD(scaled.parameters(), lr=0.1))
    optimizer.pc_backward([loss * 2.0**16 for loss in scaled(batch)])
    expected = [gradient * 2.0**16 for gradient in gradients(plain)]
    torch.testing.assert_close(gradients(scaled), expected, rtol=1e-5, atol=0)


def test_a_scaler_skips_a_step_whose_task_gradient_overflows() -> None:
    model = Model()
    before = copy.deepcopy(model)
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-3))
    (batch,) = batches_of(1)
    scope = {"device": "cpu", "model": model, "batches": [batch], "optimizer": optimizer}
    scaled = model.forward

    def too_large(batch: Batch) -> list[Tensor]:
        first, second = scaled(batch)
        return [first, second * 1e9]

    model.forward = too_large  # type: ignore[method-assign]
    exec(PAGE.blocks("python", "Mixed precision")[1], scope | {"torch": torch})
    assert_equal(model, before)


# ---- accumulation ----------------------------------------------------------------------------


def test_accumulation_is_the_step_of_the_joined_batch() -> None:
    model, micro_batches = Model(), batches_of(4)
    PAGE.run_python("Accumulation", model=model, micro_batches=micro_batches)
    at_once = trained([joined(micro_batches)])
    torch.testing.assert_close(gradients(model), gradients(at_once))
    # AdamW divides by gradients' sizes: 1e-3 is the whole first step.
    assert_close(model, at_once, rtol=1e-4, atol=1e-5)


def test_what_losses_of_unequal_micro_batches_are_multiplied_by() -> None:
    micro_batches = [*batches_of(1, (8, 2)), *batches_of(1, (3, 6))]
    model, at_once = Model(), Model()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    totals = [sum(len(batch[task][0]) for batch in micro_batches) for task in range(2)]
    for batch in micro_batches:
        shares = [len(batch[task][0]) / totals[task] for task in range(2)]
        optimizer.pc_backward(
            [loss * share for loss, share in zip(model(batch), shares, strict=True)]
        )
    PCGrad(torch.optim.SGD(at_once.parameters(), lr=0.1)).pc_backward(
        at_once(joined(micro_batches))
    )
    torch.testing.assert_close(gradients(model), gradients(at_once))


def test_accumulation_is_not_the_mean_of_balanced_micro_batches() -> None:
    micro_batches = batches_of(3)
    model = ThreeTasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    balanced = []
    for batch in micro_batches:
        optimizer.zero_grad()
        optimizer.pc_backward([loss / 3 for loss in model(batch)])
        balanced.append(gradients(model)[0])
    optimizer.zero_grad()
    for batch in micro_batches:
        optimizer.pc_backward([loss / 3 for loss in model(batch)])
    assert not torch.allclose(gradients(model)[0], torch.stack(balanced).sum(0), rtol=1e-3)


def test_each_call_draws_an_order_and_the_last_one_counts() -> None:
    micro_batches = batches_of(2)
    model, at_once = ThreeTasks(), ThreeTasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in micro_batches:
        optimizer.pc_backward([loss / 2 for loss in model(batch)])
    assert optimizer.param_groups[0]["drawn_orders"] == 2
    other = PCGrad(torch.optim.SGD(at_once.parameters(), lr=0.1))
    other.param_groups[0]["drawn_orders"] = 1  # the second order
    other.pc_backward(at_once(joined(micro_batches)))
    torch.testing.assert_close(gradients(model), gradients(at_once))


# ---- clipping, schedules, freezing -----------------------------------------------------------


def test_clipping_limits_the_balanced_gradient() -> None:
    model = Model()
    model.heads[1].weight.data *= 50  # so that gradients are large
    scope = PAGE.run_python("Clipping", model=model, batches=batches_of(2))
    assert scope["norm"] > 1
    norm = torch.cat([gradient.flatten() for gradient in gradients(model)]).norm()
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_the_default_mean_is_the_sum_divided_by_the_tasks() -> None:
    (batch,) = batches_of(1)
    of = {}
    for reduction in ("mean", "sum"):
        model = Model()
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction=reduction)
        optimizer.pc_backward(model(batch))
        of[reduction] = model
    for name, parameter in of["sum"].named_parameters():
        factor = 2 if name.startswith("encoder") else 1  # one task uses a head
        mean = of["mean"].get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, factor * mean)


def test_a_schedule() -> None:
    scope = PAGE.run_python("Learning-rate schedules", model=Model(), batches=batches_of(3))
    assert scope["optimizer"].optimizer.param_groups[0]["lr"] == pytest.approx(0.7e-3)


def test_freezing_and_unfreezing() -> None:
    """Frozen weights stay, with a weight decay too; moments are kept by a new wrapper."""
    batches = batches_of(4)
    blocks = PAGE.blocks("python", "Freezing layers, and unfreezing them later")
    model = Model()
    before = copy.deepcopy(model)
    scope: dict[str, Any] = {"model": model, "batches": batches[:2]}
    exec(blocks[0], scope)
    assert_equal(model.encoder, before.encoder)
    assert all(p.grad is None for p in model.encoder.parameters())

    model = Model()
    scope |= {"model": model, "batches": batches}
    exec(blocks[0], scope)
    assert not torch.equal(model.encoder[0].weight, before.encoder[0].weight)

    steps = scope["optimizer"].state[model.heads[0].weight]["step"].item()
    exec(blocks[1], scope)
    optimizer = scope["optimizer"]
    assert optimizer.state[model.heads[0].weight]["step"].item() == steps == 4
    assert optimizer.param_groups[0]["drawn_orders"] == 4


def test_task_gradients_of_before_are_refused_after_unfreezing() -> None:
    model = Model()
    model.encoder.requires_grad_(False)
    tasks = TaskGradients(model, 2)
    optimizer = PCGrad(torch.optim.AdamW(model.parameters()), task_gradients=tasks)
    model.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match=r"not the 4 of task_gradients; .* anew"):
        optimizer.pc_backward(model(batches_of(1)[0]))


# ---- LoRA ------------------------------------------------------------------------------------


class TextModel(nn.Module):
    """A place for a transformers encoder, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = None
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 1)])


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_lora_of_peft(collects: bool) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, intermediate_size=24, **sizes)
    model = TextModel()
    scope = PAGE.run_python("LoRA", model=model, bert=transformers.BertModel(config).eval())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    names = [name for name, p in model.encoder.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)

    optimizer, tasks = scope["optimizer"], scope["tasks"]
    if not collects:
        optimizer = PCGrad(optimizer.optimizer)
    ids = torch.randint(1, 30, (8, 5))
    for _ in range(2):
        optimizer.zero_grad()
        with tasks.batch([5, 3]) if collects else nullcontext():
            hidden = model.encoder(ids).last_hidden_state[:, 0].split([5, 3])
            losses = []
            for task in range(2):
                with tasks.task(task) if collects else nullcontext():
                    losses.append(model.heads[task](hidden[task]).square().mean())
        optimizer.pc_backward(losses)
        optimizer.step()
    assert optimizer.gram.shape == (2, 2)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    moved = [n for n, p in after.items() if "lora_B" in n and p.any()]
    assert len(moved) == 4  # B is zero at first


# ---- several optimizers ----------------------------------------------------------------------


def test_several_optimizers() -> None:
    model, batches = Model(), batches_of(1)
    plain = Model()
    torch.autograd.backward(plain(batches[0]))
    scope = PAGE.run_python("Several optimizers", model=model, batches=batches)
    heads = [parameter.grad for parameter in model.heads.parameters()]
    torch.testing.assert_close(heads, [parameter.grad for parameter in plain.heads.parameters()])
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, plain.encoder.parameters())])
        for loss in (plain(batches[0])[task] for task in range(2))
    ]
    gram = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(scope["encoder_optimizer"].gram, gram, rtol=1e-4, atol=1e-6)


def test_several_optimizers_with_one_backward_pass() -> None:
    model, (batch,) = Model(), batches_of(1)
    (x_a, y_a), (x_b, y_b) = batch
    tasks = TaskGradients(model.encoder, num_tasks=2)
    optimizer = PCGrad(torch.optim.SGD(model.encoder.parameters(), 0.1), task_gradients=tasks)
    sizes = [len(x_a), len(x_b)]
    with tasks.batch(sizes):
        hidden_a, hidden_b = model.encoder(torch.cat([x_a, x_b])).split(sizes)
        with tasks.task(0):
            loss_a = F.cross_entropy(model.heads[0](hidden_a), y_a)
        with tasks.task(1):
            loss_b = F.mse_loss(model.heads[1](hidden_b).squeeze(1), y_b)
    optimizer.pc_backward([loss_a, loss_b])
    expected = Model()
    PCGrad(torch.optim.SGD(expected.encoder.parameters(), 0.1)).pc_backward(expected(batch))
    torch.testing.assert_close(gradients(model), gradients(expected))


# ---- saving and resuming ---------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tasks, whose orders of projection are drawn anew in each step."""
    monkeypatch.chdir(tmp_path)
    batches = batches_of(6)
    first, second = PAGE.blocks("python", "Saving and resuming")
    exec(first, {"model": ThreeTasks(), "batches": batches[:3]})

    resumed = ThreeTasks()
    resumed.layer.weight.data.zero_()
    optimizer = PCGrad(torch.optim.AdamW(resumed.parameters(), lr=1e-3), seed=0)
    scope = {"torch": torch, "model": resumed, "optimizer": optimizer}
    exec(second, scope)
    assert optimizer.param_groups[0]["drawn_orders"] == 3
    for batch in batches[3:]:
        optimizer.zero_grad()
        optimizer.pc_backward(resumed(batch))
        optimizer.step()
    uninterrupted = trained(batches, ThreeTasks())
    assert_equal(resumed, uninterrupted)
    assert not torch.equal(
        trained(batches, ThreeTasks(), seed=1).layer.weight, uninterrupted.layer.weight
    )


def test_a_state_of_the_plain_optimizer_loads() -> None:
    model, (batch,) = Model(), batches_of(1)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(model(batch)).backward()
    plain.step()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=5e-2))
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["drawn_orders"] == 0


# ---- methods, cosines, torch.compile ---------------------------------------------------------


def test_another_method() -> None:
    model, batches = Model(), batches_of(1)
    scope = PAGE.run_python("Another method", model=model, batches=batches)
    optimizer = scope["optimizer"]
    expected = balancing.cagrad(optimizer.gram, c=0.4)
    torch.testing.assert_close(optimizer.weights, expected[None])


def test_cosines() -> None:
    model, batches = Model(), batches_of(2)
    scope = PAGE.run_python("Cosines and conflicts", model=model, batches=batches)
    plain = trained(batches[:1])
    rows = []
    for loss in plain(batches[1]):
        found = torch.autograd.grad(
            loss, list(plain.parameters()), retain_graph=True, allow_unused=True
        )
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(plain.parameters(), found, strict=True)
                ]
            )
        )
    expected = F.cosine_similarity(rows[0], rows[1], dim=0)
    cosines = scope["cosines"]
    torch.testing.assert_close(cosines[0, 1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(2))
    assert scope["conflicts"].dtype == torch.bool
    assert scope["optimizer"].weights.shape == (1, 2)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in the graph count as used by all tasks, which ``reduction="sum"`` does not see."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    batches = batches_of(2)
    code = "\n".join(PAGE.blocks("python", "torch.compile"))
    summed = Model()
    with_sum = code.replace("lr=1e-3)", 'lr=1e-3), reduction="sum"')
    assert with_sum != code
    exec(with_sum, {"model": summed, "batches": batches})
    assert_close(summed, trained(batches, reduction="sum"), rtol=1e-4, atol=1e-5)

    model = Model()
    exec(code, {"model": model, "batches": batches[:1]})
    eager = trained(batches[:1])
    head, expected = model.heads[0].weight.grad, eager.heads[0].weight.grad
    torch.testing.assert_close(2 * head, expected)
    torch.testing.assert_close(model.encoder[0].weight.grad, eager.encoder[0].weight.grad)


# ---- the tables at the end -------------------------------------------------------------------


def shown(number: int) -> str:
    """The text of a message in the table of errors, without its ellipses."""
    rows = re.findall(r"^\| `(.*?)` ?[(|]", PAGE.section("If you see, if you want"), re.MULTILINE)
    return ".*".join(re.escape(words.strip()) for words in rows[number].split("…"))


def test_the_messages_that_the_table_explains() -> None:
    (batch,) = batches_of(1)
    (x_a, _), (x_b, _) = batch

    def wrapped(model: Model, collects: bool = False) -> Any:
        tasks = TaskGradients(model, 2) if collects else None
        return PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=tasks), tasks

    model = Model()
    optimizer, _ = wrapped(model)
    with torch.no_grad():
        losses = model(batch)
    with pytest.raises(ValueError, match=shown(0)):
        optimizer.pc_backward(losses)
    losses = model(batch)
    optimizer.pc_backward([losses[0].detach(), losses[1]])  # its task counts as absent
    assert optimizer.gram[0, 0] == 0

    losses = model(batch)
    optimizer.pc_backward(losses)
    with pytest.raises(RuntimeError, match=shown(1)):
        optimizer.pc_backward(losses)
    with pytest.raises(ValueError, match=shown(2)):
        optimizer.pc_backward(sum(model(batch)))

    optimizer, _ = wrapped(model)
    model.zero_grad()
    sum(model(batch)).backward()
    with pytest.warns(UserWarning, match=shown(3)):
        optimizer.step()

    model = Model()
    optimizer, _ = wrapped(model, collects=True)
    with pytest.raises(RuntimeError, match=shown(4)):
        optimizer.pc_backward(model(batch))
    model.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=shown(5)):
        optimizer.pc_backward(model(batch))

    norm = nn.BatchNorm1d(6)
    tasks = TaskGradients(nn.Sequential(norm), 2)
    with pytest.raises(NotImplementedError, match=shown(6)), tasks.batch([len(x_a), len(x_b)]):
        norm(torch.cat([x_a, x_b]))
    with tasks.task(0):
        norm(x_a)


def test_batch_norm_counts_forward_passes_alone() -> None:
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(norm, nn.Linear(6, 1))
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(4, 6)
    optimizer.pc_backward([model(x).square().mean(), (model(x) - 1).square().mean()])
    assert norm.num_batches_tracked == 2


def test_one_forward_pass_at_a_time() -> None:
    """The result is that of one call; the graph of each loss is gone before the next."""
    (batch,) = batches_of(1)
    model = Model()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"])
    for number, name in enumerate("ab"):
        optimizer.pc_backward({name: model(batch)[number]})
    at_once = Model()
    PCGrad(torch.optim.SGD(at_once.parameters(), lr=0.1)).pc_backward(at_once(batch))
    torch.testing.assert_close(gradients(model), gradients(at_once))


def test_what_the_memory_is() -> None:
    """K gradients and their combination, of fp32."""
    model = Model()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(model(batches_of(1)[0]))
    (buffer,) = optimizer._gradients._buffers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert buffer.gradients.rows.nbytes == 4 * 2 * parameters
    kept = sum(p.grad.untyped_storage().nbytes() for p in list(model.parameters())[:1])
    assert kept == 4 * parameters  # one vector, of which each `grad` is a view


def test_terms_that_are_not_balanced_come_first() -> None:
    (batch,) = batches_of(1)
    model, alone = ThreeTasks(), ThreeTasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.zero_grad()
    model.layer.weight.square().sum().backward()
    optimizer.pc_backward(model(batch))
    PCGrad(torch.optim.SGD(alone.parameters(), lr=0.1)).pc_backward(alone(batch))
    expected = alone.layer.weight.grad + 2 * alone.layer.weight
    torch.testing.assert_close(model.layer.weight.grad, expected)


def test_the_seconds_are_those_of_the_results() -> None:
    """Of the row on speed, which names the table."""
    results = Page("results").section("With bf16 instructions")
    ((ours, published),) = re.findall(r"takes (\d\.\d+) s so, and (\d\.\d+) s", PAGE.text)
    first_table = results.split("### ")[0]
    seconds = dict(re.findall(r"^\| \**([^|*]+)\** \| (\d\.\d{3}) ", first_table, re.MULTILINE))
    one_pass = "accelerated, bf16, all tasks in one packed pass, TaskGradients and PCGrad"
    as_published = "transformers, bf16, packed by task, PCGrad as published"
    assert f"{float(seconds[one_pass]):.2f}" == ours
    assert f"{float(seconds[as_published]):.2f}" == published


def test_other_wrappers_take_the_same_losses() -> None:
    """`BalancedOptimizer` with the sum is the plain loop."""
    model, plain, (batch,) = Model(), Model(), batches_of(1)
    BalancedOptimizer(torch.optim.SGD(model.parameters(), 0.1), balancing.sum).backward(
        model(batch)
    )
    sum(plain(batch)).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
