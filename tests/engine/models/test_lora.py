"""Low-rank updates: their equation, K backward passes, merged weights, what is trained."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.data.task_schema import FORMATS
from engine.distributed import gradient_sync
from engine.models.bert import BertConfig, BertEncoder
from engine.models.config import EncoderConfig
from engine.models.context import RowContext
from engine.models.layers import Linear
from engine.models.lora import (
    PROJECTIONS,
    LoraSettings,
    LowRankUpdate,
    LowRankUpdates,
    add_low_rank_updates,
    layers_of_updates,
    merge_updates,
    updated_layers,
)
from engine.models.multitask import MultitaskModel
from engine.utils.errors import InputError
from kernels import TaskSegments
from kernels.dropout.dropout import dropout_factors

from ...kernels.tolerance import assert_within_twice
from ..distributed.test_gradient_sync import Watched
from ..gradients.test_one_pass_backward import within_twice
from ..small_models import TASKS, build_step, make_micro_batches
from . import encoder_cases as cases
from .test_modernbert import CASE as MODERNBERT

BERT = cases.EncoderCase(
    config=BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    stages=("embeddings", "layers.0", "layers.1"),
    tables=("embeddings.word", "embeddings.position", "embeddings.token_type"),
)
ALL = LoraSettings(rank=3, alpha=6.0, dropout_p=0.0, projections=PROJECTIONS)
SIZES = (5, 3, 4)

both_encoders = pytest.mark.parametrize("case", [BERT, MODERNBERT], ids=["bert", "modernbert"])


def lora_model(
    case: cases.EncoderCase, settings: LoraSettings | None = ALL, *, dropout: float = 0.0, **other
) -> MultitaskModel:
    """A model of three tasks, in training mode; B is past its beginning at zero."""
    torch.manual_seed(0)
    model = MultitaskModel(
        case.with_dropout(dropout),
        [FORMATS[task] for task in TASKS],
        {"sst": "single", "quora": "shared", "sts": "cosine"},
        pooling="mean",
        dropout_p=dropout,
        lora=settings,
        **other,
    )
    for _, updates in updated_layers(model.encoder):
        for update in updates.in_order:
            update.up.weight.data.normal_(0, 0.2)
    return model.train()


# The equation


def updates_of(projections: tuple[str, ...], p: float, dtype: torch.dtype) -> Linear:
    """A layer ``[7 -> 12]`` of three projections of four rows, some with updates."""
    torch.manual_seed(0)
    settings = LoraSettings(2, 6.0, p, projections)
    places = {"query": slice(0, 4), "key": slice(4, 8), "value": slice(8, 12), "all": slice(0, 12)}
    layer = Linear(7, 12)
    own = {
        name: LowRankUpdate(7, places[name], settings, dropout_id=10 + number)
        for number, name in enumerate(projections)
    }
    layer.lora = LowRankUpdates(own, 12)
    for update in own.values():
        update.up.weight.data.normal_()
    layer.bias.data.normal_()
    return layer.to(dtype)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "projections",
    [("all",), ("query", "value"), ("key",), ("value", "key", "query")],  # gaps on each side
    ids="-".join,
)
def test_a_layer_computes_its_equation(projections, p):
    """Each update drops its input by itself; alpha / r is 3."""
    torch.manual_seed(0)
    draws, seed = torch.randn(64, 5, 7), torch.tensor(11)
    context = RowContext(seed=seed)

    def plain(dtype: torch.dtype) -> Tensor:
        layer, outs = updates_of(projections, p, dtype), []
        assert isinstance(layer.lora, LowRankUpdates)
        for x in draws.to(dtype):
            y = x @ layer.weight.t() + layer.bias
            for update in layer.lora.in_order:
                factors = dropout_factors(x.numel(), p, seed, update.dropout_id).view_as(x)
                low = (x * factors.to(dtype)) @ update.down.weight.t()
                y[:, update.rows] += 3 * (low @ update.up.weight.t())
            outs.append(y)
        return torch.stack(outs).detach()

    layer = updates_of(projections, p, torch.float32).train()
    ours = torch.stack([layer(x, context) for x in draws]).detach()
    assert_within_twice(ours, plain(torch.float32), plain(torch.float64))
    without_bias = torch.stack([layer.product(x, context) for x in draws]).detach()
    torch.testing.assert_close(without_bias + layer.bias, ours)
    layer.eval()
    assert p == 0 or not torch.equal(layer(draws[0], context), ours[0])


def test_the_beginning_is_the_plain_encoder():
    """A as PEFT draws it, B zero; all other weights are drawn as without updates."""
    plain, model = lora_model(BERT, None), lora_model(BERT, ALL._replace(rank=40))
    ours = model.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(ours[name], weight), name
    torch.manual_seed(0)
    fresh = LowRankUpdate(48, slice(0, 48), ALL._replace(rank=40), 0)
    bound = 48**-0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.99 * bound < fresh.down.weight.abs().max() <= bound
    assert abs(fresh.down.weight.mean()) < 0.02 * bound * 3
    assert not fresh.up.weight.any()


# Task gradients


@both_encoders
@pytest.mark.parametrize("count", [1, 2], ids=["whole", "checkpointed micro-batches"])
def test_rows_equal_k_backward_passes(case, count):
    model = lora_model(case, adapter_width=12 if count > 1 else 0)
    (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
    exact, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    wide = tuple(labels.double() for labels in batch.labels)
    references = cases.gradients(exact, replace(batch, labels=wide), TASKS)
    torchs = cases.gradients(same, batch, TASKS)
    step = build_step(model)
    model.encoder.checkpoint_layers = count > 1
    step._task_gradients(make_micro_batches(0, SIZES, count, TASKS))
    flat = step.parameters
    scale = max(references[name].norm() for name in flat.slots)
    for name, row in flat.named_views(flat.rows):
        assert within_twice(row, torchs[name], references[name], scale), name
        if ".lora." in name:
            assert all(own.any() for own in row), name  # of each task
    assert all(p.grad is None for p in model.encoder.parameters())


@both_encoders
def test_dropouts_have_ids_of_their_own(case):
    model = lora_model(case, ALL._replace(dropout_p=0.5), dropout=0.5, adapter_width=12)
    (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
    used = cases.dropouts_used(lambda: model(batch, TASKS, seed=torch.tensor(1)))
    layers = case.config.num_hidden_layers
    assert len(set(used)) == len(used)
    assert len(used) > len(PROJECTIONS) * layers
    assert not cases.dropouts_used(lambda: model.eval()(batch, TASKS))


# What is trained


@both_encoders
@pytest.mark.parametrize("frozen", [False, True])
def test_only_updates_and_heads_take_space_and_move(case, frozen):
    settings = LoraSettings(rank=4, alpha=8.0, dropout_p=0.0, projections=("query", "value"))
    model = lora_model(case, settings)
    step = build_step(model, freeze_encoder=frozen)
    before, flat = copy.deepcopy(model.state_dict()), step.parameters
    for number, batch in enumerate(make_micro_batches(0, (9, 9, 9), 3, TASKS)):
        step(batch, number, 1e-2)
    moved = {name for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    assert moved == set(flat.slots)
    of_encoder = {name for name in flat.slots if name.startswith("encoder.")}
    assert all(".lora." in name for name in of_encoder)
    config: EncoderConfig = case.config
    width, layers = config.hidden_size, config.num_hidden_layers
    numbers = sum(before[name].numel() for name in of_encoder)
    assert numbers == (0 if frozen else layers * 2 * (4 * width + width * 4))
    heads = sum(weight.numel() for name, weight in before.items() if not name.startswith("encoder"))
    gaps = 64 * (len(flat.slots) + len(flat.layout.buckets))
    assert flat.numel <= numbers + heads + gaps
    assert flat.rows.shape == (len(TASKS), flat.numel)
    assert all(len(vector) == flat.numel for vector in step.optimizer.vectors.values())


def test_layers_are_balanced_by_themselves():
    step = build_step(lora_model(BERT), surgery="layer")
    of_encoder = [name for name in step.groups.names if name.startswith("encoder.")]
    assert of_encoder == ["encoder.layers.0", "encoder.layers.1"]
    assert all(step.groups.sole_tasks[step.groups.names.index(n)] is None for n in of_encoder)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_buckets_leave_during_the_backward_pass(monkeypatch, checkpointed):
    """But for the first layer's: no gradient reaches its input."""
    monkeypatch.setattr(gradient_sync.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gradient_sync.dist, "get_world_size", lambda: 2)
    model = lora_model(BERT)
    model.encoder.checkpoint_layers = checkpointed
    step = build_step(model)
    step.sync = watched = Watched(model, step.parameters)
    step._task_gradients(make_micro_batches(0, SIZES, 2, TASKS))
    assert watched.before_the_end == ["heads", "pair", "encoder.layers.1"]
    assert list(watched.sent)[3:] == ["encoder.layers.0", "vectors"]
    for bucket in step.parameters.layout.buckets:
        then, rows = watched.sent[bucket.name], step.parameters.rows
        assert torch.equal(then[:, bucket.columns], rows[:, bucket.columns])


