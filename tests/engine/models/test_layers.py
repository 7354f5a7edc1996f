"""Layers and their task gradients: a bias that a norm adds for a linear layer, rows of tables."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine._kernels import kernels
from engine.models.context import RowContext
from engine.models.layers import Embedding, LayerNorm, Linear, feed_forward
from engine.models.lora import LoraSettings, LowRankUpdate, LowRankUpdates

WIDTHS, OFFSETS = (6, 8), (0, 5, 5, 12)


def modules(*, bias: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {"linear": Linear(*WIDTHS, bias=bias, init_std=0.5), "norm": LayerNorm(8, eps=1e-5)}
    )
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers


def attach(layers: nn.ModuleDict, frozen: set[str]) -> dict[str, Tensor]:
    """Give the layers rows for all but the frozen parameters; return the rows by name."""
    shapes = {name: parameter.shape for name, parameter in layers.named_parameters()}
    slots, end = kernels.gradient_buffer.lay_out(shapes)
    buffer = torch.full((len(OFFSETS) - 1, end), torch.nan)
    columns: dict[str, dict[str, kernels.Columns]] = {"linear": {}, "norm": {}}
    for slot in slots:
        layer_name, name = slot.name.split(".")
        layers.get_parameter(slot.name).requires_grad_(slot.name not in frozen)
        if slot.name not in frozen:
            columns[layer_name][name] = slot.columns
    for layer_name, own in columns.items():
        layers[layer_name].attach_rows(buffer, own)
    return {slot.name: slot.view(buffer) for slot in slots}


def run(layers: nn.ModuleDict, context: RowContext, *, by_norm: bool) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    torch.manual_seed(1)
    x = torch.randn(14, 6, requires_grad=True)
    residual, grad = torch.randn(2, 14, 8)
    options = {"dropout_p": 0.3, "rng_offset": 2}
    if by_norm:
        product = layers["linear"].product(x, context)
        out = layers["norm"].add(product, residual, context, bias_of=layers["linear"], **options)
    else:
        out = layers["norm"].add(layers["linear"](x, context), residual, context, **options)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


NAMES = ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    "frozen", [[], *([name] for name in NAMES), NAMES[:2], NAMES[2:], NAMES[:1] + NAMES[2:]]
)
def test_task_gradients(frozen: list[str]) -> None:
    context = RowContext(segments=kernels.TaskSegments(OFFSETS), seed=torch.tensor(5))
    found = []
    for by_norm in (False, True):
        layers = modules()
        rows = attach(layers, set(frozen))
        found.append((*run(layers, context, by_norm=by_norm), *rows.values()))
        for name, own in rows.items():
            assert own.isnan().all() if name in frozen else own.isfinite().all()
        assert all(parameter.grad is None for parameter in layers.parameters())
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, equal_nan=True)


@pytest.mark.parametrize("bias", [False, True])
def test_ordinary_gradients(bias: bool) -> None:
    context = RowContext(seed=torch.tensor(5))
    found = []
    for by_norm in (False, True):
        layers = modules(bias=bias)
        results = run(layers, context, by_norm=by_norm)
        found.append([*results, *(parameter.grad for parameter in layers.parameters())])
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain)


# ---- feed-forward --------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Two layers as in `engine.models.bert.BertLayer`; ``plain`` computes them one by one."""

    def __init__(self, *, updated: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = Linear(6, 10, init_std=0.5), Linear(10, 8, init_std=0.3)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.down.bias)
        if updated is not None:
            layer: Linear = getattr(self, updated)
            outputs, inputs = layer.weight.shape
            update = LowRankUpdate(
                inputs, slice(0, outputs), LoraSettings(2, 6.0, 0.0, ("all",)), 9
            )
            update.up.weight.data.normal_()
            layer.lora = LowRankUpdates({"all": update}, outputs)

    def attach(self, frozen: set[str]) -> dict[str, Tensor]:
        """Give the layers rows for all but the frozen parameters; return the rows by name."""
        layers = {
            name: module for name, module in self.named_modules() if hasattr(module, "attach_rows")
        }
        own = {
            f"{name}.{key}": parameter
            for name, module in layers.items()
            for key, parameter in module.named_parameters(recurse=False)
        }
        dtype = self.up.weight.dtype
        slots, end = kernels.gradient_buffer.lay_out({name: p.shape for name, p in own.items()})
        buffer = torch.full((len(OFFSETS) - 1, end), torch.nan, dtype=dtype)
        columns: dict[str, dict[str, kernels.Columns]] = {name: {} for name in layers}
        for slot in slots:
            name, key = slot.name.rsplit(".", 1)
            own[slot.name].requires_grad_(slot.name not in frozen)
            if slot.name not in frozen:
                columns[name][key] = slot.columns
        for name, module in layers.items():
            module.attach_rows(buffer, columns[name])
        return {slot.name: slot.view(buffer) for slot in slots}

    def plain(self, x: Tensor, context: RowContext) -> Tensor:
        return self.down.product(F.gelu(self.up(x, context)), context)


