"""K task gradients from one backward pass through a transformers BERT, against K passes."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import BertConfig, BertForMaskedLM, BertModel

from kernels import FusedLayerNorm, PCGrad, TaskGradients
from kernels.integrations.transformers_patch import accelerate, restore

SIZES = (3, 2, 4)
LENGTH = 7
CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=12,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)


class Multitask(nn.Module):
    """A BERT, a layer that all tasks use twice, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(CONFIG)
        self.twice = nn.Linear(32, 32)
        self.heads = nn.ModuleList(
            [
                nn.Linear(32, 5),
                nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 1)),
                nn.Linear(32, 3, bias=False),
            ]
        )

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.bert(ids, attention_mask=mask).pooler_output
        return self.twice(torch.tanh(self.twice(pooled)))

    def losses(self, collector: TaskGradients | None = None) -> list[Tensor]:
        ids, mask = joined_batch()
        if collector is None:
            return [
                head(own).square().mean()
                for head, own in zip(self.heads, self.encode(ids, mask).split(SIZES), strict=True)
            ]
        losses = []
        with collector.batch(SIZES):
            for task, own in enumerate(self.encode(ids, mask).split(SIZES)):
                with collector.task(task):
                    losses.append(self.heads[task](own).square().mean())
        return losses


def joined_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 60, (sum(SIZES), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (len(ids), 1), generator=generator)
    return ids * mask, mask.long()


def pass_by_pass(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """Task gradients from K ordinary backward passes."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: torch.zeros(len(losses), *p.shape, dtype=p.dtype) for name, p in named.items()}
    for task, loss in enumerate(losses):
        gradients = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        for row, gradient in zip(rows.values(), gradients, strict=True):
            if gradient is not None:
                row[task] = gradient
    return rows


def assert_equals_k_passes(
    model: nn.Module,
    losses: Callable[..., list[Tensor]],
    *,
    torchs: Callable[..., list[Tensor]] | None = None,
) -> TaskGradients:
    """The 2x rule on the norm of every parameter's error, on the scale of the largest gradient."""
    exact_model = copy.deepcopy(model).double()
    exact = pass_by_pass(exact_model, losses(exact_model))
    same_dtype = pass_by_pass(model, (torchs or losses)(model))
    collector = TaskGradients(model, len(SIZES))
    torch.autograd.backward(losses(model, collector))
    rounding = torch.finfo(collector.rows.dtype).eps * max(g.norm() for g in exact.values())
    views = dict(collector.named_views())
    assert views.keys() == exact.keys()
    for name, view in views.items():
        error = (view.double() - exact[name]).norm()
        allowed = 2 * (same_dtype[name].double() - exact[name]).norm()
        assert error <= allowed + rounding, name
        assert torch.equal(
            view[~exact[name].reshape(len(view), -1).any(1)].any(), torch.tensor(False)
        ), name
    assert all(p.grad is None for p in model.parameters())
    return collector


def multitask_losses(model: Multitask, collector: TaskGradients | None = None) -> list[Tensor]:
    return model.losses(collector)


def test_rows_equal_k_backward_passes() -> None:
    collector = assert_equals_k_passes(Multitask(), multitask_losses)
    gaps = torch.ones(collector.rows.shape[1], dtype=torch.bool)
    for parameter in collector.parameters:
        gaps[collector.columns(parameter)] = False
    assert not collector.rows[:, gaps].any()


def accelerated(freeze: str = "") -> tuple[Multitask, dict[str, Tensor]]:
    """A packed model, and the gradients of each task by transformers, pass by pass."""
    model, plain = Multitask(), Multitask()
    plain.load_state_dict(model.state_dict())
    for both in (model, plain):
        for name, parameter in both.named_parameters():
            parameter.requires_grad_(not freeze or freeze not in name)
    accelerate(model)
    assert isinstance(model.bert.embeddings.LayerNorm, FusedLayerNorm)
    return model, pass_by_pass(plain, plain.losses())


def assert_same_rows(collector: TaskGradients, expected: dict[str, Tensor]) -> None:
    for name, view in collector.named_views():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(view, expected[name], rtol=1e-4, atol=1e-5 * (1 + scale))


@pytest.mark.parametrize("freeze", ["", "query", "key.bias", "LayerNorm.weight", "output.dense"])
def test_accelerated_model(freeze: str) -> None:
    """Its fused layers have parameters of several modules, of which some may be frozen."""
    model, expected = accelerated(freeze)
    collector = TaskGradients(model, 3)
    torch.autograd.backward(model.losses(collector))
    assert_same_rows(collector, expected)
    assert all(p.grad is None for p in model.parameters())
    assert collector.tasks_reaching(model.bert.embeddings.word_embeddings.weight) == {0, 1, 2}


@pytest.mark.parametrize("packs", [False, True])
def test_transformers_own_activation_checkpointing(packs: bool) -> None:
    model, expected = accelerated()
    if not packs:
        restore(model)
    # Of two names, transformers 5.17 has the second and later versions warn of it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model.bert.train(), next(name for name in names if hasattr(model.bert, name)))()
    collector = TaskGradients(model, 3)
    torch.autograd.backward(model.losses(collector))
    assert_same_rows(collector, expected)
    layer = model.bert.encoder.layer[0]
    assert "context_fn" not in layer._gradient_checkpointing_func.keywords


def test_packed_inputs() -> None:
    model, expected = accelerated()
    ids, mask = joined_batch()
    lengths = mask.sum(1)
    stream = {
        "input_ids": ids[mask.bool()][None],
        "cu_seq_lens_q": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_length_q": int(lengths.max()),
    }
    collector = TaskGradients(model, 3)
    with collector.batch(SIZES):
        pooled = model.bert(**stream).pooler_output
        encoded = model.twice(torch.tanh(model.twice(pooled))).split(SIZES)
        losses = []
        for k, own in enumerate(encoded):
            with collector.task(k):
                losses.append(model.heads[k](own).square().mean())
    torch.autograd.backward(losses)
    assert_same_rows(collector, expected)
    refused = pytest.raises(ValueError, match="the model got 9 sequences, expected the 10")
    with refused, collector.batch((4, 2, 4)):
        model.bert(**stream)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda name: name.startswith("bert.embeddings"),
        lambda name: not name.endswith("bias"),  # BitFit: biases alone
        lambda name: name.endswith("bias"),
        lambda name: "bert.encoder.layer.0" in name or name.startswith("heads.1"),
    ],
    ids=["embeddings", "all but biases", "biases", "a layer and a head"],
)
def test_frozen_parameters(frozen: Callable[[str], bool]) -> None:
    model = Multitask()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    if not any(p.requires_grad for p in model.heads[1].parameters()):
        model.heads[1].requires_grad_(False)
    assert_equals_k_passes(model, multitask_losses)


