"""The CUDA surgery operators: on a GPU, and compiled for the CPU where there is none.

The second way runs csrc/surgery.cu and csrc/balancing.cu themselves on a small emulation of CUDA
(emulated_cuda/): threads, barriers, shuffles and the order of accesses are the kernels' own, so
indexing, reductions, edges and dispatch are tested in every run.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.balancing.pcgrad import draw_order, pcgrad_weights, pcgrad_weights_reference
from kernels.surgery.surgery import (
    combine_adamw_,
    combine_adamw_reference_,
    combine_adamw_segments_reference_,
    combine_reference,
    gram,
    gram_reference,
    update_guard,
)

from ..conftest import REPOSITORY
from ..device_waits import no_wait_for_the_device
from .test_surgery_weights import summary_cases
from .tolerance import assert_within_twice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOLVERS = {
    "symmetric_eigen": (),
    "project_onto_dual_cone": (torch.eye(5).double(),),
    "solve_mgda": (),
    "solve_cagrad": (0.5,),
    "solve_fairgrad": (2.0,),
}
NAMES = ["gram", "pcgrad_weights", "draw_order", "combine", "combine_out", "combine_adamw_"]
NAMES += ["combine_adamw_segments_", "update_summary"]


class Device:
    """Where the operators run: their namespace and the device of their tensors."""

    def __init__(self, namespace: str, device: str) -> None:
        self.ops = getattr(torch.ops, namespace)
        self.name = device

    def put(self, tensor: Tensor) -> Tensor:
        """A copy there with the same strides and the same offset from an aligned address."""
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage).to(self.name, copy=True)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/*.cu compiled for the CPU, the operators registered as ``superbert_emulated::``."""
    library = tmp_path_factory.mktemp("emulated") / "liboperators_emulated.so"
    folder = Path(__file__).parent / "emulated_cuda"
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    command = [
        *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-DUSE_CUDA"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{folder}", f"-I{REPOSITORY / 'csrc'}", f"-isystem{include}"),
        *(f"-isystem{include / 'torch/csrc/api/include'}", str(folder / "operators.cpp")),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)),
    ]
    subprocess.run(command, check=True)
    for name in [*NAMES, *SOLVERS]:
        schema = str(getattr(torch.ops.superbert, name).default._schema)
        torch.library.define(f"superbert_emulated::{name}", schema[schema.index("(") :])
    torch.ops.load_library(str(library))
    return library


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "cuda":
        return Device("superbert", "cuda")
    request.getfixturevalue("emulated_library")
    return Device("superbert_emulated", "cpu")


def task_rows(num_tasks: int, columns: int, dtype: torch.dtype, offset: int, gap: int) -> Tensor:
    """Rows of small whole numbers, whose sums no dtype rounds.

    They are ``gap`` elements longer than needed and begin ``offset`` elements after 64 bytes.
    """
    stride = columns + gap
    flat = torch.empty(num_tasks * stride + offset, dtype=dtype)
    rows = flat.as_strided((num_tasks, columns), (stride, 1), offset)
    generator = torch.Generator().manual_seed(num_tasks + columns)
    return rows.copy_(torch.randint(-4, 5, rows.shape, generator=generator))


# (columns, offset, gap): aligned rows with a ragged end; rows that are 16 bytes apart but begin off
# alignment; rows apart by an odd number; fewer columns than a pack; none.
LAYOUTS = [(8000, 0, 0), (8195, 0, 13), (4096, 3, 16), (4097, 1, 2), (7, 1, 13), (0, 0, 16)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 9, 16, 33, 64])
def test_gram(device: Device, num_tasks: int, dtype: torch.dtype) -> None:
    for columns, offset, gap in LAYOUTS if num_tasks <= 16 else LAYOUTS[1:3]:
        rows = task_rows(num_tasks, columns, dtype, offset, gap)
        result = device.ops.gram(device.put(rows), [0, columns])[0].cpu()
        assert torch.equal(result, gram_reference(rows, [0, columns])[0])


