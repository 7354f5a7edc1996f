"""Runs that train low-rank updates: they resume with their bits, and answer merged or not."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import evaluate
from engine.config.recipe import load
from engine.models import hf_weights
from engine.runs.predictor import Predictor
from engine.runs.run import begin, open_run
from engine.runs.scoring import answers
from engine.train import main
from engine.utils.errors import InputError

from .conftest import SHORT
from .models.encoder_cases import write_folder
from .models.test_lora import BERT
from .test_phases import cut_at
from .whole_runs import assert_same_run, evaluations, last_checkpoint, trained_weights

CPU = torch.device("cpu")
LORA = ("lora_rank=3", "lora_alpha=12", "lora_dropout=0.1", "lr=1e-2")
TEXTS = ["the plot was dull .", "a superb film"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model."""
    return write_folder(BERT, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def lora_run(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train updates of the model in ``tmp_path / name``; return the run's folder."""

    def run(name: str, *arguments: str, settings: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / name
        given = ["demo", "--init", str(base), "--out", str(folder), *arguments]
        assert main([*given, "--set", *SHORT, "epochs=2", *LORA, *settings]) == 0
        return folder

    return run


def test_a_run_that_begins_from_it_has_its_encoder_with_the_updates(lora_run, tmp_path):
    folder = lora_run("run")
    trained, _ = open_run(folder).trained_model(CPU, torch.float32)
    settings = [f"init={folder}", *SHORT]
    begun = begin(load("demo", settings), tmp_path / "next").initial_model()
    for name, weight in trained.encoder.state_dict().items():
        assert torch.equal(begun.encoder.state_dict()[name], weight), name


def test_the_updates_of_the_best_evaluations_are_averaged(lora_run):
    settings = ("eval_every=1", "average_best=2", "lr=1e-12")  # equal scores: it is kept
    folder = lora_run("run", settings=settings)
    (path,) = (checkpoints := open_run(folder).checkpoints).all("average")
    assert any(".lora." in name for name in load_file(path / "model.safetensors"))
    tops = [load_file(top / "model.safetensors") for top in checkpoints.all("top")]
    for name, weight in load_file(path / "model.safetensors").items():
        mean = torch.stack([top[name].double() for top in tops]).mean(0)
        assert torch.equal(weight, mean.float()), name


def of_encoder(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's own weights, without the updates."""
    return {
        name.removeprefix("encoder."): weight
        for name, weight in weights.items()
        if name.startswith("encoder.") and ".lora." not in name
    }


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("ema_decay=0.9", "micro_batches=2", "checkpoint_layers=true", "adapter_width=12"),
        ("task_schedule=cycle", "layer_lr_decay=0.5", "optimizer=lamb", "max_train_examples=32"),
    ],
    ids=["plain", "average", "turns"],
)
def test_a_resumed_run_has_the_bits_of_one_in_a_piece(lora_run, base, monkeypatch, settings):
    whole = lora_run("whole", settings=settings)
    cut_at(2, monkeypatch, lambda: lora_run("cut", settings=settings))
    assert_same_run(whole, lora_run("cut", "--resume", settings=settings))
    before = hf_weights.load_encoder_state(base, BERT.config)
    after = trained_weights(whole)
    for name, weight in of_encoder(after).items():
        assert torch.equal(weight, before[name]), name
    ups = [weight for name, weight in after.items() if ".lora." in name and ".up." in name]
    assert len(ups) == 4  # query and value of two layers
    assert all(up.any() for up in ups)
    moments = [n for n in last_checkpoint(whole) if n.startswith("exp_avg.encoder.embeddings")]
    assert bool(moments) == ("adapter_width=12" in settings)


def test_answers_merged_or_not(lora_run, capsys):
    """The predictor's are merged; an evaluation gives the very scores of the training."""
    folder = lora_run("run", settings=("lora_targets=['query','key','output']",))
    run = open_run(folder)
    plain, _ = run.trained_model(CPU, merged=False)
    merged = Predictor(run, device="cpu")
    assert merged._model.lora is None
    assert not [name for name in merged._model.state_dict() if ".lora." in name]
    for task in run.recipe.tasks:
        split = run.split(task, "dev")
        one, other = answers(plain, split), answers(merged._model, split)
        for ours, others in zip(one[:2], other[:2], strict=True):
            if ours is not None and ours.dtype.kind == "f":
                np.testing.assert_allclose(ours, others, atol=1e-4)
    assert np.abs(merged.embed(TEXTS)).max() > 0
    best = max(evaluations(folder).values(), key=lambda scores: sum(scores.values()))
    assert evaluate.main([str(folder)]) == 0
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert {task: scores[task] for task in best} == best
    capsys.readouterr()


def test_a_frozen_phase_leaves_the_updates(lora_run, base):
    """Heads first, on states computed once; then updates, and heads."""
    settings = ("phases.heads.freeze_encoder=true", "phases.all.weight_decay=0.1", "epochs=1")
    first = trained_weights(
        lora_run("first", settings=(*settings[:1], "epochs=1", "lora_dropout=0"))
    )
    assert not any(weight.any() for name, weight in first.items() if ".up." in name)
    both = trained_weights(lora_run("both", settings=settings))
    assert any(weight.any() for name, weight in both.items() if ".up." in name)
    before = hf_weights.load_encoder_state(base, BERT.config)
    for weights in (first, both):
        assert all(torch.equal(w, before[name]) for name, w in of_encoder(weights).items())


def test_objectives_train_updates(lora_run):
    """A masked LM is tied to the frozen table of words."""
    settings = ("objectives.text.kind=masked_lm", "train=['text','sst']", "lora_targets=['output']")
    after = trained_weights(lora_run("run", "--max-steps", "2", settings=settings))
    ups = [name for name, weight in after.items() if ".lora.output.up." in name and weight.any()]
    assert len(ups) == 2


def test_a_recipe_of_the_run_has_the_settings(lora_run, base):
    folder = lora_run("run", "--max-steps", "1")
    recipe = load(str(folder / "recipe.toml"))
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets) == (3, 12, ("query", "value"))
    assert json.loads((folder / "config.json").read_text())["init_model_type"] == "bert"
    with pytest.raises(InputError, match=r"lora_rank = 3, now it is 4"):
        lora_run("run", "--resume", settings=("lora_rank=4",))
    weights = load_file(next((folder / "checkpoints").glob("best-*")) / "model.safetensors")
    numbers = [w.numel() for name, w in weights.items() if ".lora." in name]
    assert sum(numbers) == 2 * 2 * 2 * 3 * BERT.config.hidden_size
    assert all(math.isfinite(w.sum()) for w in weights.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("lora_rank=2", "init=''"),
            "lora_rank = 2: an encoder from scratch would keep",
        ),
        (("lora_targets=[]",), "lora_targets: expected at least one name, and each once"),
        (
            ("lora_targets=['key','key']",),
            "lora_targets: expected at least one name, and each once",
        ),
        (
            ("lora_targets=['query','dense']",),
            r"lora_targets\.1 = 'dense': Input should be 'query'",
        ),
        (("lora_dropout=1",), "lora_dropout = 1"),
        (("lora_alpha=0",), "lora_alpha = 0"),
        (("phases.a.lora_rank=2",), r"phases\.a: no setting of a phase: lora_rank"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load("demo", settings)
