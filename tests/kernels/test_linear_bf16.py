"""Products of bfloat16 by this project's kernels (csrc/linear_*), against float64.

Every test runs on vectors (AVX512_BF16) and in tiles (AMX), where the processor has both.  Sizes
are one, odd (the kernels multiply pairs), those of BERT's layers, and around those that the kernels
work in:

- both: blocks of 128 rows, and of 1024 tokens of a task;
- vectors: tiles of 8 rows, vectors of 16 columns, panels of 48, and, of weight gradients, blocks of
  at most 288 outputs and 384 inputs;
- tiles: 16 rows by 16 words, in blocks of 32 rows and panels of 32 columns; steps of 32 numbers of
  the inner dimension, in chunks of at most 12 (384 numbers); and, of weight gradients, 192 outputs,
  up to four times as many in a block where there are blocks enough, and 384 inputs.  Columns of the
  left operand are transposed 8 at a time there.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.linear.linear import MULTIPLIES_BF16, linear_task_gradients_reference_

from .argument_fuzz import freed, guarded, strided
from .conftest import BF16_UNITS, VECTOR_UNITS
from .layer_cases import LAYERS as LAYERS_OF_STREAMS
from .layer_cases import Stream
from .tolerance import assert_within_twice

OPS = torch.ops.superbert
DTYPES = [torch.bfloat16, torch.float32]
needs_bf16 = pytest.mark.skipif(not MULTIPLIES_BF16, reason="this processor has no AVX512_BF16")
pytestmark = pytest.mark.usefixtures("bf16_unit")


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.itemsize == 2 else torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and the sign of zero included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_specials(result: Tensor, exact: Tensor) -> None:
    """NaN and infinities are where they belong, and nowhere else."""
    assert torch.equal(result.isnan(), exact.isnan())
    assert torch.equal(result.isposinf(), exact.isposinf())
    assert torch.equal(result.isneginf(), exact.isneginf())


# ---- which processors ---------------------------------------------------------------------------


def test_python_and_the_extension_agree_on_the_processor() -> None:
    if MULTIPLIES_BF16:
        machine = torch.cpu.get_capabilities()
        in_tiles = machine.get("amx_tile", False) and machine.get("amx_bf16", False)
        best = OPS.limit_vector_unit(len(VECTOR_UNITS) - 1)  # which bf16_unit chooses afterwards
        assert VECTOR_UNITS[best] == BF16_UNITS[in_tiles]
        assert OPS.linear_bf16(bf16(2, 3), bf16(4, 3), None).shape == (2, 4)
    else:
        with pytest.raises(ValueError, match="x: this processor has no bfloat16 products"):
            OPS.linear_bf16(bf16(2, 3), bf16(4, 3), None)


@pytest.mark.skipif(MULTIPLIES_BF16, reason="this processor has AVX512_BF16")
def test_other_processors_refuse() -> None:
    none = torch.empty(0)
    for call in (
        lambda: OPS.linear_bf16_grad_input(bf16(2, 4), bf16(4, 3)),
        lambda: OPS.linear_bf16_task_gradients_(
            bf16(2, 4), bf16(2, 3), none, none.clone(), [0, 2], False
        ),
    ):
        with pytest.raises(ValueError, match="this processor has no bfloat16 products"):
            call()


def test_the_declared_backend_is_the_one_that_runs() -> None:
    backend = "cpp" if MULTIPLIES_BF16 else "torch"
    assert kernels.backend("linear_task_gradients_", "cpu") == backend


# ---- forward, and gradients of the input --------------------------------------------------------

# Around a tile, two of them and a block of rows, with every remainder of a tile's halves.
ROWS = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257]
# Outputs and inputs: one, around a pair, a vector or tile, two, a panel, and two panels.  Each is a
# number of columns in one product and the inner dimension in the other.
MATRICES = [
    *((1, 1), (1, 2), (2, 1), (15, 17), (16, 16), (17, 15), (31, 33), (32, 32), (33, 31)),
    *((47, 49), (48, 48), (49, 47), (63, 65), (95, 97), (97, 95), (144, 3), (3, 145)),
]
WIDE = [
    *((5, 768, 768), (130, 384, 1536), (129, 1536, 384), (13, 1152, 384)),
    *((24, 3072, 768), (9, 768, 3072), (2, 31, 3071)),
    # Around one chunk of the inner dimension, and several, of unequally many steps.
    *((17, 383, 33), (33, 33, 383), (16, 384, 16), (33, 17, 385), (15, 385, 31), (49, 800, 800)),
    *((1, 800, 17), (32, 48, 769)),
]


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [*(((n, *m) for n, m in product(ROWS, MATRICES))), *WIDE])
def test_forward_and_input_gradients(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs)
    for added in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        assert_within_twice(OPS.linear_bf16(x, weight, added), F.linear(x, weight, added), exact)
    grad = bf16(rows, outputs)
    assert_within_twice(
        OPS.linear_bf16_grad_input(grad, weight), grad @ weight, grad.double() @ weight.double()
    )


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(0, 0, 0), (5, 0, 3), (5, 3, 0), (0, 3, 0), (5, 0, 0)])
def test_products_without_columns_or_summands(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs)
    assert same_bits(OPS.linear_bf16(x, weight, bias), bias.expand(rows, outputs))
    grad = bf16(rows, outputs)
    assert same_bits(OPS.linear_bf16_grad_input(grad, weight), grad.new_zeros(rows, inputs))


@needs_bf16
@pytest.mark.parametrize("exponent", [-40, 40])
def test_numbers_far_from_one(exponent: int) -> None:
    x, weight = bf16(13, 129) * 2.0**exponent, bf16(31, 129) * 2.0**exponent
    exact = x.double() @ weight.double().T
    assert_within_twice(OPS.linear_bf16(x, weight, None), x @ weight.T, exact)


def other_strides(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, or those of one row or column, as callers may have them in memory."""
    yield from strided(x)
    if x.dim() == 2:
        rows, columns = x.shape
        wide = torch.full((rows, columns + 8), torch.nan, dtype=x.dtype)  # in no sum, times zero
        for start, step in ((3, 0), (4, 0), (3, 1)):  # odd: pairs that are not aligned
            part = wide.as_strided(x.shape, (columns + 6 + step, 1), start)
            yield f"rows apart, from {start}", part.copy_(x)
        yield "one number", torch.ones((), dtype=x.dtype).expand(x.shape)


