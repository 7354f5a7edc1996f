"""Linear layers' Triton kernels."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.linear import linear, linear_triton

from ..conftest import untouched_memory
from ..tolerance import assert_within_twice

TAIL = 5  # rows of no task behind the last one's
# Tasks without rows at both ends and between, one row, primes, rows of no task before the first and
# behind the last.
LINEAR_OFFSETS = (3, 3, 4, 17, 17, 48, 48)
# Outputs and inputs on both sides of every tile's: thin, narrow, large; and multiples of nothing.
LINEAR_SHAPES = [(1, 7), (1, 96), (16, 130), (17, 33), (32, 32), (64, 72), (65, 144), (130, 65)]
LINEAR_CASES = [
    *((*shape, LINEAR_OFFSETS) for shape in LINEAR_SHAPES),
    (48, 80, (0, 64, 256)),  # multiples of every tile
    (5, 20, tuple(range(0, 70, 7))),  # more tasks than a launch has
    (72, 80, (5, 5, 5)),
]


@pytest.mark.parametrize(("outputs", "inputs", "offsets"), LINEAR_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_task_gradients(
    outputs: int, inputs: int, offsets: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(outputs, inputs, offsets, dtype, dtype, device)
    case.assert_within_twice(accumulate=False)
    case.assert_within_twice(accumulate=True)
    for one, other in zip(case.written(True), case.written(True), strict=True):
        assert torch.equal(one, other)


# Autocast's: products are rounded to the dtype of dy before they are widened.
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear_task_gradients_in_wider_rows(accumulate: bool, device: str) -> None:
    case = LinearCase(40, 72, LINEAR_OFFSETS, torch.float16, torch.float32, device)
    case.assert_within_twice(accumulate)
    if not accumulate:
        assert torch.equal(case.weight_rows.half().float(), case.weight_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", ["weight", "bias"])
def test_linear_task_gradients_of_one_parameter(
    wanted: str, dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(24, 40, LINEAR_OFFSETS, dtype, dtype, device)
    both = case.written(False)
    alone = case.written(False, wanted)
    # A bias by itself is summed by more warps, in another order.
    torch.testing.assert_close(alone, both[0 if wanted == "weight" else 1])
    assert case.buffer.isnan().sum() == case.buffer.numel() - alone.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_task_gradients_of_strided_streams(dtype: torch.dtype, device: str) -> None:
    case = LinearCase(72, 80, LINEAR_OFFSETS, dtype, dtype, device)
    expected = case.written(False)
    grad, x = case.streams
    nan = torch.full_like(grad, torch.nan)
    between = torch.stack([grad, nan], 2)[:, :, 0]
    inner = torch.cat([nan, grad, nan], 1)[:, 72:144]
    for case.streams in ((between, x), (inner, x), (grad.T.contiguous().T, x.T.contiguous().T)):
        for one, other in zip(case.written(False), expected, strict=True):
            assert torch.equal(one, other)
    one_row = grad[10:11]
    results = []
    for every in (one_row.expand_as(grad), one_row.repeat(len(grad), 1)):
        case.streams = (every, x)
        results.append(case.written(False))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# Kernels alone, torch and a kernel, torch alone.
@pytest.mark.parametrize(
    ("dtype", "rows_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_linear_task_gradients_by_what_the_operator_calls(
    dtype: torch.dtype, rows_dtype: torch.dtype, device: str
) -> None:
    case = LinearCase(20, 36, LINEAR_OFFSETS, dtype, rows_dtype, device)
    expected = case.reference(dtype, accumulate=False)
    case.buffer.fill_(torch.nan)
    rows = (case.weight_rows, case.bias_rows)
    linear._task_gradients_cuda(*case.streams, *rows, case.offsets, False)
    for found, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=1e-3, atol=1e-5)


def test_linear_task_gradients_of_two_dtypes_under_autocast(device: str) -> None:
    case = LinearCase(20, 36, LINEAR_OFFSETS, torch.float16, torch.float32, device)
    expected = case.written(False)
    grad, x = case.streams
    case.buffer.fill_(torch.nan)
    rows = (case.weight_rows, case.bias_rows)
    with torch.autocast(device, torch.float16):
        linear._task_gradients_cuda(grad, x.float(), *rows, case.offsets, False)
    for found, wanted in zip(rows, expected, strict=True):
        assert torch.equal(found, wanted)


def test_linear_task_gradients_do_not_depend_on_the_other_tasks(device: str) -> None:
    case = LinearCase(72, 80, LINEAR_OFFSETS, torch.float32, torch.float32, device)
    weights, biases = case.written(False)
    for task, ends in enumerate(pairwise(case.offsets)):
        case.offsets = ends
        alone = case.written(False)
        assert torch.equal(alone[0][0], weights[task])
        assert torch.equal(alone[1][0], biases[task])


def test_linear_task_gradients_with_offsets_beyond_32_bits(device: str) -> None:
    """Rows of the streams and of the buffer 2^28 elements apart; nothing between is touched."""
    row, offsets = 2**28, (0, 4, 11)
    streams = torch.randn(2, 11, 32, device=device).half()
    near = torch.zeros(2, 32 * 32, device=device).half().view(2, 32, 32)
    with untouched_memory():
        far_streams, memory = torch.empty(2, 12 * row, dtype=torch.float16, device=device)
    far = far_streams.as_strided((2, 11, 32), (32, row, 1)).copy_(streams)
    far_rows = memory.as_strided((2, 32, 32), (10 * row, 32, 1))
    for (grad, x), rows in ((streams, near), (far, far_rows)):
        linear_triton.write_gradients_(grad, x, rows, rows.new_empty(0), offsets, False)
    assert torch.equal(far_rows, near)


class LinearCase:
    """One layer's streams, and a gradient buffer whose other columns stay NaN."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        offsets: tuple[int, ...],
        dtype: torch.dtype,
        rows_dtype: torch.dtype,
        device: str,
    ) -> None:
        self.sizes, self.offsets, self.dtype = (outputs, inputs), offsets, dtype
        self.draw(device)
        gap = 16
        columns = outputs * inputs + outputs + 2 * gap
        self.buffer = torch.empty(len(offsets) - 1, columns, dtype=rows_dtype, device=device)
        self._begin = gap

    def draw(self, device: torch.device | str) -> None:
        """Draw other streams; what belongs to no task does not count."""
        total = self.offsets[-1] + TAIL
        streams = [torch.randn(total, n, device=device).to(self.dtype) for n in self.sizes]
        for stream in streams:
            stream[: self.offsets[0]] = stream[self.offsets[-1] :] = torch.nan
        self.streams = tuple(streams)

    @property
    def weight_rows(self) -> Tensor:
        """``[K, O, I]``, in the middle of the buffer."""
        outputs, inputs = self.sizes
        rows = self.buffer[: len(self.offsets) - 1]
        return rows[:, self._begin :][:, : outputs * inputs].unflatten(1, self.sizes)

    @property
    def bias_rows(self) -> Tensor:
        """``[K, O]``, behind them."""
        begin = self._begin + self.sizes[0] * self.sizes[1]
        return self.buffer[: len(self.offsets) - 1, begin : begin + self.sizes[0]]

    def written(self, accumulate: bool, only: str = "") -> tuple[Tensor, Tensor] | Tensor:
        """What the kernels write into a buffer of NaN, or add to one of fours."""
        nothing = self.buffer.new_empty(0)
        self.buffer.fill_(4 if accumulate else torch.nan)
        rows = {"weight": self.weight_rows, "bias": self.bias_rows}
        given = [rows[name] if name == only or not only else nothing for name in rows]
        linear_triton.write_gradients_(*self.streams, *given, self.offsets, accumulate)
        clones = self.weight_rows.clone(), self.bias_rows.clone()
        return {"": clones, "weight": clones[0], "bias": clones[1]}[only]

    def reference(self, dtype: torch.dtype, accumulate: bool) -> list[Tensor]:
        """The same by torch, in this dtype."""
        streams = [stream.to(dtype) for stream in self.streams]
        rows_dtype = dtype if dtype == torch.float64 else self.buffer.dtype
        rows = [
            torch.full_like(x, 4 if accumulate else torch.nan, dtype=rows_dtype)
            for x in (self.weight_rows, self.bias_rows)
        ]
        linear.linear_task_gradients_reference_(*streams, *rows, self.offsets, accumulate)
        return rows

    def assert_within_twice(self, accumulate: bool) -> None:
        """Compare with float64 the largest errors of both, in a few draws."""
        found, torchs, exact = [], [], []
        for _ in range(4 if self.sizes[0] == 1 else 2):
            self.draw(self.buffer.device)
            found.append(self.written(accumulate))
            torchs.append(self.reference(self.dtype, accumulate))
            exact.append(self.reference(torch.float64, accumulate))
            # The columns beside the rows are not touched.
            rest = self.buffer.eq(4) if accumulate else self.buffer.isnan()
            assert rest.sum() >= self.buffer.numel() - sum(rows.numel() for rows in found[-1])
        assert_within_twice(
            *(
                torch.cat([rows.flatten() for draw in draws for rows in draw])
                for draws in (found, torchs, exact)
            )
        )
