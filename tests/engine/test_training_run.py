"""Train small whole runs by the command."""

import json
import signal

import pytest
import torch

from engine import evaluate, predict
from engine.metrics.log import MetricsLog
from engine.runs.data_paths import data_folder
from engine.runs.run import open_run
from engine.train import main
from engine.utils.errors import InputError

from .conftest import TINY
from .whole_runs import (
    assert_same_run,
    evaluations,
    last_checkpoint,
    metrics,
    trained_weights,
    written_scores,
)


def test_a_run_leaves_what_its_folder_promises(tiny_run):
    folder = tiny_run("run")
    for name in ("recipe.toml", "config.json", "tokenizer.json", "metrics.json"):
        assert (folder / name).is_file()
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0].keys() >= {"losses", "lr", "cosines", "conflict_rate", "grad_norm", "weights"}
    assert lines[0]["cosines"].keys() == {"sst/quora", "sst/sts", "quora/sts"}
    assert lines[0]["losses"].keys() == {"sst", "quora", "sts"}
    assert not list(folder.rglob("*.partial"))
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    tasks = [scores[task] for task in ("sst", "quora", "sts")]
    assert scores["overall"] == pytest.approx(sum(tasks) / 3)


def test_the_same_seed_gives_the_same_bits(tiny_run):
    assert_same_run(tiny_run("one"), tiny_run("two"))
    other = tiny_run("three", "--seed", "1")
    assert metrics(other)[0]["losses"] != metrics(tiny_run("four"))[0]["losses"]