# One row beyond a panel of 64, half panels that are full, begun, and beyond the last row.
@pytest.mark.parametrize(
    ("num_tasks", "dtype"),
    [
        (65, torch.float32),
        (96, torch.float16),
        (97, torch.float64),
        (128, torch.bfloat16),
        (161, torch.float32),
    ],
)
def test_gram_of_many_tasks(device: Device, num_tasks: int, dtype: torch.dtype) -> None:
    layouts = [(517, 1, 2), (515, 0, 13), (7, 1, 13), (0, 0, 16)]
    count = {65: 4, 161: 1}.get(num_tasks, 2)
    for columns, offset, gap in layouts[:count]:
        rows = task_rows(num_tasks, columns, dtype, offset, gap)
        result = device.ops.gram(device.put(rows), [0, columns])[0].cpu()
        assert torch.equal(result, gram_reference(rows, [0, columns])[0])


def test_gram_of_many_blocks(device: Device) -> None:
    # gram_kernel: 16384 columns a block; gram_tiles_kernel: more chains than blocks
    for num_tasks, columns in ((2, 100_003), (64, 20_003), (100, 5_003)):
        rows = torch.randn(num_tasks, columns, generator=torch.Generator().manual_seed(3))
        result = device.ops.gram(device.put(rows), [0, columns])[0].cpu()
        exact = rows.double() @ rows.double().T
        assert_within_twice(result, gram_reference(rows, [0, columns])[0], exact)
        assert torch.equal(result, result.T)


@pytest.mark.parametrize("num_tasks", [9, 16, 17, 32, 45, 64, 70])
def test_gram_of_16_bits_by_tensor_cores(device: Device, num_tasks: int) -> None:
    """Several blocks, edges, rows that are aligned and others; the same bits each time."""
    generator = torch.Generator().manual_seed(3)
    for dtype, columns, gap in (
        (torch.bfloat16, 16_384 + 67 if num_tasks < 17 else 200, 5),
        (torch.float16, 700, 4),
        (torch.bfloat16, 150, 3),
    ):
        wide = torch.randn(num_tasks, columns + gap, generator=generator).to(dtype)
        rows = wide[:, gap:]
        result = device.ops.gram(device.put(rows), [0, columns])[0]
        exact = rows.double() @ rows.double().T
        assert_within_twice(result.cpu(), gram_reference(rows, [0, columns])[0], exact)
        assert torch.equal(result, result.T)
        assert torch.equal(result, device.ops.gram(device.put(rows), [0, columns])[0])


@pytest.mark.parametrize("num_tasks", [3, 16])
def test_gram_by_segment(device: Device, num_tasks: int) -> None:
    rows, offsets = task_rows(num_tasks, 5000, torch.float32, 0, 0), [7, 7, 20, 4999, 5000]
    result = device.ops.gram(device.put(rows), offsets).cpu()
    assert torch.equal(result, gram_reference(rows, offsets))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 17, 64, 65, 130])
def test_weights(device: Device, num_tasks: int, include_self: bool) -> None:
    rows = torch.randn(num_tasks, num_tasks + 2, dtype=torch.float64)
    matrix, order = rows @ rows.T, draw_order(num_tasks, 5, 6)
    for mean in (False, True):
        weights = device.ops.pcgrad_weights(
            device.put(matrix), device.put(order), mean, include_self
        )
        expected = pcgrad_weights_reference(matrix, order, mean, include_self)
        torch.testing.assert_close(weights.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 17, 64, 65, 130])
