"""The moving average of the weights: its values, its scores, what a checkpoint has of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import recipe as recipes
from engine.optim.weight_average import WeightAverage
from engine.runs import run as runs
from engine.runs.run import open_run
from engine.training.build import build_trainer

from ...device_waits import RecordableOnly
from ..conftest import TINY
from ..small_models import build_step


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_it_is_the_average_of_the_steps_that_were_not_skipped(make_model, make_batch, decay):
    step = build_step(make_model().train())
    step.average = WeightAverage(step.parameters.master, decay)
    expected, updates = step.parameters.master.double(), 0
    for number in range(4):
        batch = make_batch(seed=number)
        if number == 1:
            batch.labels[2].fill_(torch.inf)
        before = step.average.weights.clone()
        report = step(batch, number, 1e-2)
        if report.skipped:
            assert torch.equal(before, step.average.weights)
            continue
        updates += 1
        kept = min(decay, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * step.parameters.master.double()
    assert updates == 3
    largest = step.parameters.master.abs().max()
    # Each of three updates rounds its rate, the difference, the product and the sum.
    assert (step.average.weights - expected).abs().max() <= 3 * 4 * 2**-24 * largest
    batch = make_batch()
    with RecordableOnly():
        step._on_device([batch])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scored_weights_are_the_average_and_training_goes_on_with_its_own(precision):
    settings = [*TINY, "ema_decay=0.9", f"precision={precision}"]
    trainer = build_trainer(
        runs.begin(recipes.load("demo", settings), Path("not-written")), torch.device("cpu")
    )
    with trainer.loader(0) as loader:
        trainer.step(next(iter(loader)), 0, 1e-2)
    flat = trainer.parameters
    before, average = flat.compute.clone(), trainer.step.average.weights.clone()
    with trainer.scored_weights():
        assert torch.equal(flat.compute, average.to(flat.compute.dtype))
        assert not torch.equal(flat.compute, before)
    assert torch.equal(flat.compute, before)
    assert torch.equal(trainer.step.average.weights, average)


def test_the_best_checkpoint_has_the_average_of_the_same_training(tiny_run):
    """Scores differ from those of the last weights, losses do not."""
    settings = ("checkpoint_every=1", "keep_checkpoints=6")
    plain, averaged = (
        tiny_run("plain", settings=settings),
        tiny_run("averaged", settings=(*settings, "ema_decay=0.9")),
    )
    stored = {}
    for folder in (plain, averaged):
        checkpoints = open_run(folder).checkpoints
        (file,) = checkpoints.find("step").glob("*.safetensors")
        stored[folder] = load_file(file)
    ema = {name for name in stored[averaged] if name.startswith("ema.")}
    assert stored[averaged].keys() - stored[plain].keys() == ema
    assert len(ema) == sum(name.startswith("master.") for name in stored[plain])
    for name, tensor in stored[plain].items():
        assert torch.equal(stored[averaged][name], tensor), name
    checkpoints = open_run(averaged).checkpoints
    (best,) = checkpoints.all("best")
    (state,) = (checkpoints.folder / best.name.replace("best", "step")).glob("*.safetensors")
    weights, at_best = load_file(best / "model.safetensors"), load_file(state)
    for kind, expected in (("ema", True), ("master", False)):
        table = at_best[f"{kind}.encoder.embeddings"].flatten()
        word = weights["encoder.embeddings.word.weight"].flatten()
        assert torch.equal(table[: len(word)], word) == expected