@pytest.mark.parametrize(
    ("crash_after", "settings"),
    [
        pytest.param(0, (), id="before the first checkpoint"),
        pytest.param(3, ("checkpoint_every=1",), id="at a checkpoint"),
        pytest.param(4, (), id="past a checkpoint, its line already written"),
        pytest.param(
            4, ("balance=gradvac", "balance_granularity=layer"), id="with a method that remembers"
        ),
        *(
            pytest.param(4, (f"balance={name}", *settings), id=f"with {name}")
            for name, settings in (
                ("uw", ()),
                ("dwa", ("balancing.dwa_window=1",)),
                ("rlw", ()),
                ("imtl", ("balance_granularity=tensor",)),
                ("stch", ("balancing.stch_warmup=2",)),
                ("famo", ("balance_granularity=layer",)),
            )
        ),
        pytest.param(4, ("precision=fp16", "tasks.sst.weight=1e4"), id="with a loss scale"),
        pytest.param(4, ("optimizer=lamb", "lr=0.01"), id="with LAMB"),
        pytest.param(4, ("eval_every=3", "micro_batches=2"), id="past an evaluation in an epoch"),
        pytest.param(4, ("optimizer=torch.NAdam", "ema_decay=0.9"), id="of torch, averaged"),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(tiny_run, monkeypatch, crash_after, settings):
    whole = tiny_run("whole", settings=settings)
    add = MetricsLog.add

    def crash(log, step, *rest):
        written = add(log, step, *rest)
        if step == crash_after:
            raise RuntimeError("power cut")
        return written

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run("cut", settings=settings)
    assert_same_run(tiny_run("cut", "--resume", settings=settings), whole)


def test_asked_to_stop_it_checkpoints_and_goes_on_later(tiny_run, tmp_path, monkeypatch):
    whole = tiny_run("whole")
    add = MetricsLog.add

    def interrupt(log, step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return add(log, step, *rest)

    arguments = ["demo", "--out", str(tmp_path / "stopped"), "--set", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", interrupt)
        assert main(arguments) == 128 + signal.SIGTERM
    assert len(metrics(tmp_path / "stopped")) == 3
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "stopped", whole)


def test_resuming_a_finished_run_changes_nothing(tiny_run):
    folder = tiny_run("run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tiny_run("run", "--resume")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_score_of_a_task_decides_which_weights_are_the_best(tiny_run):
    settings = ("eval_every=1", "best_of=sst", "lr=3e-2", "schedule=cosine")
    folder = tiny_run("run", settings=settings)
    scores = evaluations(folder)
    assert list(scores) == [1, 2, 3, 4, 5, 6]
    best = max(scores, key=lambda step: scores[step]["sst"])  # the first of equal ones
    assert best != max(scores, key=lambda step: scores[step]["overall"])
    (path,) = open_run(folder).checkpoints.all("best")
    assert path.name == f"best-{best:08}"
    kept = json.loads((folder / "metrics.json").read_text())
    assert (kept["step"], kept["scores"]) == (best, scores[best])
    assert open_run(folder).checkpoints.progress().best_score == scores[best]["sst"]


STAYS = ("lr=1e-12", "eval_every=1", "patience=2")
"""Scores never change: the first is the best, and two later ones end the phase."""


def test_a_single_evaluation_that_ends_a_run_is_not_said_to_be_several_in_a_row(tiny_run, capsys):
    tiny_run("run", settings=(*STAYS[:2], "patience=1"))
    assert "stopped early after step 2: 1 evaluation without a better score" in (
        capsys.readouterr().out
    )


def test_without_better_scores_a_run_stops_early_and_for_good(tiny_run, monkeypatch, capsys):
    folder = tiny_run("whole", settings=STAYS)
    said = "stopped early after step 3: 2 evaluations in a row without a better score (overall)"
    assert capsys.readouterr().out.count(said) == 1
    assert list(evaluations(folder)) == [1, 2, 3]
    assert len(metrics(folder)) == 3
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tiny_run("whole", "--resume", settings=STAYS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    add = MetricsLog.add

    def crash(log, step, *rest):
        if step == 2:
            raise RuntimeError("power cut")
        return add(log, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run("cut", settings=STAYS)
    assert open_run(folder.parent / "cut").checkpoints.progress().stale == 1
    assert_same_run(tiny_run("cut", "--resume", settings=STAYS), folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_untrained_heads_stay_as_initialised(tiny_run, precision):
    """Weight decay would move a head that no trained task reaches, were it in the update.

    And weights that the model computes with in bf16 are stored as they were before.
    """
    settings = ("weight_decay=0.1", "lr=0.01", f"precision={precision}")
    folder = tiny_run("run", recipe="sst-finetune", settings=settings)
    initial = open_run(folder).new_model().state_dict()
    trained = trained_weights(folder)
    assert torch.equal(trained["heads.quora.output.weight"], initial["heads.quora.output.weight"])
    assert not torch.equal(trained["heads.sst.output.weight"], initial["heads.sst.output.weight"])
    assert json.loads((folder / "metrics.json").read_text())["scores"].keys() >= {"quora", "sts"}


@pytest.mark.parametrize("surgery", ["layer", "tensor"])
def test_surgery_by_layer_and_by_tensor_runs(tiny_run, surgery):
    lines = metrics(
        tiny_run("run", "--max-steps", "2", settings=(f"balance_granularity={surgery}",))
    )
    whole = metrics(tiny_run("whole", "--max-steps", "2"))
    assert lines[0]["cosines"] == pytest.approx(whole[0]["cosines"], abs=1e-5)
    assert lines[1]["losses"] != whole[1]["losses"]


def test_bf16_computes_on_a_copy_of_fp32_masters(tiny_run):
    folder = tiny_run("run", settings=("precision=bf16",))
    assert last_checkpoint(folder)["master.encoder.embeddings"].dtype == torch.float32
    exact = tiny_run("exact", settings=("precision=fp32",))
    for ours, theirs in zip(metrics(folder), metrics(exact), strict=True):
        # bf16 keeps 8 bits: a loss may be off by a few times 2^-8 of itself in so few steps.
        assert ours["losses"]["sst"] == pytest.approx(theirs["losses"]["sst"], rel=2**-5)


@pytest.mark.parametrize(
    ("recipe", "losses"),
    [
        ("demo", ("tasks.sst.class_weights=[1,2,3,4,5]", "tasks.quora.focal_gamma=2")),
        (
            "demo-kinds",
            (
                *("tasks.slots.class_weights=balanced", "tasks.slots.tag_pieces=all"),
                *("tasks.aspects.class_weights=balanced", "tasks.aspects.label_smoothing=0.1"),
            ),
        ),
    ],
)
def test_micro_batches_and_checkpointed_layers(tiny_run, recipe, losses):
    exactly = (
        "dropout=0",
        "encoder.hidden_dropout_prob=0",
        "encoder.attention_probs_dropout_prob=0",
        *losses,
    )
    whole = tiny_run("whole", "--max-steps", "3", recipe=recipe, settings=exactly)
    saving = (*exactly, "micro_batches=3", "checkpoint_layers=true")
    parted = tiny_run("parted", "--max-steps", "3", recipe=recipe, settings=saving)
    for ours, theirs in zip(metrics(parted), metrics(whole), strict=True):
        for task, loss in ours["losses"].items():
            # fp32 means over other groupings of 32 examples, after two updates at most
            assert loss == pytest.approx(theirs["losses"][task], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_gives_the_scores_of_the_best_epoch_again(tiny_run, precision):
    # Weights of classes are of the training examples alone, which an evaluation does not read.
    settings = (f"precision={precision}", "tasks.sst.class_weights=balanced")
    folder = tiny_run("run", settings=settings)
    at_the_end = written_scores(folder)
    (folder / "metrics.json").unlink()
    assert evaluate.main([str(folder), "--split", "dev"]) == 0
    assert written_scores(folder) == at_the_end


def test_evaluate_scores_one_task_or_a_file_with_labels(tiny_run, capsys):
    folder = tiny_run("run", "--max-steps", "1")
    written = (folder / "metrics.json").read_text()
    dev = data_folder(open_run(folder).recipe) / "ids-sst-dev.csv"
    of_file = ["--task", "sst", "--input"]
    capsys.readouterr()
    for given, title in ((["--task", "sst"], "dev"), ([*of_file, str(dev)], str(dev))):
        assert evaluate.main([str(folder), *given]) == 0
        shown = capsys.readouterr().out
        # A path breaks the line where it is as long as that.
        assert "".join(shown.split()).startswith(f"{title}scoresofstep1")
        assert f"│ {json.loads(written)['scores']['sst']:.3f} │" in shown
        assert "quora" not in shown
    unlabelled = dev.with_name("ids-sst-test-student.csv")
    for given, message in (
        ([*of_file, str(unlabelled)], "no column 'sentiment' in the header"),
        (["--split", "test"], r"ids-sst-test-student.csv of sst has no labels; score a file that"),
        (["--task", "nope"], "--task nope: .* has sst, quora, sts"),
        (["--input", str(dev)], "name the task of its examples by --task"),
        ([*of_file, str(dev), "--split", "dev"], "--split: has no effect on the file of --input"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main([str(folder), *given])
    assert (folder / "metrics.json").read_text() == written


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
def test_predict_writes_a_line_for_every_row_in_order(tiny_run, tmp_path, task):
    folder = tiny_run("run")
    from engine.data.table import read_table
    from engine.data.task_schema import FORMATS
    from engine.runs.data_paths import data_folder

    form = FORMATS[task]
    source = form.file(data_folder(open_run(folder).recipe), "test")
    output = tmp_path / "out.tsv"
    arguments = [str(folder), "--task", task, "--input", str(source), "--output", str(output)]
    assert predict.main(arguments) == 0
    header, *lines = output.read_text().splitlines()
    assert header == "id\tprediction"
    ids = [line.split("\t")[0] for line in lines]
    assert ids == read_table(source, form, labelled=False).ids
    for line in lines:
        assert 0 <= float(line.split("\t")[1]) <= form.high


def test_predict_can_keep_the_place_of_a_bad_row(tiny_run, tmp_path):
    folder = tiny_run("run")
    source, output = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("id\tsentence\na\tfine film\nb\t\nc\tdull\n")
    arguments = [str(folder), "--task", "sst", "--input", str(source), "--output", str(output)]
    assert predict.main([*arguments, "--on-bad-row", "skip"]) == 0
    rows = [line.split("\t") for line in output.read_text().splitlines()]
    assert [name for name, _ in rows] == ["id", "a", "b", "c"]
    assert [prediction == "" for _, prediction in rows] == [False, False, True, False]
