"""Layer norm, and BERT's dropout + residual + norm, on the GPU; `kernels.layer_norm` has the maths.

A program takes a few whole rows at once.  For the gradients of the parameters every program of the
backward pass sums its rows, which are of one task, in registers and writes one partial row; a
second kernel adds the partials in their order, so the result has the same bits every time.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803, SIM102

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments, element_factors, scattered_factors
from ..token_offsets_triton import decode_offset, encode_offsets


class Parameters(NamedTuple):
    """Weight, bias and the bias of x, each ``[N]``; a None is left out by a constexpr flag."""

    weight: Any
    bias: Any
    x_bias: Any


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def tile(first_row, row_end, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns, element numbers and mask of a tile of whole rows."""
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    elements = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < row_end)[:, None] & (columns < N)[None, :]
    return rows, columns, elements, mask


@triton.jit
def row_factors(rows, rng_offset, dropout, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout factors of whole rows."""
    start = rows.to(tl.int64) * N
    if N % 4 == 0:  # a row starts with a quad
        factors = element_factors(start, rng_offset, dropout, BLOCK_N)
    else:
        elements = start[:, None] + tl.arange(0, BLOCK_N)[None, :]
        factors = scattered_factors(elements, rng_offset, dropout)
    return factors


@triton.jit
def mean_of(sums, N: tl.constexpr):
    """Give ``sums / N`` within two roundings: ``/`` is a GPU's approximation, `tl.div_rn` slow."""
    return sums * (1.0 / N)


@triton.jit
def rstd_of(variance, eps):
    """Inverse deviation of a variance that rounding may have made negative; a NaN stays one.

    Rounded as the CPU rounds it: ``tl.sqrt``, ``/`` and ``tl.rsqrt`` are a GPU's approximations.
    """
    deviation = tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps)
    return tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), deviation)


