"""A run whose numbers, memory or other ranks fail."""

import json
import math
import re
import signal
import time

import pytest
import torch

from engine import evaluate, sweep
from engine.checkpoints.manifest import Progress
from engine.checkpoints.store import load_weights
from engine.data.task_schema import FORMATS
from engine.models.heads import metrics_for
from engine.optim.lr_schedule import Schedule
from engine.runs.experiments import read_results
from engine.runs.lock import LOCK
from engine.runs.run import open_run
from engine.runs.scoring import score
from engine.runtime.oom import memory_explained
from engine.train import main
from engine.training.step import MultitaskStep
from engine.utils.errors import DivergedError, InputError
from engine.utils.json_text import dump_json

from ...conftest import REPOSITORY
from ..conftest import TINY, tiny_run  # noqa: F401 (a fixture)
from ..launch import start
from ..models.heads.cases import results


def corrupt_labels(monkeypatch, is_corrupted) -> None:
    """Let the labels of some steps be NaN, so that they are skipped."""
    run = MultitaskStep.__call__

    def corrupted(self, batch, step, lr):
        if is_corrupted(step):
            batch[0].labels[2].fill_(torch.nan)
        return run(self, batch, step, lr)

    monkeypatch.setattr(MultitaskStep, "__call__", corrupted)


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tiny_run, monkeypatch, tmp_path):  # noqa: F811
    corrupt_labels(monkeypatch, lambda step: step >= 1)
    settings = ("max_skipped=3", "epochs=20")
    with pytest.raises(DivergedError, match=r"not finite in 3 steps in a row, from step 1 on"):
        tiny_run("run", settings=settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 1, 1, 1]
    saved = json.loads((tmp_path / "run" / "skipped-00000001.json").read_text())
    assert saved["step"] == 1
    assert {task: len(examples) for task, examples in saved["tasks"].items()} == dict.fromkeys(
        ("sst", "quora", "sts"), 32
    )
    example = saved["tasks"]["quora"][0]
    assert len(example["text"]) == len(example["tokens"]) == 2
    assert example["label"] in (0.0, 1.0)
    tokenizer = open_run(tmp_path / "run").tokenizer
    assert tokenizer.decode(example["tokens"][1]) == example["text"][1] != ""


def test_skipped_steps_count_where_epochs_are_shorter_than_a_block(tiny_run, monkeypatch):  # noqa: F811
    corrupt_labels(monkeypatch, lambda step: step >= 1)
    settings = ("max_skipped=3", "epochs=20", "log_every=10")
    with pytest.raises(DivergedError, match=r"not finite in [34] steps in a row, from step 1 on"):
        tiny_run("run", settings=settings)


def test_a_few_skipped_steps_do_not_end_a_run(tiny_run, monkeypatch):  # noqa: F811
    corrupt_labels(monkeypatch, lambda step: step in (1, 2, 4))
    folder = tiny_run("run", settings=("max_skipped=3",))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0, 1, 0]
    assert lines[1]["losses"]["sts"] is None
    assert [path.name for path in (folder / "checkpoints").glob("step-*")]


HUGE = ("warmup=0", "schedule=constant")
"""With a large rate: one update, and nothing that the model computes is finite any more."""


@pytest.mark.parametrize(
    ("recipe", "settings", "reason"),
    [
        ("demo", ("lr=1e18",), "what the model computes is not finite"),
        ("demo", ("lr=1e38",), "weights or moments are not finite"),
        ("demo", ("lr=1e18", "max_steps=1"), "what the model computes is not finite"),
        ("demo", ("lr=1e18", "checkpoint_every=1", "keep_checkpoints=1"), "model computes"),
        ("demo", ("lr=1e18", "freeze_encoder=true"), "finite"),
        ("demo", ("lr=1e6", "precision=fp16", "epochs=10"), "finite"),
        (
            "demo",
            ("lr=1e18", "task_schedule=round_robin", "micro_batches=2"),
            "what the model computes",
        ),
        ("superbert", ("lr=1e18", "max_skipped=0"), "phase pretrain, after step"),
        ("demo", ("phases={one={lr=1e-3},two={lr=1e18}}",), "phase two, after step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_that_diverges_is_not_done(tiny_run, tmp_path, recipe, settings, reason):  # noqa: F811
    settings = (*HUGE, "epochs=2", *settings)
    with pytest.raises(DivergedError, match=reason) as caught:
        tiny_run("run", recipe=recipe, settings=settings)
    assert "lower lr (now " in str(caught.value)
    run = open_run(tmp_path / "run")
    for path in (run.folder / "checkpoints").glob("*-*"):
        model = run.new_model()
        load_weights(path, model)  # what is there is whole and finite
        assert all(torch.isfinite(weight).all() for weight in model.parameters())
    for file in run.folder.glob("*.json*"):
        for line in (
            file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        ):
            json.loads(line, parse_constant=pytest.fail)


def test_what_was_good_before_stays(tiny_run, monkeypatch, tmp_path, capsys):  # noqa: F811
    """The weights are corrupted between the second and the third epoch."""
    rate = Schedule.__call__
    monkeypatch.setattr(
        Schedule, "__call__", lambda self, step: 1e18 if step == 4 else rate(self, step)
    )
    settings = ("checkpoint_every=1", "keep_checkpoints=1")
    with pytest.raises(DivergedError, match=r"kept: best-0000000\d, step-00000004"):
        tiny_run("run", settings=settings)
    assert (
        main(["demo", "--out", str(tmp_path / "series"), "--seeds", "2", "--set", *TINY, *settings])
        == 3
    )
    assert "no result of seed-0: " in capsys.readouterr().out
    assert not (tmp_path / "series" / "results.json").exists()
    assert evaluate.main([str(tmp_path / "run")]) == 0
    with pytest.raises(DivergedError):  # again, and at once
        tiny_run("run", "--resume", settings=settings)
    monkeypatch.undo()
    tiny_run("run", "--resume", settings=settings)  # from step 4, as if nothing had been


def test_a_series_goes_on_past_a_run_that_diverges(tmp_path, capsys):
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "s"),
        "--grid",
        "lr=1e18,1e-3",
        "--set",
        *TINY,
        *HUGE,
    ]
    for _ in range(2):
        assert sweep.main(arguments) == 3
    assert list(read_results(tmp_path / "s")) == ["demo/lr=1e-3/seed-0"]
    assert "no result of demo/lr=1e18/seed-0: after step" in capsys.readouterr().out


def test_two_ranks_agree_that_a_run_diverged(tmp_path):
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--set",
        *TINY,
        *HUGE,
        "lr=1e18",
    ]
    processes = start(2, [arguments], tmp_path / "log")
    try:
        assert [process.wait(timeout=300) for process in processes] == [3, 3]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_constant_answers_are_no_failure():
    """Pearson's correlation is not defined there; the score is 0."""
    (correlation, *_), (accuracy, *_) = (metrics_for(FORMATS[task]) for task in ("sts", "sst"))
    assert score(correlation, results([2.5, 2.5, 2.5], [0, 1, 2])) == 0
    assert math.isnan(score(correlation, results([2.5, math.nan, 2], [0, 1, 2])))
    assert math.isnan(score(accuracy, results([1, math.nan, 2], [0, 1, 2])))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_null_where_a_number_has_no_value(value):
    given = {"a": [value, 1.5, (value,)], "b": {"c": value}, "d": True, "e": "NaN"}
    expected = {"a": [None, 1.5, [None]], "b": {"c": None}, "d": True, "e": "NaN"}
    assert json.loads(dump_json(given)) == expected
    assert not Progress(best_score=None).is_beaten_by(value)
    assert not Progress(best_score=0.5).is_beaten_by(value)