def test_order(device: Device, num_tasks: int) -> None:
    seed, step = torch.tensor(-123456789012345), torch.tensor(2**40 + 3)
    order = device.ops.draw_order(device.put(seed), device.put(step), num_tasks)
    assert torch.equal(order.cpu(), draw_order(num_tasks, seed, step))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(device: Device, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for num_tasks in (1, 2, 3, 6, 64, 65):
        weights = torch.arange(num_tasks) * 0.5 - 1.0
        for columns, offset, gap in LAYOUTS:
            rows = task_rows(num_tasks, columns, dtype, offset, gap)
            out = device.put(torch.full((columns + 1,), torch.nan, dtype=out_dtype)[1:])
            device.ops.combine_out(device.put(rows), device.put(weights), out)
            exact = weights @ rows.float()
            assert torch.equal(out.cpu(), exact.to(out_dtype))
            if out_dtype == dtype:
                result = device.ops.combine(device.put(rows), device.put(weights))
                assert torch.equal(result.cpu(), exact.to(dtype))


def test_combine_rounding(device: Device) -> None:
    rows = torch.randn(64, 5000, generator=torch.Generator().manual_seed(3))
    weights = torch.linspace(-1.5, 2.0, 64)
    result = device.ops.combine(device.put(rows), device.put(weights)).cpu()
    plain, exact = combine_reference(rows, weights), weights.double() @ rows.double()
    assert_within_twice(result, plain, exact)


@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(device: Device, dtype: torch.dtype, copy: torch.dtype | None) -> None:
    settings = (0.9, 0.999, 1e-8, 0.1)
    weights, lr = torch.tensor([1.0, 0.5, -0.25]), torch.tensor(1e-3)
    scale, skip = torch.tensor(0.5), torch.tensor(False)
    for columns, offset, gap in LAYOUTS:
        state = [torch.randn(columns), torch.zeros(columns), torch.zeros(columns)]
        low = None if copy is None else torch.zeros(columns, dtype=copy)
        ours = [device.put(s) for s in state] + [None if low is None else device.put(low)]
        exact = [s.double() for s in state]
        for step in (1, 2):
            rows = task_rows(3, columns, dtype, offset, gap)
            scalars = [lr, torch.tensor(step), scale, skip]
            device.ops.combine_adamw_(
                *(device.put(rows), device.put(weights), *ours),
                *([device.put(s) for s in scalars] + list(settings)),
            )
            combine_adamw_reference_(rows, weights, *state, low, *scalars, *settings)
            combine_adamw_reference_(
                *(rows.double(), weights.double(), *exact, None, *scalars, *settings)
            )
        for mine, plain, true in zip(ours, state, exact, strict=False):
            assert_within_twice(mine.cpu(), plain, true)
        if low is not None:
            assert torch.equal(ours[3].cpu(), ours[0].to(copy).cpu())


@pytest.mark.parametrize("case", summary_cases())
def test_summary_is_the_cpus(device: Device, case: str) -> None:
    """But for the order in which the groups' squares are added up, in float64."""
    arguments = summary_cases()[case]
    on_device = [device.put(a) if isinstance(a, Tensor) else a for a in arguments]
    ours = device.ops.update_summary(*on_device)
    theirs = torch.ops.superbert.update_summary(*arguments)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-6, atol=0, equal_nan=True)


# Ends of segments: at 16 bytes and between them; empty ones; more than a launch's table holds.
SEGMENTS = {
    "one": ([1024], [1], 1024),
    "by 64 columns": ([64, 448, 448, 512, 1024], [1, 0, 0, -1, 2], 512),
    "a border of decay within a segment": ([128, 1024], [0, 2], 704),
    "odd": ([3, 70, 1021, 1024], [2, 0, 1, 1], 77),
    "many": ([*range(2, 602, 2), 1024], [n % 4 - 1 for n in range(301)], 0),
    "many by 64 bytes": ([*range(0, 32 * 300, 32), 9600], [n % 4 - 1 for n in range(301)], 1600),
}


