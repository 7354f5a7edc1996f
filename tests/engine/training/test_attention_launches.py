"""How many attention kernels a recorded step of BERT launches on a GPU, counted by stubs."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine._kernels import kernels
from engine.data.collate import PackedBatch
from engine.data.loader import TrainingLoader
from engine.data.sampler import TaskSampler
from engine.data.split import TokenizedSplit
from engine.data.task_schema import FORMATS
from engine.models.bert import BertConfig
from engine.models.multitask import MultitaskModel
from engine.runtime.execution import Recorded, Recording
from kernels.attention import attention_runs_triton, attention_triton
from kernels.attention.attention_options import AttentionOptions

from ..small_models import DEFAULT_FEATURES, TASKS, build_step, random_split

LAYERS, STEPS, EXAMPLES = 12, 16, 32
BY_RUNS = {"forward_runs_kernel": LAYERS, "backward_runs_kernel": LAYERS}
BY_TILES = dict.fromkeys(("forward_kernel", "grad_q_kernel", "grad_kv_kernel"), LAYERS)


class Tape:
    """Stands in for CUDA graphs; ``found`` has the launches of every recording."""

    def __init__(self, launched: Counter[str]) -> None:
        self._launched = launched
        self.found: list[tuple[int, dict[str, int]]] = []

    def run(self, function: Callable[..., Any], batches: Sequence[PackedBatch]) -> Any:
        return function(batches)

    def record(self, function: Callable[..., Any], batches: Sequence[PackedBatch]) -> Recording:
        own = [batch.map(Tensor.clone) for batch in batches]
        self._launched.clear()
        result = function(own)
        self.found.append((batches[0].max_seqlen, dict(self._launched)))
        return Recording(own, result, lambda: None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The launches of attention's kernels, which do nothing, where a model calls attention."""
    counts: Counter[str] = Counter()

    class Stub:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, _grid: object) -> Callable[..., None]:
            return lambda *_, **__: counts.update([self._name])

    for name in BY_RUNS:
        monkeypatch.setattr(attention_runs_triton, name, Stub(name))
    for name in (*BY_TILES, "intervals_kernel"):
        monkeypatch.setattr(attention_triton, name, Stub(name))

    class Attention(torch.autograd.Function):
        """The launches of the operator on a GPU."""

        @staticmethod
        def forward(ctx: Any, qkv: Tensor, cu: Tensor, longest: int, plan: Any) -> Tensor:
            ctx.boundaries, ctx.known = (cu, cu), {"plan": plan, "max_seqlen": longest}
            options = (*ctx.boundaries, AttentionOptions(1.0))
            out, lse = attention_triton.forward(*qkv.unbind(1), *options, **ctx.known)
            ctx.saved = (*qkv.unbind(1), out.zero_(), lse.zero_())
            return out.clone()

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
            grads = grad_out.new_zeros(len(grad_out), 3, *grad_out.shape[1:])
            options = (*ctx.boundaries, AttentionOptions(1.0))
            attention_triton.backward(
                grad_out, *ctx.saved, *options, grads=grads.unbind(1), **ctx.known
            )
            return grads, None, None, None

    def attend(qkv: Tensor, cu: Tensor, longest: int, *, plan: object, **_: object) -> Tensor:
        assert plan is not None
        return Attention.apply(qkv, cu, longest, plan)

    monkeypatch.setattr(kernels, "flash_attn_varlen_qkvpacked_func", attend)
    return counts


def split_of(task: str, seed: int, longest: int) -> TokenizedSplit:
    """Sentences of 20 tokens or fewer, and one of ``longest``."""
    plain = random_split(task, EXAMPLES, vocab=97, seed=seed)
    lengths = np.diff(plain.offsets)
    lengths[0] = longest
    return TokenizedSplit(
        task=task,
        examples=plain.examples,
        columns=len(FORMATS[task].sentences),
        tokens=np.ones(lengths.sum(), dtype=np.uint16),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        labels=plain.labels,
        truncated=0,
        bad_rows={},
        blank=(),
    )


def launches_of_recordings(
    launched: Counter[str], longest: int, shapes: int, micro_batches: int = 1
) -> list[tuple[int, dict[str, int]]]:
    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    forms = [FORMATS[task] for task in (*TASKS, "cfimdb")]
    model = MultitaskModel(config, forms, DEFAULT_FEATURES, pooling="mean", dropout_p=0.0)
    step = build_step(model.train())
    tape = Tape(launched)
    step._run = Recorded(step._on_device, tape, limit=8)
    splits = [split_of(task, n, longest) for n, task in enumerate(TASKS)]
    samplers = [TaskSampler(task, EXAMPLES, 8, seed=5) for task in TASKS]
    options = {"shapes": shapes, "micro_batches": micro_batches}
    with TrainingLoader(splits, samplers, 0, STEPS, **options) as loader:
        batches = [batch.planned() for batch in loader]
    for number in range(STEPS):
        first = number * micro_batches
        step(batches[first : first + micro_batches], number, 1e-3)
    return sorted(tape.found, key=lambda each: each[0])


def test_short_sentences_take_two_launches_a_layer(launched: Counter[str]) -> None:
    """Padding, which all batches have, is cut short enough."""
    ((longest, launches),) = launches_of_recordings(launched, 61, 1)
    assert longest == 61
    assert launches == BY_RUNS
    assert sum(launches.values()) == 24


def test_a_long_sentence_has_a_recording_with_five_launches_a_layer(
    launched: Counter[str],
) -> None:
    of_short, of_long = launches_of_recordings(launched, 62, 2)
    assert of_short == (61, BY_RUNS)
    assert of_long == (62, BY_RUNS | BY_TILES)
    assert sum(of_long[1].values()) == 60


def test_micro_batches_share_a_bound(launched: Counter[str]) -> None:
    """Each order of short and long ones would be another recording."""
    twice = {name: 2 * count for name, count in (BY_RUNS | BY_TILES).items()}
    assert launches_of_recordings(launched, 62, 2, 2) == [(62, twice)]
