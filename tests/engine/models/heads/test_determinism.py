"""No operator of a step has other bits each time on a GPU: every head, every pooling.

torch names such operators for `torch.use_deterministic_algorithms`, and refuses them or takes
slower ones in their place.  Without a GPU the operators of a step are listed, which are the same on
one.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.collate import PackedBatch
from engine.data.task_schema import FORMATS
from engine.gradients.balancing import TrainedTasks
from engine.gradients.groups import GRANULARITIES
from engine.models.heads import CROSS, HeadSettings, build_head, head_class
from engine.models.pooling import POOLINGS
from engine.training.step import MultitaskStep

from ...small_models import build_step
from .cases import CLASSES_OF_PAIRS, CONFIG, OBJECTIVES, WIDTH, batch_of, states_of

LR = 1e-3

ON_A_GPU = frozenset(
    {
        *("index_add", "index_copy", "index_put", "_index_put_impl", "_unsafe_index_put", "put"),
        *("scatter", "scatter_add", "scatter_reduce", "masked_scatter", "index_reduce"),
        *("embedding_dense_backward", "embedding_renorm", "_embedding_bag", "histc", "bincount"),
        *("cumsum", "cumprod", "kthvalue", "median", "nanmedian", "_ctc_loss", "nll_loss2d"),
        *("grid_sampler_2d", "grid_sampler_3d", "_adaptive_avg_pool2d", "reflection_pad1d"),
        *("upsample_linear1d", "upsample_bilinear2d", "max_pool3d_with_indices", "resize"),
    }
)
"""ATen's operators that torch names, without ``_backward`` and ``_``; of the forward passes or of
their gradients: those of x[index], index_select, gather and repeat_interleave are among them."""
OF_INTEGERS = frozenset({"cumsum", "cumprod"})
"""Those that are only so of floating numbers."""


class Listing(TorchDispatchMode):
    """Lists the operators that differ each time on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        self.names.add(name)
        plain = name.removesuffix("_").removesuffix("_backward")
        of_integers = plain in OF_INTEGERS and not args[0].is_floating_point()
        if namespace == "aten" and {name, plain} & ON_A_GPU and not of_integers:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def assert_repeats(step: MultitaskStep, batch: PackedBatch) -> None:
    with Listing() as listing:
        step(step.model.with_lookup_plan(batch), 0, LR)
    assert not listing.found
    assert {"gram", "combine_adamw_segments_", "embedding_layer_norm_backward"} <= listing.names


@pytest.mark.parametrize("operation", [torch.Tensor.__getitem__, torch.index_select, torch.gather])
def test_the_listing_finds_gradients_of_indexing(operation):
    x, index = torch.randn(4, 3, requires_grad=True), torch.tensor([[0], [1]])
    arguments = {torch.Tensor.__getitem__: (index[:, 0],), torch.gather: (1, index)}
    with Listing() as listing:
        operation(x, *arguments.get(operation, (0, index[:, 0]))).sum().backward()
    assert listing.found


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_steps_of_tasks(make_model, make_batch, pooling, granularity):
    features = {"sst": "bilstm", "quora": "shared", "sts": "difference"}
    model = make_model(features, dropout=0.1, pooling=pooling, adapter_width=24).train()
    assert_repeats(build_step(model, surgery=granularity, clip=1.0), make_batch())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_of_objectives(model, tokenizer, name):
    trained = TrainedTasks(("sst", name), (5, 5))
    assert_repeats(build_step(model.train(), trained=trained), batch_of(tokenizer, trained.names))


HEADS_OF_TASKS = [
    pytest.param(task, features, id=f"{task.kind}-{features}")
    for task in (FORMATS["sst"], FORMATS["quora"], FORMATS["sts"], CLASSES_OF_PAIRS)
    for features in head_class(task.kind).features_for(task)
]


@pytest.mark.parametrize(("task", "features"), HEADS_OF_TASKS)
def test_every_head(task, features):
    settings = HeadSettings(
        kind=task.kind, name=task.task, config=CONFIG, task=task, features=features, dropout_p=0.5
    )
    head, columns = build_head(settings).train(), 1 if features == CROSS else len(task.sentences)
    pooled = torch.randn(4 * columns, WIDTH, requires_grad=True)
    pair = torch.nn.Linear(2 * WIDTH, WIDTH)
    states = states_of(pooled)._replace(seed=torch.tensor(1))
    shared = states.shared._replace(pair=lambda x, _context: pair(x))
    with Listing() as listing:
        scores = head(states._replace(shared=shared))
        head.loss(scores, torch.zeros(4)).backward()
    assert not listing.found
    assert pooled.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_steps_repeat_where_torch_refuses_what_does_not(
    make_model, make_batch, pooling, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    features = {"sst": "bilstm", "quora": "shared", "sts": "difference"}
    batch, found = make_batch(sizes=(50, 30, 40)), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            model = make_model(features, dropout=0.1, pooling=pooling).train()
            step = build_step(model, device="cuda", surgery="layer")
            planned = step.model.with_lookup_plan(batch).to("cuda")
            for number in range(3):
                step(planned, number, LR)
            found.append(step.parameters.master.clone())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_of_objectives_repeat(model, tokenizer, name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trained = TrainedTasks(("sst", name), (5, 5))
    step = build_step(model.train(), trained=trained, device="cuda")
    batch = step.model.with_lookup_plan(batch_of(tokenizer, trained.names)).to("cuda")
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            step._task_gradients([batch])
            found.append(step.parameters.rows.clone())
            step.model.zero_sparse_rows(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)
