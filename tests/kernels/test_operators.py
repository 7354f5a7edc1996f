"""Every operator, those of backward passes included, keeps torch's rules for operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import Columns, backend, plan_lookups
from kernels.attention.attention_options import AttentionOptions
from kernels.linear.linear import MULTIPLIES_BF16

from .balancing.methods import SOLVERS
from .layer_cases import LAYERS, Stream
from .test_surgery_weights import operator_samples

OPS = torch.ops.superbert
TOKENS, WIDTH, TABLE_ROWS = 24, 32, 9
CU_SEQLENS = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
OFFSETS = [0, 5, 20]
SEED = torch.tensor(0x123456789ABCDEF)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def attention(p: float, window: tuple[int, int] = (-1, -1)) -> dict[str, tuple]:
    """Arguments of the attention operators; with dropout they are given a plan, too."""
    options = AttentionOptions(0.2, True, p, 1, *window, seed=SEED if p else None)
    plan = OPS.attention_plan(CU_SEQLENS, TOKENS) if p else ()
    packed = (CU_SEQLENS, 13, *options, *plan)
    apart = (CU_SEQLENS, CU_SEQLENS, 13, *packed[1:])
    streams, qkv = [leaf(TOKENS, 2, 16) for _ in range(3)], leaf(TOKENS, 3, 2, 16)
    grad_out, inputs = torch.randn(TOKENS, 2, 16), qkv.detach()
    return {
        "attention": (*streams, *apart),
        "attention_backward": (
            *(grad_out, *inputs.unbind(1), *OPS.attention(*inputs.unbind(1), *apart), *apart),
        ),
        "attention_qkvpacked": (qkv, *packed),
        "attention_qkvpacked_backward": (
            *(grad_out, inputs, *OPS.attention_qkvpacked(inputs, *packed), *packed),
        ),
    }


def relative_attention(p: float) -> dict[str, tuple]:
    """Arguments of attention with a bias for each distance; with dropout there is a plan, too."""
    options = AttentionOptions(0.2, dropout_p=p, seed=SEED if p else None)
    packed = (CU_SEQLENS, 13, *options, *(OPS.attention_plan(CU_SEQLENS, TOKENS) if p else ()))
    qkv, bias, grad_out = leaf(TOKENS, 3, 2, 16), leaf(2, 27), torch.randn(TOKENS, 2, 16)
    inputs = qkv.detach(), bias.detach()
    saved = OPS.relative_attention(*inputs, *packed)
    return {
        "relative_attention": (qkv, bias, *packed),
        "relative_attention_backward": (grad_out, *inputs, *saved, *packed),
    }


def norms(by_task: bool) -> dict[str, tuple]:
    """Arguments of the operators that end in a norm; by task it is a pre-norm, and RMS norm."""
    x, residual, weight, bias = leaf(TOKENS, WIDTH), leaf(TOKENS, WIDTH), leaf(WIDTH), leaf(WIDTH)
    ids = torch.randint(0, TABLE_ROWS, (3, TOKENS)).unbind(0)
    tables = [leaf(TABLE_ROWS, WIDTH) for _ in range(3)]
    *starts, end = range(0, (3 * TABLE_ROWS + 3) * WIDTH + 1, WIDTH)
    starts = [*starts[: 3 * TABLE_ROWS : TABLE_ROWS], *starts[-3:]]  # of tables, weight, biases
    buffer = torch.zeros(2, end)
    plan = plan_lookups(ids, [Columns(start, (TABLE_ROWS, WIDTH)) for start in starts[:3]], OFFSETS)
    of_all: tuple = (buffer, starts[:5], OFFSETS, False, plan.data, [3, -1, 0])
    of_norm: tuple = (buffer, starts[3:5], OFFSETS, False)
    of_add: tuple = (buffer, starts[3:], OFFSETS, False)
    if not by_task:
        of_norm = of_add = (None, [], [], False)
        of_all = (*of_norm, None, [3, -1, 0])
    grad, hidden, mean, rstd = (*torch.randn(2, TOKENS, WIDTH), *torch.ones(2, TOKENS))
    gradient_rows = [torch.zeros(2, WIDTH) if by_task else torch.zeros(0) for _ in range(3)]
    statistics = (weight.detach(), mean, rstd)
    saved = (*statistics, *gradient_rows, OFFSETS, False)
    saved_by_embedding = (*statistics, *gradient_rows[:2], OFFSETS, False)
    looked_up = (*ids, *(table.detach() for table in tables))
    options = (0.1, 1e-12, SEED, 0)
    grad_sum = torch.randn(TOKENS, WIDTH) if by_task else None
    return {
        "layer_norm": (x, weight, bias, 1e-12, *of_norm, by_task),
        "layer_norm_backward": (grad, hidden, *saved, grad_sum, by_task),
        "dropout_add_layer_norm": (
            *(x, residual, bias, weight, bias, *options, *of_add, by_task, by_task),
        ),
        "dropout_add_layer_norm_backward": (
            *(grad, hidden, *saved, 0.1, SEED, 0, grad_sum, by_task),
        ),
        "embedding_layer_norm": (*ids, *tables, weight, bias, *options, *of_all),
        "embedding_layer_norm_backward": (*(grad, *looked_up, *saved_by_embedding, 0.1, SEED, 0),),
    }


def others() -> dict[str, tuple]:
    """Arguments of dropout and of the gradients by task."""
    x, grad, index = torch.randn(TOKENS, 4), torch.randn(TOKENS, 5), torch.arange(TOKENS) % 3
    rows, bias_rows = torch.zeros(2, 5, 4), torch.zeros(2, 5)
    # A row that more tokens look up than a piece has, and a table of other rows.
    long_offsets, tables = [0, 5, 45], [Columns(1, (1, 4)), Columns(8, (3, 4))]
    indices = (torch.zeros(45, dtype=torch.int64), torch.arange(45) % 3)
    plan, buffer = plan_lookups(indices, tables, long_offsets).data, torch.ones(2, 21)
    planned = (plan, buffer, [1, 3], long_offsets)
    angles = torch.randn(TOKENS, 3)
    tables, heads = (angles.cos(), angles.sin()), (1, TOKENS, 3, 2, 8)
    placed = (None, CU_SEQLENS, torch.tensor([3, 0, 1]), 0, True, False)
    return {
        "attention_plan": (CU_SEQLENS, TOKENS),
        "dropout": (leaf(7, 5), 0.2, SEED, 3),
        "geglu": (leaf(7, 10), True, 0.2, SEED, 3),
        "geglu_backward": (*torch.randn(7, 15).split([5, 10], 1), False, 0.2, SEED, 3),
        "swiglu": (leaf(7, 10), 0.0, None, 0),
        "swiglu_backward": (*torch.randn(7, 15).split([5, 10], 1), 0.2, SEED, 3),
        "note_tasks_": (torch.zeros(3, 2, dtype=torch.int64), [0, 2], OFFSETS),
        "onednn_linear": (x, grad.t() @ x, grad.sum(0)),
        "linear_task_gradients_": (grad, x, rows, bias_rows, OFFSETS, True),
        "embedding_task_gradients_": (x, index, torch.zeros(2, 3, 4), OFFSETS),
        "add_planned_gradients_": (torch.randn(45, 4), *planned, -1),
        "rotary": (leaf(*heads), *tables, torch.arange(TOKENS), None, None, 0, False, True),
        "rotary_": (torch.randn(heads), *tables, *placed, 2),
        "take_rows": (leaf(7, 5), torch.tensor([6, 0, -1])),
        "take_rows_backward": (torch.randn(3, 5), torch.tensor([6, 0, -1]), 7),
        "zero_planned_rows_": (buffer, plan, *planned[2:], 4),
    }


def bf16_products() -> dict[str, tuple]:
    """Arguments of this project's products of bfloat16, which other processors refuse."""
    x, weight, grad = torch.randn(TOKENS, 7), torch.randn(5, 7), torch.randn(TOKENS, 5)
    x, weight, bias, grad = (each.bfloat16() for each in (x, weight, torch.randn(5), grad))
    rows, bias_rows = torch.zeros(2, 5, 7).bfloat16(), torch.zeros(2, 5).bfloat16()
    return {
        "linear_bf16": (x, weight, bias),
        "linear_bf16_grad_input": (grad, weight),
        "linear_bf16_gelu": (x, weight, bias),
        "linear_bf16_gelu_grad_input": (grad, weight, x),
        "linear_bf16_task_gradients_": (grad, x, rows, bias_rows, OFFSETS, True),
    }