@needs_bf16
@pytest.mark.parametrize(
    "shape", [(9, 11, 1), (9, 11, 12), (9, 11, 13), (17, 33, 31), (33, 31, 32), (16, 32, 33)]
)
def test_strides_of_operands_make_no_difference(shape: tuple[int, int, int]) -> None:
    """Nor does what is in memory between their rows, before and behind them, though it is NaN."""
    rows, outputs, inputs = shape
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs)
    grad = bf16(rows, outputs)
    arguments = [("x", x), ("weight", weight), ("bias", bias)]
    for place, (_, tensor) in enumerate(arguments):
        for kind, view in other_strides(tensor):
            given = [x, weight, bias]
            given[place] = view
            expected = OPS.linear_bf16(*(each.contiguous() for each in given))
            assert same_bits(OPS.linear_bf16(*given), expected), (place, kind)
    for place, tensor in enumerate((grad, weight)):
        for kind, view in other_strides(tensor):
            given = [grad, weight]
            given[place] = view
            expected = OPS.linear_bf16_grad_input(*(each.contiguous() for each in given))
            assert same_bits(OPS.linear_bf16_grad_input(*given), expected), (place, kind)


@needs_bf16
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "widths",  # odd: the last pair is half empty
    [(19, 1), (19, 2), (19, 7), (19, 8), (19, 49), (33, 31), (31, 32), (32, 33), (385, 65)],
)
def test_nan_and_infinity_stay_in_what_depends_on_them(
    widths: tuple[int, int], special: float
) -> None:
    outputs, inputs = widths
    x, weight, bias = bf16(17, inputs), bf16(outputs, inputs), bf16(outputs)
    grad = bf16(17, outputs)

    def changed(tensor: Tensor, place: int, at: int, spoiled: int) -> Tensor:
        if place != spoiled:
            return tensor
        tensor = tensor.clone()
        tensor.view(-1)[at] = special
        return tensor

    def places(tensor: Tensor) -> set[int]:
        """Both ends of the first row, the beginning of the second, and the last element."""
        width, last = tensor.shape[-1], tensor.numel() - 1
        return {0, width - 1, min(width, last), last}

    for spoiled, tensor in enumerate((x, weight, bias)):
        for at in places(tensor):
            given = [changed(each, i, at, spoiled) for i, each in enumerate((x, weight, bias))]
            exact = F.linear(*(each.double() for each in given))
            assert_same_specials(OPS.linear_bf16(*given), exact)
    for spoiled, tensor in enumerate((grad, weight)):
        for at in places(tensor):
            given = [changed(each, i, at, spoiled) for i, each in enumerate((grad, weight))]
            exact = given[0].double() @ given[1].double()
            assert_same_specials(OPS.linear_bf16_grad_input(*given), exact)