@pytest.mark.parametrize("many_tasks", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_adamw_by_segments_is_adamw_of_each(
    device: Device, segments: str, many_tasks: bool
) -> None:
    """To the bit, also where the weights of all groups are beyond shared memory."""
    ends, groups, decayed = SEGMENTS[segments]
    num_tasks, columns = 400 if many_tasks else 3, ends[-1]
    for dtype, offset in ((torch.bfloat16, 0), (torch.float32, 3)):
        rows = device.put(task_rows(num_tasks, columns, dtype, offset, 8 - offset))
        weights = device.put(torch.randn(3, num_tasks))
        first = [torch.randn(columns), torch.zeros(columns), torch.zeros(columns)]
        first.append(torch.zeros(columns, dtype=torch.bfloat16))
        scalars = [torch.tensor(1e-2), torch.tensor(2), torch.tensor(0.5), torch.tensor(False)]
        scalars = [device.put(scalar) for scalar in scalars]
        ours, expected = ([device.put(s) for s in first] for _ in range(2))
        settings = (0.9, 0.999, 1e-8, 0.1)
        device.ops.combine_adamw_segments_(
            *(rows, weights, *ours, ends, groups, decayed, *scalars, *settings)
        )
        for begin, end, group in zip([0, *ends], ends, groups, strict=False):
            border = min(max(begin, decayed), end)
            for own, decay in ((slice(begin, border), 0.1), (slice(border, end), 0.0)):
                if group >= 0:
                    device.ops.combine_adamw_(
                        *(rows[:, own], weights[group], *(s[own] for s in expected)),
                        *(*scalars, *settings[:3], decay),
                    )
        for mine, other, before in zip(ours, expected, first, strict=True):
            assert torch.equal(mine, other)
            assert not torch.equal(mine.cpu(), before)


def test_adamw_by_segments(device: Device) -> None:
    ends, groups, decayed = SEGMENTS["by 64 columns"]
    rows, weights = torch.randn(3, 1024), torch.randn(3, 3)
    state = [torch.randn(1024), torch.zeros(1024), torch.zeros(1024)]
    ours, exact = [device.put(s) for s in state], [s.double() for s in state]
    scalars = [torch.tensor(1e-2), torch.tensor(2), None, None]
    options = (ends, groups, decayed)
    on_device = [None if s is None else device.put(s) for s in scalars]
    settings = (0.9, 0.999, 1e-8, 0.1)
    device.ops.combine_adamw_segments_(
        *(device.put(rows), device.put(weights), *ours, None, *options, *on_device, *settings)
    )
    combine_adamw_segments_reference_(rows, weights, *state, None, *options, *scalars, *settings)
    combine_adamw_segments_reference_(
        *(rows.double(), weights.double(), *exact, None, *options, *scalars, *settings)
    )
    for mine, plain, true in zip(ours, state, exact, strict=True):
        assert_within_twice(mine.cpu(), plain, true)


@pytest.mark.parametrize("num_tasks", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_by_segments_is_gram_of_each(
    device: Device, dtype: torch.dtype, num_tasks: int
) -> None:
    """To the bit: aligned segments and others, empty ones, one of several blocks, many."""
    few = num_tasks == 3  # the emulation takes long for many entries
    last, many = (40_000, 900) if few else (700, 20)
    for offsets in ([0, 64, 64, last, last + 3], [5, 7, 12, 190], [*range(0, many, 3)]):
        rows = device.put(task_rows(num_tasks, offsets[-1] + 2, dtype, 3, 5))
        grams = device.ops.gram(rows, offsets)
        for begin, end, ours in zip(offsets, offsets[1:], grams, strict=False):
            assert torch.equal(ours, device.ops.gram(rows, [begin, end])[0])


def test_adamw_in_float64(device: Device) -> None:
    settings = (0.9, 0.999, 1e-8, 0.1)
    rows = task_rows(3, 515, torch.float64, 0, 1)
    weights = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)
    state = [torch.randn(515, dtype=torch.float64)] + [torch.zeros(515).double()] * 2
    ours = [device.put(s) for s in state]
    scalars = [torch.tensor(1e-3), torch.tensor(3.0), None, None]
    on_device = [None if s is None else device.put(s) for s in scalars]
    device.ops.combine_adamw_(
        device.put(rows), device.put(weights), *ours, None, *on_device, *settings
    )
    state = [s.clone() for s in state]
    combine_adamw_reference_(rows, weights, *state, None, *scalars, *settings)
    for mine, expected in zip(ours, state, strict=True):
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-12, atol=1e-15)


def test_adamw_skips(device: Device) -> None:
    state = [torch.ones(100) for _ in range(3)] + [torch.ones(100, dtype=torch.bfloat16)]
    ours = [device.put(s) for s in state]
    scalars = [torch.tensor(1e-3), torch.tensor(1), torch.tensor(torch.nan), torch.tensor(True)]
    device.ops.combine_adamw_(
        *(device.put(torch.full((3, 100), torch.nan)), device.put(torch.ones(3)), *ours),
        *(*[device.put(s) for s in scalars], 0.9, 0.999, 1e-8, 0.1),
    )
    assert all(torch.equal(mine.cpu(), s) for mine, s in zip(ours, state, strict=True))


@pytest.mark.parametrize("step", [0.0, -1.0, torch.nan])
def test_adamw_before_the_first_step_writes_nothing(device: Device, step: float) -> None:
    state = [torch.ones(100) for _ in range(3)]
    ours = [device.put(s) for s in state]
    scalars = [torch.tensor(1e-3), torch.tensor(step)]
    device.ops.combine_adamw_(
        *(device.put(torch.ones(3, 100)), device.put(torch.ones(3)), *ours, None),
        *(*[device.put(s) for s in scalars], None, None, 0.9, 0.999, 1e-8, 0.1),
    )
    assert all(torch.equal(mine.cpu(), s) for mine, s in zip(ours, state, strict=True))