SAMPLES: dict[str, Callable[[], dict[str, tuple]]] = {
    "attention": lambda: attention(0.0),
    "attention with dropout": lambda: attention(0.2),
    "attention in a window": lambda: attention(0.2, (3, 2)),
    "relative attention": lambda: relative_attention(0.0),
    "relative attention with dropout": lambda: relative_attention(0.2),
    "norms": lambda: norms(by_task=False),
    "norms by task": lambda: norms(by_task=True),
    "others": others,
    "products of bfloat16": bf16_products,
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_operator_checks(kind: str) -> None:
    if kind == "products of bfloat16" and not MULTIPLIES_BF16:
        pytest.skip("this processor has no AVX512_BF16")
    for name, arguments in SAMPLES[kind]().items():
        torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_every_operator_is_checked_and_tells_what_runs_it() -> None:
    checked = {name for make in SAMPLES.values() for name in make()}
    checked |= operator_samples().keys() | SOLVERS.keys()
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("superbert::")}
    assert checked == registered - {"limit_vector_unit"}, (  # which takes no tensor
        "others() of tests/kernels/test_operators.py has an entry for each operator, its arguments"
    )
    for name in checked:
        assert backend(name, "cpu") in ("cpp", "torch")


@pytest.mark.parametrize(
    "layer_name",
    [
        *("flash_attn_varlen_func", "layer_norm", "dropout_add_layer_norm"),
        *("embedding_layer_norm", "geglu", "swiglu"),
    ],
)
def test_a_second_derivative_is_refused_and_not_taken_for_zero(layer_name: str) -> None:
    stream = Stream.of(21)
    parameter = stream.table if layer_name.startswith("embedding") else stream.x
    out = LAYERS[layer_name](stream)
    (grad,) = torch.autograd.grad(out.square().sum(), parameter, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{layer_name}: cannot differentiate twice"):
        grad.square().sum().backward()
