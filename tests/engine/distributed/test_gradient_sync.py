"""A bucket is sent as soon as its gradients are complete, while those below are not yet."""

import pytest
import torch
from torch import Tensor

from engine.distributed import gradient_sync
from engine.gradients.layout import Bucket

from ..small_models import build_step, make_micro_batches

DURING = ["heads", "pair", "encoder.layers.1", "encoder.layers.0"]
AT_THE_END = ["encoder.embeddings", "vectors"]


class Watched(gradient_sync._BucketSync):
    """Sends nothing, but notes what every bucket's rows hold when its turn comes."""

    def __init__(self, model, parameters) -> None:
        super().__init__(model, parameters)
        self.begun, self.sent = False, {}
        self.before_the_end: list[str] = []

    def start(self) -> None:
        super().start()
        self.begun = True

    def wait(self) -> None:
        self.before_the_end = list(self.sent)
        super().wait()

    def _reduce(self, bucket: Bucket) -> list:
        assert self.begun
        assert bucket.name not in self.sent
        self.sent[bucket.name] = self._parameters.rows.clone()
        return []


def be_the_first_of_two(monkeypatch) -> None:
    monkeypatch.setattr(gradient_sync.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gradient_sync.dist, "get_world_size", lambda: 2)


def columns(step, name: str, rows: Tensor) -> Tensor:
    (bucket,) = (one for one in step.parameters.layout.buckets if one.name == name)
    return rows[:, bucket.start : bucket.start + bucket.used]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("adapter_width", [0, 12])
def test_buckets_leave_during_the_backward_pass(
    make_model, monkeypatch, checkpointed, parts, adapter_width
):
    be_the_first_of_two(monkeypatch)
    model = make_model({"sts": "shared"}, dropout=0.1, adapter_width=adapter_width).train()
    model.encoder.checkpoint_layers = checkpointed
    step = build_step(model)
    step.sync = watched = Watched(model, step.parameters)
    for layer in ("encoder.layers.0", "encoder.layers.1"):  # all of it is yet to be overwritten
        columns(step, layer, step.parameters.rows).fill_(torch.nan)

    step._task_gradients(make_micro_batches(0, (6, 4, 4), parts))
    rows = step.parameters.rows
    assert watched.before_the_end == DURING
    assert list(watched.sent) == [*DURING, *AT_THE_END]
    for name, then in watched.sent.items():
        assert torch.equal(columns(step, name, then), columns(step, name, rows)), name
        assert columns(step, name, rows).isfinite().all()
    if parts == 1:
        below = columns(step, "encoder.layers.0", watched.sent["encoder.layers.1"])
        assert below.isnan().any(), "the layer below was complete before this one was sent"


def test_losses_and_gram_matrices_are_one_small_all_reduce(monkeypatch):
    sizes = []

    def all_reduce(numbers: Tensor) -> None:
        sizes.append(numbers.numel())
        numbers *= 2

    monkeypatch.setattr(gradient_sync.dist, "all_reduce", all_reduce)
    losses, grams = torch.arange(3.0), [torch.rand(1, 3, 3), torch.rand(5, 3, 3)]
    total, summed = gradient_sync.ShardedSync.total(None, losses, grams)
    assert sizes == [3 + 9 + 45]
    assert torch.equal(total, 2 * losses)
    assert all(torch.equal(both, 2 * own) for both, own in zip(summed, grams, strict=True))


def test_nothing_is_sent_for_a_frozen_encoder_before_the_end(make_model, monkeypatch):
    """Its hidden states come from a cache, so that there is no layer to listen to."""
    be_the_first_of_two(monkeypatch)
    model = make_model().train()
    step = build_step(model)
    watched = Watched(model, step.parameters)
    watched.start()
    watched.wait()
    assert watched.before_the_end == []
    assert set(watched.sent) == {bucket.name for bucket in step.parameters.layout.buckets}