# ---- GELU inside the products -------------------------------------------------------------------


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "shape", [*(((n, *m) for n, m in product((0, 1, 9, 129), MATRICES))), *WIDE]
)
def test_products_with_gelu(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs)
    for added in (None, bias):
        out, activated = OPS.linear_bf16_gelu(x, weight, added)
        assert same_bits(out, OPS.linear_bf16(x, weight, added))
        assert_within_twice(activated, F.gelu(out), F.gelu(out.double()))
    grad, widened = bf16(rows, outputs), bf16(rows, inputs)
    found = OPS.linear_bf16_gelu_grad_input(grad, weight, widened)
    backward = torch.ops.aten.gelu_backward
    torchs = backward(grad @ weight, widened)
    exact = backward(grad.double() @ weight.double(), widened.double())
    assert_within_twice(found, torchs, exact)


# ---- gradients of weights and biases ------------------------------------------------------------

# Tokens, and where tasks begin and end.
BATCHES = [
    *((0, [0, 0]), (1, [0, 1]), (3, [1, 1]), (9, [2, 3])),  # no token, one, rows of nobody
    (20, [0, 7, 7, 20]),
    (33, [2, 2, 15, 31]),
    *((n + 2, [1, 1 + n]) for n in (1023, 1024, 1025, 2048)),
    (99, [1, 32, 64, 97]),  # of 31, 32 and 33 tokens
    (3080, [0, 1, 2049, 2049, 3074]),  # the next block begins with an odd token
    (60, [3, 4, 4, 9, 16, 31, 32, 32, 41, 58]),
]
# Outputs and inputs: as MATRICES, and one more than a block, where tasks are many.
LAYERS = [(1, 1), (1, 16), (8, 32), (9, 33), (17, 31), (48, 15), (49, 97), (193, 33), (289, 385)]
BERT = [
    (65, [0, 21, 64], (768, 768)),
    (40, [0, 13, 14, 40], (2304, 768)),
    (21, [0, 21], (3072, 768)),
    (21, [0, 21], (768, 3072)),
    (1030, [0, 1, 1030], (1152, 384)),
    (40, [0, 27, 40], (384, 1536)),
]
# More tasks than threads can be busy with: blocks of outputs are as large as they may be.
MANY_TASKS = [
    (40, [*range(0, 39, 3), 40], widths) for widths in ((768, 384), (769, 33), (577, 385))
]

Sizes = tuple[int, list[int], tuple[int, int]]


class Layer:
    """Streams of a batch, and two kinds of gradient rows: those to write, and torch's."""

    def __init__(
        self,
        sizes: Sizes,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
        *,
        fill: float | None = torch.nan,
        around: int = 3,
    ) -> None:
        tokens, self.offsets, (outputs, inputs) = sizes
        self.x = bf16(tokens, inputs)
        # Of 64ths: their sums are exact in float32, and so no luck of the order in which they add
        # up decides between ours and torch's.
        self.grad = (64 * torch.randn(tokens, outputs)).round().div(64).bfloat16()
        tasks = len(self.offsets) - 1
        self.buffers, self.rows = [], []
        for dtype, shape in zip(dtypes, ((outputs, inputs), (outputs,)), strict=True):
            width = torch.Size(shape).numel()
            buffer = torch.full((tasks, width + 2 * around), torch.nan, dtype=dtype)
            rows = buffer[:, around : around + width].unflatten(1, shape)
            rows.copy_(torch.randn(rows.shape) if fill is None else torch.tensor(fill))
            self.buffers.append(buffer)
            self.rows.append(rows)
        self.around = around

    def run(self, accumulate: bool = False) -> list[Tensor]:
        OPS.linear_bf16_task_gradients_(self.grad, self.x, *self.rows, self.offsets, accumulate)
        return self.rows

    def check(self, accumulate: bool = False) -> None:
        """Write the rows, compare them, and see that nothing around them is written."""
        held = [rows.clone() for rows in self.rows]
        torchs = [rows.clone() for rows in held]
        reference = linear_task_gradients_reference_
        reference(self.grad, self.x, *torchs, self.offsets, accumulate)
        pairs = list(pairwise(self.offsets))
        dy, x = self.grad.double(), self.x.double()
        exact = [
            torch.stack([dy[a:b].T @ x[a:b] for a, b in pairs]),
            torch.stack([dy[a:b].sum(0) for a, b in pairs]),
        ]
        for own, theirs, expected, before in zip(
            self.run(accumulate), torchs, exact, held, strict=True
        ):
            assert_within_twice(own, theirs, expected + before.double() if accumulate else expected)
        for buffer in self.buffers:
            assert buffer[:, : self.around].isnan().all()
            assert buffer[:, buffer.shape[1] - self.around :].isnan().all()


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", LAYERS)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: "-".join(map(str, batch[1])))
def test_task_gradients(batch: Any, matrix: tuple[int, int], dtype: torch.dtype) -> None:
    Layer((*batch, matrix), (dtype, dtype)).check()


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sizes", [*BERT, *MANY_TASKS])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
def test_task_gradients_of_bert(sizes: Sizes, dtypes: Any) -> None:
    Layer(sizes, dtypes).check()


