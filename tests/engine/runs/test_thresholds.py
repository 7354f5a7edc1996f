"""Thresholds that are chosen on dev: kept with the best weights, used by every command."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from engine import evaluate, export, predict, train
from engine.checkpoints.manifest import Manifest, read_manifest, seal
from engine.checkpoints.store import load_weights
from engine.config import recipe as recipes
from engine.data.source import Split
from engine.distributed.ranks import Ranks
from engine.models.heads.thresholds import choose_thresholds
from engine.runs.data_paths import data_folder, origin
from engine.runs.halving import score_newest
from engine.runs.predictor import Predictor
from engine.runs.run import Run, open_run
from engine.runs.scoring import score_splits, scores_of
from engine.utils.errors import InputError

from ..conftest import TINY
from ..whole_runs import evaluations, written_scores

CPU = torch.device("cpu")
SETTINGS = [
    *TINY,
    "train=['aspects', 'quora']",
    "tasks.aspects.threshold=dev_per_label",
    "tasks.quora.head=distance",
    "tasks.quora.metrics=['f1', 'accuracy']",
    "tasks.quora.threshold=dev",
    "max_train_examples=128",
    "ema_decay=0.5",  # what is scored, and kept, is the average
    "epochs=2",
    "eval_every=3",
    "schedule=constant",
    "warmup=0",
]


def train_run(folder: Path, *settings: str, more: tuple[str, ...] = ()) -> int:
    return train.main(["demo-kinds", "--out", str(folder), *more, "--set", *SETTINGS, *settings])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of eight steps with evaluations after 3, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("thresholds") / "run"
    assert train_run(folder) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def kept(run: Run) -> dict[str, tuple[float, ...]]:
    """The thresholds of the best checkpoint's manifest."""
    return read_manifest(run.checkpoints.all("best")[0]).thresholds


def logits_of(run: Run, task: str, of: Split = "dev") -> tuple[np.ndarray, np.ndarray]:
    """The logits and labels of a split."""
    model, _ = run.trained_model(CPU)
    split = run.split(task, of)
    return scores_of(model, split).numpy(), np.asarray(split.labels)


def test_those_of_the_best_weights_are_kept(whole):
    run = open_run(whole)
    found = kept(run)
    assert {task: len(logits) for task, logits in found.items()} == {"aspects": 6, "quora": 1}
    for task, metric, per_label in (("aspects", "f1_micro", True), ("quora", "f1", False)):
        again = choose_thresholds(*logits_of(run, task), metric, per_label=per_label)
        assert found[task] == tuple(again.tolist())
    newest = read_manifest(run.checkpoints.all("step")[0])
    assert newest.thresholds == {}  # the next evaluation chooses others


def test_an_evaluation_gives_the_scores_of_training_again(copy, capsys):
    written = written_scores(copy)
    (copy / "metrics.json").unlink()
    assert evaluate.main([str(copy)]) == 0
    assert written_scores(copy) == written
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"quora: yes above a probability of 0\.\d+ \(chosen on the dev data, whose", out
    )
    assert re.search(r"aspects: yes above a probability of praise 0\.\d+, blame 0\.\d+, stro", out)
    assert "slots: yes" not in out


def test_other_data_are_scored_by_the_same(copy):
    """Not by thresholds that would be best there."""
    before = kept(open_run(copy))
    assert evaluate.main([str(copy), "--split", "train"]) == 0
    found = json.loads((copy / "metrics.json").read_text())
    assert found["split"] == "train"
    run = open_run(copy)
    assert kept(run) == before
    for task, average in (("aspects", "micro"), ("quora", "binary")):
        scores, labels = logits_of(run, task, "train")
        answers = scores > np.float32(before[task])
        assert found["scores"][task] == pytest.approx(f1_score(labels, answers, average=average))


def test_they_score_better_than_a_half(whole, copy):
    chosen = json.loads((whole / "metrics.json").read_text())["scores"]
    run = open_run(copy)
    model, _ = run.trained_model(CPU)
    model.set_thresholds({"aspects": [0.0] * 6, "quora": [0.0]})
    splits = {task: run.split(task, "dev") for task in run.recipe.tasks}
    halves = score_splits(model, splits, run.recipe)
    for task in ("aspects", "quora"):
        assert chosen[task] > halves[task] + 0.05
    assert chosen["aspects.average_precision"] == halves["aspects.average_precision"]
    assert chosen["sst"] == halves["sst"]


def test_training_itself_is_the_same_as_with_a_half(whole, tmp_path):
    halves = ("tasks.aspects.threshold=half", "tasks.quora.threshold=half")
    assert train_run(tmp_path / "halves", *halves) == 0
    steps = [(folder / "metrics.jsonl").read_text() for folder in (whole, tmp_path / "halves")]
    losses = [[json.loads(line)["losses"] for line in text.splitlines()] for text in steps]
    assert losses[0] == losses[1]
    run = open_run(tmp_path / "halves")
    manifest = json.loads((run.checkpoints.all("best")[0] / "manifest.json").read_text())
    assert "thresholds" not in manifest
    assert kept(run) == {}


def test_a_run_that_goes_on_ends_with_the_same(whole, tmp_path):
    again = tmp_path / "again"
    assert train_run(again, "max_steps=4") == 0
    assert train_run(again, more=("--resume",)) == 0
    assert kept(open_run(again)) == kept(open_run(whole))
    assert evaluations(again)[8] == evaluations(whole)[8]


