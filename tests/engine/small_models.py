"""A small multitask model and batches for it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import kernels
from engine.data.collate import PackedBatch, pack
from engine.data.split import TokenizedSplit
from engine.data.task_schema import FORMATS
from engine.distributed.gradient_sync import NoSync
from engine.gradients.balancing import Balancer, BalanceSettings, TrainedTasks, build_method
from engine.gradients.flat_parameters import FlatParameters
from engine.gradients.groups import ParamGroups
from engine.models.bert import BertConfig
from engine.models.multitask import MultitaskModel
from engine.optim.adamw import AdamW
from engine.optim.loss_scale import LossScale
from engine.runtime.execution import Execution
from engine.training.step import MultitaskStep

TASKS = ("sst", "quora", "sts")
TRAINED = TrainedTasks(TASKS, (50, 30, 40))
DECAY, SEED = 0.1, 3
DEFAULT_FEATURES = {"sst": "single", "quora": "concat", "sts": "cosine", "cfimdb": "single"}


def build_step(
    model: MultitaskModel,
    *,
    trained: TrainedTasks = TRAINED,
    balance: str = "pcgrad",
    settings: BalanceSettings | None = None,
    surgery: str = "model",
    loss_weights: tuple[float, ...] | None = None,
    clip: float | None = None,
    eps: float = 1e-8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    execution: str = "eager",
    side_stream: bool = True,
    gradient_queue: kernels.gradient_queue.GradientQueue | None = None,
    sync: Callable[[MultitaskModel, FlatParameters], NoSync] | None = None,
    **flat_settings: bool,
) -> MultitaskStep:
    """A training step around a model, as a recipe would make it.

    ``gradient_queue`` takes the place of that of the execution; ``sync`` makes the exchange with
    other ranks from the model and its parameters;
    ``flat_settings`` are freeze_encoder and take_turns, of the flat parameters.
    """
    tasks = trained.names
    flat = FlatParameters(
        model, tasks, device=torch.device(device), compute_dtype=dtype, **flat_settings
    )
    groups = ParamGroups(flat, tasks, surgery)
    how = Execution(execution, torch.device(device), side_stream=side_stream)
    how.gradient_queue = gradient_queue or how.gradient_queue
    method = build_method(balance, trained, settings or BalanceSettings())
    return MultitaskStep(
        model,
        tasks,
        flat,
        AdamW(flat, betas=(0.9, 0.999), eps=eps, weight_decay=DECAY),
        groups,
        Balancer(method, groups.sole_tasks, torch.device(device)),
        loss_weights=loss_weights or (1.0,) * len(tasks),
        loss_scale=LossScale(flat.master.device) if dtype == torch.float16 else None,
        clip_norm=clip,
        seed=SEED,
        execution=how,
        sync=None if sync is None else sync(model, flat),
    )


def one_layer(*, positions: int = 32, dropout: float = 0.0) -> BertConfig:
    """An encoder for heads that are tried by themselves."""
    return BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )


def random_split(task: str, examples: int, *, vocab: int, seed: int) -> TokenizedSplit:
    """Sentences of 1 to 20 tokens with labels in the task's range."""
    rng = np.random.default_rng(seed)
    form = FORMATS[task]
    lengths = rng.integers(1, 21, size=examples * len(form.sentences))
    labels = rng.uniform(0, form.high, examples)
    return TokenizedSplit(
        task=task,
        examples=examples,
        columns=len(form.sentences),
        tokens=rng.integers(0, vocab, size=lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=(labels if form.kind == "score" else labels.round()).astype(np.float32),
        truncated=0,
        bad_rows={},
        blank=(),
    )


@pytest.fixture
def make_batch() -> Callable[..., PackedBatch]:
    def make(seed: int = 0, sizes: tuple[int, ...] = (5, 3, 4)) -> PackedBatch:
        return make_micro_batches(seed, sizes, 1)[0]

    return make


def make_micro_batches(
    seed: int, sizes: tuple[int, ...], count: int, tasks: tuple[str, ...] = TASKS
) -> list[PackedBatch]:
    """A batch of ``sizes`` examples of each task, split into ``count``."""
    splits = [
        random_split(task, size, vocab=97, seed=seed + position)
        for position, (task, size) in enumerate(zip(tasks, sizes, strict=True))
    ]
    parts = [np.array_split(np.arange(size), count) for size in sizes]
    return [pack(splits, picks) for picks in zip(*parts, strict=True)]


@pytest.fixture
def make_model() -> Callable[..., MultitaskModel]:
    def make(
        features: dict[str, str] | None = None,
        *,
        dropout: float = 0.0,
        pooling: str = "mean",
        losses: dict[str, str] | None = None,
        adapter_width: int = 0,
    ) -> MultitaskModel:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=97,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=80,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.2,  # large enough that tasks conflict and norms matter
        )
        model = MultitaskModel(
            config,
            [FORMATS[task] for task in (*TASKS, "cfimdb")],
            DEFAULT_FEATURES | (features or {}),
            pooling=pooling,
            dropout_p=dropout,
            losses=losses,
            adapter_width=adapter_width,
        )
        for adapter in model.adapters.values():
            adapter.up.weight.data.normal_(0, 0.2)  # past its beginning at zero
        return model

    return make