@needs_bf16
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("batch", [*BATCHES[3:6], BATCHES[-2]])
def test_accumulated_task_gradients(batch: Any, dtypes: Any) -> None:
    Layer((*batch, (49, 31)), dtypes, fill=None).check(accumulate=True)


@needs_bf16
def test_what_is_accumulated_onto_nothing_stays() -> None:
    layer = Layer((9, [4, 4, 4], (17, 5)), (torch.bfloat16, torch.float32), fill=None)
    before = [rows.clone() for rows in layer.rows]
    assert all(map(same_bits, layer.run(accumulate=True), before))
    assert not any(rows.any() for rows in layer.run())


@needs_bf16
@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("batch", [BATCHES[4], BATCHES[-2]])
def test_gradients_of_one_parameter(batch: Any, empty: int) -> None:
    sizes: Sizes = (*batch, (49, 31))
    layer = Layer(sizes)
    expected = [rows.clone() for rows in layer.run()]
    layer.rows[empty] = torch.empty(0)
    other = layer.rows[1 - empty].fill_(torch.nan)
    layer.run()
    assert same_bits(other, expected[1 - empty])


@needs_bf16
def test_gradients_without_tasks_or_columns_write_nothing() -> None:
    none = torch.empty(0)
    run = OPS.linear_bf16_task_gradients_
    run(bf16(5, 3), bf16(5, 4), none, none.clone(), [2], False)
    run(bf16(5, 3), bf16(5, 4), none, none.clone(), [0, 2, 5], False)
    run(bf16(5, 0), bf16(5, 4), bf16(1, 0, 4), bf16(1, 0), [0, 5], False)
    biases, grad = bf16(1, 3), bf16(5, 3)
    run(grad, bf16(5, 0), bf16(1, 3, 0), biases, [0, 5], False)
    assert_within_twice(biases, grad.sum(0)[None], grad.double().sum(0)[None])


@needs_bf16
@pytest.mark.parametrize("widths", [(1, 1), (12, 13), (13, 12), (31, 33), (33, 32), (32, 31)])
def test_strides_of_streams_make_no_difference(widths: tuple[int, int]) -> None:
    """Nor does what is in memory around their rows, though it is NaN."""
    for name in ("x", "grad"):
        layer = Layer((43, [1, 4, 8, 41], widths))
        for kind, view in other_strides(getattr(layer, name)):
            setattr(layer, name, view)
            own = [rows.clone() for rows in layer.run()]
            setattr(layer, name, view.contiguous())
            assert all(map(same_bits, own, layer.run())), (name, kind)


@needs_bf16
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_buffer(dtype: torch.dtype) -> None:
    """Weight and bias rows as they lie in the gradient buffer, other columns between them."""
    outputs, inputs, offsets = 17, 13, [0, 3, 3, 20]
    buffer = torch.full((3, outputs * (inputs + 1) + 9), torch.nan, dtype=dtype)
    columns = torch.zeros(buffer.shape[1], dtype=torch.bool)
    columns[2 : 2 + outputs * inputs] = True
    columns[-outputs - 5 : -5] = True
    weight_rows = buffer[:, 2 : 2 + outputs * inputs].unflatten(1, (outputs, inputs))
    bias_rows = buffer[:, -outputs - 5 : -5]
    layer = Layer((22, offsets, (outputs, inputs)), (dtype, dtype), around=0)
    apart = layer.run()
    layer.rows = [weight_rows, bias_rows]
    assert all(map(same_bits, layer.run(), apart))
    assert buffer[:, ~columns].isnan().all()