def run_feed_forward(
    layers: FeedForward, frozen: set[str], *, by_kernel: bool
) -> tuple[Tensor, ...]:
    """The output, the gradient of the input, and the rows."""
    rows = layers.attach(frozen)
    torch.manual_seed(1)
    dtype = layers.up.weight.dtype
    x = torch.randn(14, 6).to(dtype).requires_grad_()
    grad = torch.randn(14, 8).to(dtype)
    context = RowContext(segments=kernels.TaskSegments(OFFSETS), seed=torch.tensor(5))
    if by_kernel:
        out = feed_forward(layers.up, layers.down, x, context)
    else:
        out = layers.plain(x, context)
    out.backward(grad)
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in layers.parameters())
    return out.detach(), x.grad, *rows.values()


UP_DOWN = ["up.weight", "up.bias", "down.weight"]


@pytest.mark.parametrize("frozen", [[], *([name] for name in UP_DOWN), UP_DOWN[:2], UP_DOWN])
def test_feed_forward_writes_the_rows_of_its_layers(frozen: list[str]) -> None:
    """The bias of the second layer is its norm's; in float32 all is the same to the bit."""
    found = [
        run_feed_forward(FeedForward(), {*frozen}, by_kernel=by_kernel)
        for by_kernel in (False, True)
    ]
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=0, equal_nan=True)


def test_feed_forward_without_rows() -> None:
    layers, x = FeedForward(), torch.randn(2, 7, 6)
    torch.testing.assert_close(
        feed_forward(layers.up, layers.down, x), layers.plain(x, RowContext()), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("updated", ["up", "down"])
def test_layers_with_low_rank_updates_run_one_by_one(
    updated: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(kernels, "feed_forward", refuse)
    found = [
        run_feed_forward(FeedForward(updated=updated).to(dtype), {*UP_DOWN}, by_kernel=by_kernel)
        for by_kernel in (False, True)
    ]
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=0, equal_nan=True)
    assert any(own.isfinite().all() and own.any() for own in found[1][2:])
    with pytest.raises(AssertionError):
        run_feed_forward(FeedForward().to(dtype), set(), by_kernel=True)


# Three tasks and 14 tokens: 4 entries are few enough to zero the whole table, 5 are not.
@pytest.mark.parametrize("entries", [1, 4, 5, 64])
def test_rows_of_a_table_are_zero_after_a_step(entries: int) -> None:
    torch.manual_seed(0)
    table, start = Embedding(entries, 3), 7
    buffer = torch.zeros(len(OFFSETS) - 1, start + 3 * entries + 2)
    buffer[:, :start], buffer[:, -2:] = 1.0, 2.0  # of other parameters
    table.attach_rows(buffer, {"weight": kernels.Columns(start, (entries, 3))})
    before, index = buffer.clone(), torch.randint(0, entries, (14,))
    table(index, RowContext(segments=kernels.TaskSegments(OFFSETS))).sum().backward()
    assert not buffer.equal(before)
    table.zero_rows(index, OFFSETS)
    assert buffer.equal(before)