@pytest.mark.parametrize("columns", [80, 40])
def test_solvers_of_many_tasks(device: Device, columns: int) -> None:
    rows = torch.randn(70, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    matrix = rows @ rows.T + 1e-9 * torch.eye(70).double()
    lower = torch.eye(70).double()[:66] / 70  # more problems than a block has threads
    for name, arguments in (("solve_mgda", ()), ("project_onto_dual_cone", (lower,))):
        on_device = [device.put(argument) for argument in arguments]
        result = getattr(device.ops, name)(device.put(matrix), *on_device).cpu()
        expected = getattr(torch.ops.superbert, name)(matrix, *arguments)
        torch.testing.assert_close(result @ rows, expected @ rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*SOLVERS, "pcgrad_weights", "pcgrad_weights of 70 tasks"])
def test_matrices_of_all_groups_are_solved_in_one_call(device: Device, name: str) -> None:
    """As each is by itself, to the bit, on the device and on the CPU."""
    name, num_tasks = name.split()[0], 70 if name.endswith("tasks") else 5
    rows = torch.randn(4, num_tasks, 9, dtype=torch.float64)
    matrices = rows @ rows.mT
    for ops, put in ((device.ops, device.put), (torch.ops.superbert, lambda tensor: tensor)):
        operator, arguments = getattr(ops, name), SOLVERS.get(name, ())
        of_all, of_one = arguments, arguments
        if name == "pcgrad_weights":
            order = put(torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)]))
            of_all = of_one = (order, False, False)
        elif name == "project_onto_dual_cone":
            of_one = (put(torch.eye(5).double()),)
            of_all = (put(torch.eye(5).double().expand(4, 5, 5).contiguous()),)
        together = operator(put(matrices), *of_all)
        each = [operator(put(matrix), *of_one) for matrix in matrices]
        if isinstance(together, Tensor):
            together, each = (together,), [(one,) for one in each]
        for ours, alone in zip(together, zip(*each, strict=True), strict=True):
            assert torch.equal(ours, torch.stack(alone))
        if name == "project_onto_dual_cone":
            of_all = (of_all[0][:0],)
        empty = operator(put(matrices[:0]), *of_all)
        assert (empty if isinstance(empty, Tensor) else empty[0]).shape[0] == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(device: Device, name: str) -> None:
    rows = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    matrix, arguments = rows @ rows.T, SOLVERS[name]
    on_device = [device.put(a) if isinstance(a, Tensor) else a for a in arguments]
    results = getattr(device.ops, name)(device.put(matrix), *on_device)
    expected = getattr(torch.ops.superbert, name)(matrix, *arguments)
    if isinstance(expected, Tensor):
        results, expected = (results,), (expected,)
    for result, on_cpu in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), on_cpu, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_update_in_a_cuda_graph() -> None:
    """Gram, weights, guard and AdamW are captured once and replayed with other gradients."""
    rows = torch.randn(3, 10_007, device="cuda")
    state = [torch.randn(10_007, device="cuda")]
    state += [torch.zeros(10_007, device="cuda") for _ in range(2)]
    seed, count = torch.tensor(7, device="cuda"), torch.zeros((), device="cuda")
    lr = torch.tensor(1e-3, device="cuda")

    def step() -> None:
        matrix = gram(rows)
        weights = pcgrad_weights(matrix, draw_order(3, seed, count.long()))
        guard = update_guard(matrix, weights, max_norm=1.0)
        count.add_((~guard.skip).to(count.dtype))
        combine_adamw_(rows, weights, *state, lr=lr, step=count, scale=guard.scale, skip=guard.skip)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # warm-up, as capture asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with no_wait_for_the_device(), torch.cuda.graph(graph):
        step()
    start = [tensor.clone() for tensor in (*state, count)]
    replayed, eager = [], []
    for run, results in ((graph.replay, replayed), (step, eager)):
        for tensor, value in zip((*state, count), start, strict=True):
            tensor.copy_(value)
        for fill in (1.0, -2.0, torch.nan, 0.5):
            rows.copy_(torch.linspace(-1, 1, rows.numel(), device="cuda").view_as(rows) * fill)
            run()
        results.extend(tensor.clone() for tensor in (*state, count))
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
    assert count == start[-1] + 3  # the step with NaN was skipped