@triton.jit
def normalize(
    h,
    mask,
    columns,
    parameters,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
):
    """Output, centred rows, mean and rstd of a tile of whole rows, the variance in two passes."""
    h = tl.where(mask, h, 0.0)
    rough_mean = mean_of(tl.sum(h, 1), N)
    deviation = tl.where(mask, h - rough_mean[:, None], 0.0)
    # The second pass also corrects the rounding of the first one's mean.
    correction = mean_of(tl.sum(deviation, 1), N)
    mean = rough_mean + correction
    variance = mean_of(tl.sum(deviation * deviation, 1), N) - correction * correction
    rstd = rstd_of(variance, eps)
    centred = tl.where(mask, h - mean[:, None], 0.0)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(parameters.weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(parameters.bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    return y, centred, mean, rstd


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def _forward_kernel(
    x,
    residual,
    parameters,
    out,
    hidden,
    mean,
    rstd,
    num_rows,
    eps,
    dropout,
    rng_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, elements, mask = tile(tl.program_id(0) * ROWS, num_rows, N, ROWS, BLOCK_N)
    h = tl.load(x + elements, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        h += tl.load(parameters.x_bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if DROPOUT:
        h *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
    if HAS_RESIDUAL:
        h += tl.load(residual + elements, mask=mask, other=0.0).to(tl.float32)
    y, centred, row_mean, row_rstd = normalize(
        h, mask, columns, parameters, eps, HAS_WEIGHT, HAS_BIAS, N
    )
    if HAS_RESIDUAL:
        # Kept for the backward pass, and the statistics of what is kept: rounding h itself would
        # leave little but rounding errors of a nearly constant row, whose rstd magnifies them.
        kept = centred.to(hidden.dtype.element_ty)
        tl.store(hidden + elements, kept, mask=mask)
        row_mean = tl.zeros_like(row_mean)
        if kept.dtype != tl.float32:
            centred = kept.to(tl.float32)
            row_mean = mean_of(tl.sum(centred, 1), N)
            square = mean_of(tl.sum(centred * centred, 1), N)
            row_rstd = rstd_of(square - row_mean * row_mean, eps)
    tl.store(mean + rows, row_mean, mask=rows < num_rows)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    tl.store(out + elements, y.to(out.dtype.element_ty), mask=mask)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def grad_of_rows(dy, h, w, mean, rstd, rows, row_end, mask, N: tl.constexpr):
    """Give dh and xhat of a tile of whole rows."""
    row_mean = tl.load(mean + rows, mask=rows < row_end, other=0.0)
    row_rstd = tl.load(rstd + rows, mask=rows < row_end, other=0.0)
    xhat = tl.where(mask, (h - row_mean[:, None]) * row_rstd[:, None], 0.0)
    g = dy * w[None, :]
    mean_g = mean_of(tl.sum(g, 1), N)
    mean_gx = mean_of(tl.sum(g * xhat, 1), N)
    return row_rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None]), xhat


@triton.jit
def _programs_of(boundaries, segment: tl.constexpr, log_rows):
    """First row, end, and number of programs of a segment."""
    begin = decode_offset(boundaries, segment)
    end = decode_offset(boundaries, segment + 1)
    return begin, end, (end - begin + (1 << log_rows) - 1) >> log_rows


@triton.jit
def rows_of_program(program, boundaries, log_rows, SEGMENTS: tl.constexpr):
    """First row and end of the rows of a program, all of one segment."""
    first, row_begin, row_end = 0 * program, 0 * program, 0 * program
    for segment in tl.static_range(SEGMENTS):
        begin, end, programs = _programs_of(boundaries, segment, log_rows)
        # The last segment that begins before the program is its own: empty ones have no program.
        reached = program >= first
        row_begin = tl.where(reached, begin + ((program - first) << log_rows), row_begin)
        row_end = tl.where(reached, end, row_end)
        first += programs
    return row_begin, tl.minimum(row_begin + (1 << log_rows), row_end)


@triton.jit
def store_partial(
    partials, sums, which: tl.constexpr, columns, N: tl.constexpr, SUMS: tl.constexpr
):
    """Store this program's sums for one parameter."""
    partial = partials + (tl.program_id(0).to(tl.int64) * SUMS + which) * N + columns
    tl.store(partial, sums, mask=columns < N)


@triton.jit(do_not_specialize=["log_rows", "rng_offset"])
def _backward_kernel(
    grad_out,
    hidden,
    weight,
    mean,
    rstd,
    grad_hidden,
    grad_x,
    partials,  # [programs, SUMS, N]
    boundaries,
    log_rows,
    dropout,
    rng_offset,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # 0: none, 2: for weight and bias, 3: for x_bias too
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    begin, end = rows_of_program(tl.program_id(0), boundaries, log_rows, SEGMENTS)
    columns = tl.arange(0, BLOCK_N)
    grad_weight = tl.zeros([BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    grad_x_bias = tl.zeros([BLOCK_N], tl.float32)
    w = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    for first_row in range(begin, end, ROWS):
        rows, columns, elements, mask = tile(first_row, end, N, ROWS, BLOCK_N)
        dy = tl.load(grad_out + elements, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(hidden + elements, mask=mask, other=0.0).to(tl.float32)
        dh, xhat = grad_of_rows(dy, h, w, mean, rstd, rows, end, mask, N)
        tl.store(grad_hidden + elements, dh.to(grad_hidden.dtype.element_ty), mask=mask)
        if SUMS > 0:
            grad_weight += tl.sum(dy * xhat, 0)
            grad_bias += tl.sum(dy, 0)
        if DROPOUT:
            dh *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
            tl.store(grad_x + elements, dh.to(grad_x.dtype.element_ty), mask=mask)
        if SUMS == 3:
            grad_x_bias += tl.sum(dh, 0)
    if SUMS > 0:
        store_partial(partials, grad_weight, 0, columns, N, SUMS)
        store_partial(partials, grad_bias, 1, columns, N, SUMS)
    if SUMS == 3:
        store_partial(partials, grad_x_bias, 2, columns, N, SUMS)


@triton.jit
def _store_gradient(rows, task, stride, columns, total, ACCUMULATE: tl.constexpr, N: tl.constexpr):
    pointers = rows + task.to(tl.int64) * stride + columns
    if ACCUMULATE:
        total += tl.load(pointers, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(pointers, total.to(rows.dtype.element_ty), mask=columns < N)


@triton.jit(
    do_not_specialize=[
        "log_rows",
        "first_segment",
        "first_task",
        "weight_stride",
        "bias_stride",
        "x_bias_stride",
    ]
)
def _sum_partials_kernel(
    partials,  # [programs, SUMS, N]
    weight_rows,  # [K, N], and so the others
    bias_rows,
    x_bias_rows,
    weight_stride,
    bias_stride,
    x_bias_stride,
    boundaries,
    log_rows,
    first_segment,
    first_task,
    ACCUMULATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    which, own_segment = tl.program_id(1), tl.program_id(2) + first_segment
    task = tl.program_id(2) + first_task
    first, count = 0 * task, 0 * task
    for segment in tl.static_range(SEGMENTS):
        _, _, programs = _programs_of(boundaries, segment, log_rows)
        first += tl.where(segment < own_segment, programs, 0)
        count += tl.where(segment == own_segment, programs, 0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_P):
        number = start + tl.arange(0, BLOCK_P)
        mask = (number < count)[:, None] & (columns < N)[None, :]
        elements = ((first + number).to(tl.int64) * SUMS + which)[:, None] * N + columns[None, :]
        total += tl.sum(tl.load(partials + elements, mask=mask, other=0.0), 0)
    if HAS_WEIGHT:
        if which == 0:
            _store_gradient(weight_rows, task, weight_stride, columns, total, ACCUMULATE, N)
    if HAS_BIAS:
        if which == 1:
            _store_gradient(bias_rows, task, bias_stride, columns, total, ACCUMULATE, N)
    if HAS_X_BIAS:
        if which == 2:
            _store_gradient(x_bias_rows, task, x_bias_stride, columns, total, ACCUMULATE, N)


# ---- launchers ----------------------------------------------------------------------------------

# Elements of a tile, so that each thread holds a few vectors of 16 bytes: in the forward pass 32
# elements of a tensor; in the backward pass 16, for which it needs half as many registers, so that
# four programs share a multiprocessor and wait for memory in turn.
_TILE_ELEMENTS, _BACKWARD_TILE_ELEMENTS = 4096, 2048
# Segments of one launch: rows before the first task, eight tasks, rows after the last.
SEGMENTS = 10
# Rows of a program in the backward pass: few, so that a small batch occupies every multiprocessor,
# but of a large batch as many as leave no more programs than are added up cheaply.  Constants, so
# that the sums do not depend on the GPU.
_LEAST_ROWS = 8
_MOST_PROGRAMS = 1024
# The tile of the sum over programs: 128 rows are the programs of a task of 1,024 rows, which are
# then summed by one load for each thread; columns of 128 bytes, so that there are many programs.
_SUMMED_PROGRAMS, _SUMMED_COLUMNS = 128, 32


class GradientRows(NamedTuple):
    """Rows ``[K, N]`` for the gradients of weight, bias and x_bias; empty where not wanted."""

    weight: Tensor
    bias: Tensor
    x_bias: Tensor

    @property
    def sums(self) -> int:
        """Number of sums that a program leaves."""
        if self.x_bias.numel() > 0:
            return 3
        return 2 if self.weight.numel() > 0 or self.bias.numel() > 0 else 0


class BackwardGrid(NamedTuple):
    """What a backward kernel is launched with to run some segments of the stream.

    Attributes:
        programs: of the launch.
        boundaries: row numbers of ``SEGMENTS + 1`` boundaries, encoded.
        log_rows: a program has ``2**log_rows`` rows of one segment, or what is left of it.
        partials: where each program leaves its sums, ``[programs, sums, N]``; None: nowhere.
    """

    programs: int
    boundaries: tuple[int, ...]
    log_rows: int
    partials: Tensor | None


def constants_of(
    width: int, dropout_p: float, tile_elements: int = _TILE_ELEMENTS
) -> dict[str, Any]:
    """Constexpr arguments and launch settings of a forward pass over rows of ``width`` columns."""
    constants = _constants_of(width, dropout_p, tile_elements)
    return {**constants, "num_warps": 8 if constants["BLOCK_N"] >= 2048 else 4}


def backward_constants_of(width: int, dropout_p: float, rows: GradientRows) -> dict[str, Any]:
    """Constexpr arguments and launch settings of a backward pass that fills ``rows``."""
    constants = _constants_of(width, dropout_p, _BACKWARD_TILE_ELEMENTS)
    warps = 8 if constants["BLOCK_N"] >= 4096 else 4
    return {**constants, "SUMS": rows.sums, "SEGMENTS": SEGMENTS, "num_warps": warps}


def _constants_of(width: int, dropout_p: float, tile_elements: int) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, tile_elements // block)
    return {"DROPOUT": dropout_p > 0, "N": width, "ROWS": rows, "BLOCK_N": block}


def rows_by_task(
    launch: Callable[[BackwardGrid], None],
    num_rows: int,
    rows_at_once: int,
    rows: GradientRows,
    offsets: Sequence[int],
    accumulate: bool,
    *,
    like: Tensor,
) -> None:
    """Run a backward kernel over all rows, and sum what it gives for the parameters by task.

    One launch runs the rows of eight tasks, and one more adds up the sums of its programs.

    Args:
        launch: the backward kernel.
        num_rows: rows of the stream; those of no task are run too.
        rows_at_once: rows of a tile.
        rows: written or added to.
        offsets: ``K + 1`` row numbers; not read when no gradient is wanted.
        accumulate: add to the rows.
        like: ``[..., N]``, tells width and device.
    """
    log_rows = max(_LEAST_ROWS, rows_at_once, triton.cdiv(num_rows, _MOST_PROGRAMS)) - 1
    log_rows, width, sums = log_rows.bit_length(), like.shape[-1], rows.sums
    # Segment 0 comes before the first task, task k is segment k + 1.
    ends = (0, *offsets, num_rows) if sums else (0, num_rows)
    for first in range(0, len(ends) - 1, SEGMENTS):
        own = ends[first : first + SEGMENTS + 1]
        programs = sum(triton.cdiv(end - begin, 1 << log_rows) for begin, end in pairwise(own))
        boundaries = encode_offsets(own, SEGMENTS + 1)
        partials = like.new_empty((programs, sums, width), dtype=torch.float32) if sums else None
        grid = BackwardGrid(programs, boundaries, log_rows, partials)
        if programs > 0:
            launch(grid)
        first_task = max(first - 1, 0)
        tasks = min(first + SEGMENTS, len(offsets)) - 1 - first_task
        if partials is not None and tasks > 0:
            _sum_partials(
                grid, partials, rows, first_task + 1 - first, first_task, tasks, accumulate
            )


def _sum_partials(
    grid: BackwardGrid,
    partials: Tensor,
    rows: GradientRows,
    first_segment: int,
    first_task: int,
    tasks: int,
    accumulate: bool,
) -> None:
    """Add up the partial sums of the tasks from ``first_task`` on, one a segment."""
    _, sums, width = partials.shape
    wanted = [own.numel() > 0 for own in rows]
    pointers = {own.data_ptr() for own in rows if own.numel() > 0}
    # One parameter may be weight and bias at once: then its rows get one sum after the other.
    together = [wanted] if len(pointers) == sum(wanted) else _one_by_one(wanted)
    for weight, bias, x_bias in together:
        _sum_partials_kernel[(triton.cdiv(width, _SUMMED_COLUMNS), sums, tasks)](
            partials,
            *(own if own.numel() > 0 else None for own in rows),
            *(own.stride(0) for own in rows),
            grid.boundaries,
            grid.log_rows,
            first_segment,
            first_task,
            ACCUMULATE=accumulate,
            HAS_WEIGHT=weight,
            HAS_BIAS=bias,
            HAS_X_BIAS=x_bias,
            SUMS=sums,
            N=width,
            BLOCK_P=_SUMMED_PROGRAMS,
            BLOCK_N=_SUMMED_COLUMNS,
            SEGMENTS=SEGMENTS,
        )


def _one_by_one(flags: list[bool]) -> list[list[bool]]:
    """Lists of which each has one of the flags that are set."""
    places = [place for place, flag in enumerate(flags) if flag]
    return [[place == own for place in range(len(flags))] for own in places]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the rows that the backward pass reads, and their mean and rstd.

    Those rows are the centred sums in the dtype of x, or x itself without a residual.
    """
    width = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    hidden = x if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    num_rows = mean.numel()
    if num_rows == 0:
        return out, hidden, mean, rstd
    constants = constants_of(width, dropout_p)
    _forward_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
        x,
        None if residual is None else residual.contiguous(),
        Parameters(weight, bias, x_bias),
        out,
        hidden,
        mean,
        rstd,
        num_rows,
        eps,
        DropoutArguments.of(dropout_p, seed),
        rng_offset,
        HAS_RESIDUAL=residual is not None,
        HAS_X_BIAS=x_bias is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **constants,
    )
    return out, hidden, mean, rstd


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    x_bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden rows and of x; without dropout they are one tensor."""
    hidden, grad_out = hidden.contiguous(), grad_out.contiguous()
    num_rows = mean.numel()
    grad_hidden = torch.empty_like(hidden)
    grad_x = torch.empty_like(hidden) if dropout_p > 0 else grad_hidden
    dropout = DropoutArguments.of(dropout_p, seed)
    gradient_rows = GradientRows(weight_rows, bias_rows, x_bias_rows)
    constants = backward_constants_of(hidden.shape[-1], dropout_p, gradient_rows)

    def launch(grid: BackwardGrid) -> None:
        _backward_kernel[(grid.programs,)](
            grad_out,
            hidden,
            weight,
            mean,
            rstd,
            grad_hidden,
            grad_x,
            grid.partials,
            grid.boundaries,
            grid.log_rows,
            dropout,
            rng_offset,
            HAS_WEIGHT=weight is not None,
            **constants,
        )

    parameters = (gradient_rows, offsets, accumulate)
    rows_by_task(launch, num_rows, constants["ROWS"], *parameters, like=hidden)
    return grad_hidden, grad_x