def test_autocast_computes_and_rounds_as_autograd_does() -> None:
    def losses(model: nn.Module, collector: TaskGradients | None = None) -> list[Tensor]:
        exact = next(model.parameters()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            return multitask_losses(model, collector)

    collector = assert_equals_k_passes(Multitask(), losses)
    assert collector.rows.dtype == torch.float32


def test_tied_weights() -> None:
    """The word table is the decoder of the masked language model as well."""

    def losses(model: BertForMaskedLM, collector: TaskGradients | None = None) -> list[Tensor]:
        ids, mask = joined_batch()
        if collector is None:
            logits = model(ids, attention_mask=mask).logits
        else:
            with collector.batch(SIZES):
                logits = model(ids, attention_mask=mask).logits
        targets = ids.roll(1, 1)
        return [
            F.cross_entropy(own.flatten(0, 1), target.flatten())
            for own, target in zip(logits.split(SIZES), targets.split(SIZES), strict=True)
        ]

    model = BertForMaskedLM(CONFIG)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert_equals_k_passes(model, losses)


class Packed(nn.Module):
    """Layers on a packed stream of tokens, then on examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16, padding_idx=-1)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)


def packed_losses(model: Packed, collector: TaskGradients | None = None) -> list[Tensor]:
    lengths = torch.tensor([3, 1, 4, 2, 5, 1, 2, 6, 1])
    ids = torch.arange(int(lengths.sum())) % 20
    tokens = [int(own.sum()) for own in lengths.split(SIZES)]
    sentence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def scores() -> Tensor:
        hidden = model.norm(model.mix(model.table(ids)))
        pooled = hidden.new_zeros(len(lengths), 16).index_add(0, sentence, hidden)
        return model.out(torch.tanh(pooled))

    if collector is None:
        out = scores()
    else:
        with collector.batch(SIZES, tokens):
            out = scores()
    return [own.square().mean() for own in out.split(SIZES)]


def test_packed_stream_and_padding_index() -> None:
    assert_equals_k_passes(Packed(), packed_losses)


def test_counts_in_any_iterable() -> None:
    layer = nn.Linear(2, 3)
    collector = TaskGradients(layer, 3)
    with collector.batch(size for size in SIZES):
        out = layer(torch.ones(sum(SIZES), 2))
    out.sum().backward()
    assert dict(collector.named_views())["bias"][:, 0].tolist() == list(SIZES)


def test_gradients_add_up_until_cleared() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    torch.autograd.backward(model.losses(collector))
    once = collector.rows.clone()
    torch.autograd.backward(model.losses(collector))
    torch.testing.assert_close(collector.rows, 2 * once)
    collector.clear()
    assert not collector.rows.any()
    assert collector.tasks_reaching(model.twice.weight) == frozenset()


def test_tasks_that_reach_a_parameter() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    losses = model.losses(collector)
    torch.autograd.backward([losses[0], losses[2]])
    assert collector.tasks_reaching(model.twice.bias) == {0, 1, 2}  # its rows are one call
    assert collector.tasks_reaching(model.heads[2].weight) == {2}
    assert collector.tasks_reaching(model.heads[1][1].bias) == frozenset()


def test_what_no_loss_reaches() -> None:
    model = BertModel(CONFIG)
    collector = TaskGradients(model, 3)
    with collector.batch(SIZES):
        hidden = model(joined_batch()[0]).last_hidden_state
    hidden.square().sum().backward()
    assert collector.tasks_reaching(model.pooler.dense.weight) == frozenset()
    assert collector.tasks_reaching(model.embeddings.word_embeddings.weight) == {0, 1, 2}


def test_activation_checkpointing() -> None:
    model = Multitask()
    ids, mask = joined_batch()

    def collect(run: Callable[..., Tensor]) -> TaskGradients:
        model.zero_grad()
        collector = TaskGradients(model, 3)
        with collector.batch(SIZES):
            hidden = run(collector, model.twice, model.bert(ids, mask).last_hidden_state)
            loss = hidden.square().sum()
        loss.backward()
        return collector

    def checkpointed(collector: TaskGradients, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, context_fn=collector.checkpoint_contexts)

    def with_backward_in_the_block(*arguments) -> Tensor:
        hidden = checkpointed(*arguments)
        hidden.square().sum().backward()
        return hidden

    expected = collect(lambda _, layer, x: layer(x))
    found = collect(checkpointed)
    assert torch.equal(found.rows, expected.rows)
    assert found.tasks_reaching(model.twice.weight) == {0, 1, 2}
    with pytest.raises(RuntimeError, match="call backward after the block"):
        collect(with_backward_in_the_block)
    # Without the contexts other layers would run again, and their numbers would be wrong.
    with pytest.raises(CheckpointError):
        collect(lambda _, layer, x: checkpoint(layer, x, use_reentrant=False))
    with pytest.raises(RuntimeError, match="a gradient that belongs to no task"):
        collect(lambda _, layer, x: checkpoint(layer, x, use_reentrant=True))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.embed(ids).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) * self.temperature


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Convolution(), "conv.weight: used by .*conv1d"),
        (Attention(), "attention.in_proj_weight: used by .*multi_head_attention_forward"),
        (Scaled(), "temperature: used by .*mul"),
        (nn.Embedding(60, 8, max_norm=1.0), "weight: used by .*embedding on .* within `task"),
        (
            nn.Sequential(nn.Embedding(60, 8), nn.LayerNorm((7, 8))),
            "1.weight: used by .*layer_norm on",
        ),
        (nn.Sequential(nn.Embedding(60, 8), nn.LSTM(8, 8)), "1.weight_ih_l0: used by .*lstm"),
    ],
    ids=["convolution", "attention", "parameter", "max_norm", "two dimensions", "lstm"],
)
def test_a_layer_that_is_not_known_is_named(model: nn.Module, message: str) -> None:
    collector = TaskGradients(model, 3)
    with pytest.raises(NotImplementedError, match=message), collector.batch(SIZES):
        model(joined_batch()[0])
    with torch.no_grad(), collector.batch(SIZES):  # evaluation is no business of this
        model(joined_batch()[0])


def test_gradients_that_went_past_the_block_are_named() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    ids, mask = joined_batch()
    with collector.batch(SIZES):
        pooled = model.encode(ids, mask)
    with pytest.raises(RuntimeError, match=r"heads.0.bias: got a gradient that belongs to no"):
        model.heads[0](pooled).sum().backward()

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad):
            return None, grad.T @ ctx.saved_tensors[0]

    collector.clear()
    with collector.batch(SIZES):
        out = Product.apply(torch.ones(9, 32), model.heads[0].weight)
    with pytest.raises(RuntimeError, match=r"heads.0.weight: got a gradient"):
        out.sum().backward()
    collector.clear()
    model.zero_grad()
    sum(model.losses()).backward()  # outside of a step, ordinary training
    assert model.heads[0].weight.grad is not None


def test_rows_that_do_not_fit_are_named() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    ids, mask = joined_batch()
    with (
        pytest.raises(ValueError, match=r"bert.embeddings.word_embeddings.weight: input of \[9, 7"),
        collector.batch((3, 3, 4)),
    ):
        model.encode(ids, mask)
    with collector.batch(SIZES):
        pooled = model.encode(ids, mask)
        with pytest.raises(ValueError, match=r"heads.0.weight: .* within `task`"):
            model.heads[0](pooled[:3])
        with pytest.raises(ValueError, match=r"position_embeddings.weight: an index of one dim"):
            model.bert.embeddings.position_embeddings(torch.arange(9))
    for sizes in ((3, 6), (3, -1, 7)):
        with pytest.raises(ValueError, match="examples: expected 3 counts"), collector.batch(sizes):
            pass
    with pytest.raises(ValueError, match="number: expected 0 to 2, got 3"), collector.task(3):
        pass
    with pytest.raises(ValueError, match="num_tasks: expected at least 1"):
        TaskGradients(model, 0)
    with pytest.raises(ValueError, match="got none"):
        TaskGradients(nn.ReLU(), 2)
    model.heads.double()
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, torch.float64 on cpu"):
        TaskGradients(model, 2)


@pytest.mark.parametrize("granularity", ["model", "group", "tensor"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pcgrad_in_one_pass(granularity: str, reduction: str) -> None:
    """Training in one pass against training in K: after three steps of momentum and decay."""
    start = Multitask()
    weights = []
    for one_pass, dtype in [(True, torch.float32), (False, torch.float32), (False, torch.float64)]:
        model = copy.deepcopy(start).to(dtype)
        collector = TaskGradients(model, 3) if one_pass else None
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = PCGrad(
            torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1),
            reduction,
            granularity=granularity,
            task_gradients=collector,
        )
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.pc_backward(model.losses(collector))
            assert (optimizer.gram < 0).any()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    ours, torchs, exact = weights
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm()


def test_pcgrad_in_one_pass_adds_up_micro_batches() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    optimizer.pc_backward(model.losses(collector))
    gram = optimizer.gram
    optimizer.pc_backward(model.losses(collector))
    torch.testing.assert_close(optimizer.gram, 4 * gram)
    optimizer.zero_grad()
    assert not collector.rows.any()


def test_an_optimizer_of_other_parameters() -> None:
    model = Multitask()
    collector = TaskGradients(model, 3)
    with pytest.raises(ValueError, match="losses must be 3, not 2"):
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector).pc_backward(
            model.losses(collector)[:2]
        )
    with pytest.raises(ValueError, match=r"not the 48 of task_gradients; .* anew after freezing"):
        PCGrad(
            torch.optim.SGD(model.bert.parameters(), lr=0.1), task_gradients=collector
        ).pc_backward(model.losses(collector))


def test_the_buffer_goes_when_nobody_needs_it() -> None:
    model = Packed()
    collector = TaskGradients(model, 3)
    torch.autograd.backward(packed_losses(model, collector))
    rows = weakref.ref(collector.rows)
    del collector
    gc.collect()
    assert rows() is None
    torch.autograd.backward(packed_losses(model))