def test_a_compiled_layer_is_one_graph():
    """Dynamo traces a layer with gradient rows to its end."""
    model = lora_model(BERT, ALL._replace(dropout_p=0.1))
    build_step(model)
    (layer, _), *_ = updated_layers(model.encoder)
    x = torch.randn(6, 48)
    context = RowContext(segments=TaskSegments((0, 2, 4, 6)), seed=torch.tensor(1))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, context), layer(x, context))


# Merged


@both_encoders
def test_a_merged_model_answers_the_same(case):
    model = lora_model(case).eval()
    (batch,) = make_micro_batches(0, SIZES, 1, TASKS)
    exact = copy.deepcopy(model).double()(batch, TASKS)
    unmerged = model(batch, TASKS)
    model.merge_lora()
    assert model.state_dict().keys() == lora_model(case, None).state_dict().keys()
    merged = model(batch, TASKS)
    for ours, others, reference in zip(merged, unmerged, exact, strict=True):
        scale = torch.finfo(torch.float32).eps * reference.norm()
        distance = (ours.double() - reference).norm()
        assert distance <= 2 * (others.double() - reference).norm() + 2 * scale
    assert not layers_of_updates(model.encoder)
    merge_updates(model.encoder)  # nothing is left to merge


def test_encoders_without_the_projections_are_refused(monkeypatch):
    monkeypatch.setattr(BertEncoder, "projections", {"query": BertEncoder.projections["query"]})
    with pytest.raises(
        InputError, match=r"lora_targets: key is no projection of BertEncoder; .*y$"
    ):
        lora_model(BERT)
    monkeypatch.setattr(BertEncoder, "projections", {})
    with pytest.raises(InputError, match="it has none that low-rank updates could be of"):
        lora_model(BERT)


def test_a_rank_that_is_not_low_is_refused():
    encoder = lora_model(BERT).encoder
    merge_updates(encoder)
    width = encoder.config.hidden_size
    settings = LoraSettings(width, 1.0, 0.0, ("query",))
    with pytest.raises(InputError, match=f"lora_rank = {width}: no lower than the rank of query"):
        add_low_rank_updates(encoder, settings, 0)