def test_json_is_written_in_one_place():
    """But for messages, and text alone, which has no numbers."""
    others = {"json_text", "help", "idle_settings", "messages", "first_line", "quoting"}
    others |= {"tokenizer_file", "tokenizer_process"}
    for path in (*REPOSITORY.glob("engine/**/*.py"), *REPOSITORY.glob("bench/*.py")):
        if path.stem not in others:
            assert not re.search(r"json\.dumps?\(|model_dump_json\(", path.read_text()), path


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_does_not_suffice(tiny_run, monkeypatch, error):  # noqa: F811
    def fail(*_):
        raise error

    monkeypatch.setattr(MultitaskStep, "__call__", fail)
    with pytest.raises(InputError, match=r"out of memory: lower batch_size \(now 32\)"):
        tiny_run("run")
    own = r"out of memory: lower tasks\.sts\.batch_size \(now 40\)"
    with pytest.raises(InputError, match=own):
        tiny_run("own", settings=("tasks.sts.batch_size=40",))


def test_a_model_that_memory_does_not_suffice_for(tiny_run):  # noqa: F811
    settings = ("encoder.hidden_size=1000000000", "encoder.num_attention_heads=1")
    with pytest.raises(InputError, match=r"out of memory: .*take a smaller encoder"):
        tiny_run("run", settings=settings)


def test_real_allocations_that_fail_are_known():
    with pytest.raises(InputError, match="out of memory"), memory_explained("lower batch_size"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), memory_explained("lower batch_size"):
        torch.empty(3).view(2)


def test_a_run_cut_off_before_its_recipe_is_begun_again(tiny_run, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="holds something already"):
        tiny_run("run", "--max-steps", "1")
    with pytest.raises(InputError, match="something else"):  # of another program
        tiny_run("run", "--resume", "--max-steps", "1")
    (folder / LOCK).touch()
    tiny_run("run", "--resume", "--max-steps", "1")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    (other / LOCK).touch()
    with pytest.raises(InputError, match="something else"):
        tiny_run("other", "--resume", "--max-steps", "1")


def test_a_rank_that_hangs_is_named_and_the_run_goes_on_later(tmp_path):
    """Killed ranks, whose connections break at once, are in tests/robustness."""
    folder = tmp_path / "run"
    arguments = ["demo", "--out", str(folder), "--device", "cpu", "--set", *TINY]
    arguments += ["epochs=10000", "checkpoint_every=5", "timeout=3"]
    leader, other = start(2, [arguments], tmp_path / "log")
    try:
        wait_for(lambda: list((folder / "checkpoints").glob("step-*/manifest.json")), leader)
        other.send_signal(signal.SIGSTOP)
        assert leader.wait(timeout=60) == 75
    finally:
        for process in (leader, other):
            process.kill()
            process.wait()
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "no answer from rank 1; it died or hangs" in errors[0]
    assert "start again with --resume" in errors[0]
    found = open_run(folder).checkpoints.find("step")
    assert found is not None
    steps = str(int(found.name[-8:]) + 1)
    assert main([*arguments, f"max_steps={steps}", "--resume"]) == 0


def wait_for(condition, process) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("waited a minute in vain")


def test_a_run_that_trained_no_step_says_so(tmp_path, capsys):
    arguments = ["demo", "--max-steps", "2", "--set", *TINY, "precision=fp16"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "no step was trained: the loss scale" in capsys.readouterr().out
    assert main([*arguments, "precision=fp32", "--out", str(tmp_path / "other")]) == 0
    assert "no step was trained" not in capsys.readouterr().out