@needs_bf16
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "ends",  # an odd token is alone in a pair; a step takes 32
    [(2, 9), (2, 33), (2, 34), (2, 35), (2, 1027), (2, 1028)],
)
def test_nan_and_infinity_stay_in_their_task(ends: tuple[int, int], special: float) -> None:
    offsets = [*ends, ends[1] + 6]
    tokens = offsets[-1] + 2
    places = [0, 1, *(end + step for end in offsets for step in (-1, 0)), tokens - 1]
    for token, (name, column) in product(places, (("x", 0), ("x", 4), ("grad", 0), ("grad", 16))):
        layer = Layer((tokens, offsets, (17, 5)))
        getattr(layer, name)[token, column] = special
        dy, x = layer.grad.double(), layer.x.double()
        for task, (own, bias) in enumerate(zip(*layer.run(), strict=True)):
            start, end = offsets[task : task + 2]
            assert_same_specials(own, dy[start:end].T @ x[start:end])
            assert_same_specials(bias, dy[start:end].sum(0))


# ---- both units, and other libraries -------------------------------------------------------------


def whole_numbers(*shape: int) -> Tensor:
    """Sums of their products are exact in float32, in any order."""
    return torch.randint(-4, 5, shape).bfloat16()


@needs_bf16
@pytest.mark.parametrize("shape", [(17, 33, 31), (129, 385, 800), (33, 49, 385)])
def test_exact_sums_are_rounded_once(shape: tuple[int, int, int]) -> None:
    """So both units, and float64, give the same bits."""
    rows, outputs, inputs = shape
    x, weight, bias = whole_numbers(rows, inputs), whole_numbers(outputs, inputs), bf16(outputs)
    exact = x.double() @ weight.double().T
    assert same_bits(OPS.linear_bf16(x, weight, None), exact.bfloat16())
    exact_with_bias = exact.float() + bias.float()  # rounded to float32 first, as in the kernels
    assert same_bits(OPS.linear_bf16(x, weight, bias), exact_with_bias.bfloat16())
    grad = whole_numbers(rows, outputs)
    exact = grad.double() @ weight.double()
    assert same_bits(OPS.linear_bf16_grad_input(grad, weight), exact.bfloat16())
    layer = Layer((rows, [0, rows // 3, rows], (outputs, inputs)), (torch.float32, torch.float32))
    layer.x, layer.grad = x, grad
    weight_rows, bias_rows = layer.run()
    for task, (a, b) in enumerate(pairwise(layer.offsets)):
        exact = grad[a:b].double().T @ x[a:b].double()
        assert same_bits(weight_rows[task], exact.bfloat16().float())
        assert same_bits(bias_rows[task], grad[a:b].float().sum(0))


@needs_bf16
@pytest.mark.parametrize("shape", [(17, 33, 31), (129, 385, 800), (40, 768, 384)])
def test_units_agree(shape: tuple[int, int, int], bf16_unit: str) -> None:
    """Their sums differ in float32's last bits, so results by one rounding of the largest."""
    if bf16_unit == BF16_UNITS[0]:
        pytest.skip("compared to the other unit where that is taken")
    rows, outputs, inputs = shape
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs), bf16(outputs)
    grad = bf16(rows, outputs)
    layer = Layer((rows, [0, rows // 3, rows], (outputs, inputs)))

    def run() -> list[Tensor]:
        out, activated = OPS.linear_bf16_gelu(x, weight, bias)
        grad_input = OPS.linear_bf16_grad_input(grad, weight)
        slopes = OPS.linear_bf16_gelu_grad_input(grad, weight, x)
        return [out, activated, grad_input, slopes, *(own.clone() for own in layer.run())]

    in_tiles = run()
    OPS.limit_vector_unit(VECTOR_UNITS.index(BF16_UNITS[0]))
    for own, other in zip(in_tiles, run(), strict=True):
        difference = (own.double() - other.double()).abs().max()
        assert difference <= torch.finfo(own.dtype).eps * other.double().abs().max()


def operands_for_turns(rows: int, outputs: int, inputs: int) -> Iterator[Callable[[], None]]:
    """Calls that check products of their own: this project's, and oneDNN's, in turns."""
    x, weight = whole_numbers(rows, inputs), whole_numbers(outputs, inputs)
    grad = whole_numbers(rows, outputs)
    layer = Layer((rows, [0, rows // 2, rows], (outputs, inputs)), (torch.float32,) * 2)
    layer.x, layer.grad = x, grad
    product = (x.double() @ weight.double().T).bfloat16()
    grad_input = (grad.double() @ weight.double()).bfloat16()
    gradients = [
        (grad[a:b].double().T @ x[a:b].double()).bfloat16().float()
        for a, b in pairwise(layer.offsets)
    ]

    def check(holds: bool) -> None:
        assert holds, (rows, outputs, inputs)

    yield lambda: check(same_bits(OPS.linear_bf16(x, weight, None), product))
    yield lambda: check(same_bits(x @ weight.T, product))
    yield lambda: check(same_bits(OPS.linear_bf16_grad_input(grad, weight), grad_input))
    yield lambda: check(same_bits(F.linear(x, weight), product))
    yield lambda: check(all(map(same_bits, layer.run()[0], gradients)))
    yield lambda: check(same_bits(grad @ weight, grad_input))


@needs_bf16
@pytest.mark.parametrize("callers", [1, 3])
def test_takes_turns_with_onednn(callers: int) -> None:
    """Whose products configure the tile registers of the same threads in other ways.

    Of several Python threads, too, each of which has threads of its own that compute.
    """
    shapes = [(17, 33, 31), (64, 96, 385), (129, 64, 128)]

    def take_turns(number: int) -> None:
        calls = [[*operands_for_turns(*shape)] for shape in shapes[number:] + shapes[:number]]
        for _ in range(5):
            for turn in zip(*calls, strict=True):  # the next call has other shapes
                for call in turn:
                    call()

    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(take_turns, number) for number in range(callers)]:
            done.result()


# ---- threads and memory -------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize(
    "shape", [(1, 97, 129), (200, 49, 31), (5, 768, 384), (300, 300, 400), (33, 800, 400)]
)
def test_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    offsets = [0, rows // 3, rows // 3, rows - rows // 5, rows]
    layer = Layer((rows, offsets, (outputs, inputs)), (torch.bfloat16, torch.float32))
    weight, bias = bf16(outputs, inputs), bf16(outputs)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out = OPS.linear_bf16(layer.x, weight, bias)
        results.append(
            [
                *(out, OPS.linear_bf16_grad_input(layer.grad, weight)),
                *(rows.clone() for rows in layer.run()),
            ]
        )
    for others in results[1:]:
        assert all(map(same_bits, results[0], others))


@needs_bf16
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1, 1), (3, 5, 7), (9, 17, 49), (130, 49, 16), (8, 48, 96)),
        *((31, 33, 32), (33, 32, 31), (32, 31, 33), (67, 32, 64), (17, 385, 31)),
        (64, 49, 17),  # two tasks of one whole step each, and a column beside whole eights
    ],
)
def test_no_step_beyond_the_operands(shape: tuple[int, int, int], at_end: bool) -> None:
    """Every operand ends where memory begins that may be neither read nor written, or begins there.

    So do rows that lie apart: the last one has no gap behind it.
    """
    rows, outputs, inputs = shape

    def placed(x: Tensor, gap: int = 0) -> Tensor:
        size, stride = x[0].numel(), x[0].numel() + gap
        memory = guarded(x.new_zeros((len(x) - 1) * stride + size), at_end)
        strides = (stride, *x.stride()[1:])
        return memory.as_strided(x.shape, strides).copy_(x)

    offsets = [0, rows // 2, rows]
    layer = Layer((rows, offsets, (outputs, inputs)), (torch.bfloat16, torch.float32), around=0)
    weight, bias = bf16(outputs, inputs), bf16(outputs)
    expected = [rows.clone() for rows in layer.run()]
    out = OPS.linear_bf16(layer.x, weight, bias)
    grad_input = OPS.linear_bf16_grad_input(layer.grad, weight)
    for gap in (0, 1, 2):
        x, grad, own_weight = (placed(t, gap) for t in (layer.x, layer.grad, weight))
        own_bias = guarded(bias, at_end)
        assert same_bits(OPS.linear_bf16(x, own_weight, own_bias), out)
        assert same_bits(OPS.linear_bf16_grad_input(grad, own_weight), grad_input)
        own = [placed(rows.fill_(torch.nan), gap) for rows in layer.rows]
        OPS.linear_bf16_task_gradients_(grad, x, *own, offsets, False)
        assert all(map(same_bits, own, expected))


# ---- refusals -----------------------------------------------------------------------------------

X, WEIGHT, BIAS, GRAD = bf16(6, 4), bf16(5, 4), bf16(5), bf16(6, 5)
FREED = "its storage holds 0 of"


def refused(call: Callable[..., object], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*given.values())


@needs_bf16
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x: expected \[rows, inputs\], got \[4\]"),
        ({"x": X[None]}, r"x: expected \[rows, inputs\], got \[1, 6, 4\]"),
        ({"x": bf16(6, 3)}, r"x: expected the shape \[6, 4\], got \[6, 3\]"),
        ({"x": X.float()}, "x: expected bfloat16"),
        ({"x": freed(X)}, f"x: {FREED} 48"),
        ({"weight": BIAS}, r"weight: expected \[outputs, inputs\], got \[5\]"),
        ({"weight": WEIGHT.half()}, "weight: expected bfloat16"),
        ({"weight": freed(WEIGHT)}, f"weight: {FREED} 40"),
        ({"bias": bf16(4)}, r"bias: expected the shape \[5\], got \[4\]"),
        ({"bias": WEIGHT}, r"bias: expected the shape \[5\], got \[5, 4\]"),
        ({"bias": BIAS.double()}, "bias: expected bfloat16"),
        ({"bias": freed(BIAS)}, f"bias: {FREED} 10"),
    ],
)
def test_forward_refuses(change: dict[str, Any], message: str) -> None:
    refused(OPS.linear_bf16, {"x": X, "weight": WEIGHT, "bias": BIAS} | change, message)


@needs_bf16
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": BIAS}, r"grad_output: expected \[rows, outputs\], got \[5\]"),
        ({"grad_output": X}, r"grad_output: expected the shape \[6, 5\], got \[6, 4\]"),
        ({"grad_output": GRAD.float()}, "grad_output: expected bfloat16"),
        ({"grad_output": freed(GRAD)}, f"grad_output: {FREED} 60"),
        ({"weight": BIAS}, r"weight: expected \[outputs, inputs\], got \[5\]"),
        ({"weight": WEIGHT.float()}, "weight: expected bfloat16"),
        ({"weight": freed(WEIGHT)}, f"weight: {FREED} 40"),
    ],
)
def test_input_gradients_refuse(change: dict[str, Any], message: str) -> None:
    given = {"grad_output": GRAD, "weight": WEIGHT} | change
    refused(OPS.linear_bf16_grad_input, given, message)