def test_predictions_are_above_them(whole, tmp_path):
    run, output = open_run(whole), tmp_path / "aspects.jsonl"
    names = run.recipe.formats["aspects"].classes
    file = data_folder(run.recipe) / "aspects-dev.jsonl"
    command = [str(whole), "--task", "aspects", "--input", str(file), "--output", str(output)]
    assert predict.main([*command, "--probabilities"]) == 0
    limits = torch.tensor(kept(run)["aspects"]).sigmoid().tolist()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines:
        above = [
            name
            for name, limit in zip(names, limits, strict=True)
            if line["probabilities"][name] > limit
        ]
        assert line["prediction"] == above
    assert any(
        (line["probabilities"][name] > 0.5) != (name in line["prediction"])
        for line in lines
        for name in names
    )


def test_a_predictor_and_the_cards_example_answer_by_them(whole, tmp_path, monkeypatch, capsys):
    run, model = open_run(whole), tmp_path / "model"
    assert export.main([str(whole), "--to", str(model)]) == 0
    card = (model / "README.md").read_text()
    assert "Thresholds of aspects and quora were chosen on the same data" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    predictor, halves = Predictor(run, precision="fp32"), Predictor(run, precision="fp32")
    halves._model.set_thresholds({"aspects": [0.0] * 6, "quora": [0.0]})
    other = 0
    for task in ("aspects", "quora"):
        table = origin(run.recipe, task, "dev").table(
            run.recipe.formats[task], labelled=True, on_bad_row="error"
        )
        for row in range(4):
            texts = tuple(column[row] for column in table.sentences)
            example = texts if len(texts) == 2 else texts[0]
            ((answer, *_),), ((at_a_half, *_),) = (x(task, [example]) for x in (predictor, halves))
            other += answer != at_a_half
            monkeypatch.setattr(sys, "argv", ["example.py", str(model), task, *texts])
            capsys.readouterr()
            runpy.run_path(str(tmp_path / "example.py"))
            expected = " ".join(answer) if task == "aspects" else str(answer)
            assert capsys.readouterr().out.strip() == expected
    assert other


def test_a_search_chooses_anew_for_the_newest_weights(whole):
    """Which a halving compares: those of the last evaluation, after the last step."""
    run = open_run(whole)
    model, _ = run.trained_model(CPU, newest=True)
    assert not any(any(logits) for logits in model.thresholds.values())
    found = score_newest(run, CPU)
    splits = {task: run.split(task, "dev") for task in run.recipe.tasks}
    assert found["aspects"] > score_splits(model, splits, run.recipe)["aspects"]


class LastRank(Ranks):
    """The second of two ranks, which is told what the first one chose."""

    is_main = False

    def broadcast(self, value):
        return [0.25] if value is None else value


def test_all_ranks_take_what_the_first_one_chooses(whole):
    run = open_run(whole)
    model, _ = run.trained_model(CPU)
    splits = {"quora": run.split("quora", "dev")}
    score_splits(model, splits, run.recipe, LastRank(), choose_thresholds=True)
    assert model.thresholds["quora"] == (0.25,)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"aspects": (0.5,)}, "of aspects: 1 thresholds, expected 6; it belongs to another model"),
        ({"sst": (0.5,)}, "thresholds of sst, which has none; it belongs to another model"),
        ({"mood": (0.5,)}, "thresholds of mood, which has none; it belongs to another model"),
    ],
)
def test_thresholds_of_another_model_are_refused(copy, thresholds, message):
    run = open_run(copy)
    best = run.checkpoints.all("best")[0]
    progress = read_manifest(best).progress
    (best / "manifest.json").unlink()
    seal(best, Manifest(progress=progress, thresholds=thresholds))
    with pytest.raises(InputError, match=message):
        load_weights(best, run.new_model())


def test_thresholds_that_are_no_numbers_are_damage(copy):
    best = open_run(copy).checkpoints.all("best")[0]
    manifest = json.loads((best / "manifest.json").read_text())
    manifest["thresholds"]["quora"] = ["nan"]
    (best / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"damaged at thresholds\.quora\.0"):
        read_manifest(best)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks.sst.threshold=dev", "'dev': a head for classes has no threshold"),
        ("tasks.slots.threshold=dev", "'dev': a head for tags has no threshold"),
        ("tasks.quora.threshold=dev_per_label", "a head for binary has 'half' or 'dev'"),
    ],
)
def test_heads_without_are_refused(tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        train_run(tmp_path / "run", setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["tasks.quora.metrics=['average_precision']"],
            "tasks.quora.threshold = 'dev': average_precision is the same for each; name one of "
            "accuracy, f1, f1_macro, f1_micro, matthews before it in metrics",
        ),
        (
            ["tasks.aspects.metrics=['accuracy', 'f1_micro']"],
            "tasks.aspects.threshold = 'dev_per_label': accuracy cannot choose it; name one of "
            "f1_micro, f1_macro before it in metrics",
        ),
        (["tasks.quora.threshold=0.3"], "tasks.quora.threshold = 0.3: "),
    ],
)
def test_metrics_that_cannot_choose_are_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        recipes.load("demo-kinds", [*SETTINGS, *settings])