APART = "expected rows that lie apart, each contiguous"
OVERLAPS = "written, and so must not overlap"
BUFFER = torch.zeros(2, 60, dtype=torch.bfloat16)


@needs_bf16
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": BIAS}, r"grad_output: expected \[tokens, outputs\], got \[5\]"),
        ({"grad_output": GRAD[1:]}, r"grad_output: expected the shape \[6, 5\], got \[5, 5\]"),
        ({"grad_output": GRAD.float()}, "grad_output: expected bfloat16"),
        ({"grad_output": freed(GRAD)}, f"grad_output: {FREED} 60"),
        ({"x": X[0]}, r"x: expected \[tokens, inputs\], got \[4\]"),
        ({"x": X.float()}, "x: expected bfloat16"),
        ({"x": freed(X)}, f"x: {FREED} 48"),
        ({"weight_rows": bf16(2, 4, 5)}, r"weight_rows: expected the shape \[2, 5, 4\]"),
        ({"weight_rows": bf16(3, 5, 4)}, r"weight_rows: expected the shape \[2, 5, 4\]"),
        ({"weight_rows": bf16(2, 20)}, r"weight_rows: expected the shape \[2, 5, 4\]"),
        ({"weight_rows": torch.zeros(2, 5, 4).half()}, "weight_rows: expected bfloat16 or float32"),
        ({"weight_rows": torch.zeros(2, 5, 4).double()}, "weight_rows: expected"),
        ({"weight_rows": freed(bf16(2, 5, 4))}, f"weight_rows: {FREED} 80"),
        ({"weight_rows": bf16(2, 4, 5).mT}, f"weight_rows: {APART}"),
        ({"weight_rows": bf16(5, 2, 4).transpose(0, 1)}, f"weight_rows: {APART}"),
        ({"weight_rows": bf16(2, 5, 6)[..., :4]}, f"weight_rows: {APART}"),
        ({"weight_rows": bf16(1, 5, 4).expand(2, 5, 4)}, f"weight_rows: {APART}"),
        ({"weight_rows": bf16(39).as_strided((2, 5, 4), (19, 4, 1))}, f"weight_rows: {APART}"),
        ({"bias_rows": bf16(2, 4)}, r"bias_rows: expected the shape \[2, 5\], got \[2, 4\]"),
        ({"bias_rows": torch.zeros(2, 5).half()}, "bias_rows: expected bfloat16 or float32"),
        ({"bias_rows": freed(bf16(2, 5))}, f"bias_rows: {FREED} 20"),
        ({"bias_rows": bf16(5, 2).T}, f"bias_rows: {APART}"),
        ({"bias_rows": bf16(1, 5).expand(2, 5)}, f"bias_rows: {APART}"),
        ({"offsets": []}, "offsets: expected row numbers within 0 .. 6"),
        ({"offsets": [0, 3, 7]}, "offsets: expected row numbers within 0 .. 6"),
        ({"offsets": [-1, 3, 6]}, "offsets: expected row numbers within 0 .. 6"),
        ({"offsets": [0, 7, 6]}, "offsets: expected to ascend"),
        ({"offsets": [0, 6]}, r"weight_rows: expected the shape \[1, 5, 4\]"),
        (
            {"weight_rows": BUFFER[:, :20].unflatten(1, (5, 4)), "x": BUFFER.view(30, 4)[10:16]},
            f"weight_rows: {OVERLAPS} x",
        ),
        (
            {
                "weight_rows": BUFFER[:, :20].unflatten(1, (5, 4)),
                "grad_output": BUFFER[0, 19:49].view(6, 5),
            },
            f"weight_rows: {OVERLAPS} grad_output",
        ),
        (
            {"weight_rows": BUFFER[:, :20].unflatten(1, (5, 4)), "bias_rows": BUFFER[:, 19:24]},
            f"weight_rows: {OVERLAPS} bias_rows",
        ),
        ({"bias_rows": BUFFER[:, :5], "x": BUFFER.view(30, 4)[1:7]}, f"bias_rows: {OVERLAPS} x"),
        (
            {"bias_rows": BUFFER[:, :5], "grad_output": BUFFER.view(24, 5)[12:18]},
            f"bias_rows: {OVERLAPS} grad_output",
        ),
    ],
)
def test_task_gradients_refuse(change: dict[str, Any], message: str) -> None:
    given = {
        **{"grad_output": GRAD, "x": X, "weight_rows": bf16(2, 5, 4), "bias_rows": bf16(2, 5)},
        **{"offsets": [0, 3, 6], "accumulate": False},
    }
    refused(OPS.linear_bf16_task_gradients_, given | change, message)


# ---- layers -------------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize(
    "name", ["linear", "linear by task", "feed_forward", "feed_forward by task"]
)
def test_compiled_layers(name: str) -> None:
    """In one graph, of a batch, and of one with other token counts."""
    torch.compiler.reset()
    layer = LAYERS_OF_STREAMS[name]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (21, 34):
        stream = Stream.of(tokens).to("cpu", torch.bfloat16)
        expected, found = stream.run(layer), stream.run(compiled)
        for own, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(own, plain)


@needs_bf16
def test_a_layer_that_runs_under_no_grad_is_the_one_that_trains() -> None:
    stream = Stream.of(21).to("cpu", torch.bfloat16)
    for name in ("linear by task", "feed_forward by task"):
        trained = LAYERS_OF_STREAMS[name](stream)
        with torch.no_grad():
            alone = LAYERS_OF_STREAMS[name](stream)
        assert same_bits(trained.detach(), alone)


@needs_bf16
def test_long_sums_of_biases() -> None:
    """Of a task of twenty blocks of tokens, whose float32 sums would lose to one another."""
    grad, x = bf16(20_000, 100), bf16(20_000, 1)
    found, nothing = torch.empty(1, 100), torch.empty(0)
    OPS.linear_bf16_task_gradients_(grad, x, nothing, found, [0, 20_000], False)
    torchs = torch.sum(grad, 0, dtype=torch.float32)
    assert_within_twice(found[0], torchs, grad.double().sum(0))
