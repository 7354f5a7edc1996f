"""Recipes in several phases, and tasks that take turns: one command, resumed to the bit."""

import os
import signal

import pytest
import torch

from engine.config import recipe as recipes
from engine.data.task_schedule import TASK_SCHEDULES
from engine.metrics.log import MetricsLog
from engine.runs.run import open_run
from engine.train import main
from engine.training.step import MultitaskStep
from engine.utils.errors import InputError

from .conftest import TINY
from .whole_runs import assert_same_run, evaluations, metrics, trained_weights

PHASES = ("phases.heads.freeze_encoder=true", "phases.heads.epochs=1", "phases.all.epochs=2")


def cut_at(step: int, monkeypatch, train) -> None:
    """Let a run end like in a power cut, after the line of ``step`` was written."""
    add = MetricsLog.add

    def crash(log, now, *rest):
        written = add(log, now, *rest)
        if now == step:
            raise RuntimeError("power cut")
        return written

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train()


@pytest.mark.parametrize("crash_after", [0, 4], ids=["phase 1", "phase 2"])
def test_phases_chain_and_resume_to_the_bit(tiny_run, monkeypatch, crash_after):
    whole = tiny_run("whole", settings=PHASES)
    assert [line["step"] for line in metrics(whole)] == list(range(6))
    cut_at(crash_after, monkeypatch, lambda: tiny_run("cut", settings=PHASES))
    assert_same_run(tiny_run("cut", "--resume", settings=PHASES), whole)


def test_a_phase_goes_on_from_the_last_ones_weights(tiny_run):
    folder = tiny_run("run", settings=("phases.heads.freeze_encoder=true", "epochs=1"))
    initial = open_run(folder).initial_model().state_dict()
    trained = trained_weights(folder)
    for name, before in initial.items():
        assert torch.equal(trained[name], before) == name.startswith("encoder."), name

    settings = ("phases.heads.freeze_encoder=true", "phases.rest.lr=1e-12", "epochs=1")
    later = trained_weights(tiny_run("again", settings=settings))
    for name, tensor in trained.items():
        torch.testing.assert_close(later[name], tensor, rtol=1e-6, atol=1e-8)


def test_turns_resume_to_the_bit(tiny_run, monkeypatch):
    settings = ("task_schedule=annealed", "epochs=1")
    whole = tiny_run("whole", settings=settings)
    lines = metrics(whole)
    assert len(lines) == 6  # two batches of each of three tasks
    assert all(len(line["losses"]) == 1 for line in lines)
    cut_at(4, monkeypatch, lambda: tiny_run("cut", settings=(*settings, "checkpoint_every=3")))
    resumed = tiny_run("cut", "--resume", settings=(*settings, "checkpoint_every=3"))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("order", TASK_SCHEDULES)
def test_every_order_trains_every_task(tiny_run, order):
    lines = metrics(tiny_run("run", settings=(f"task_schedule={order}", "epochs=1")))
    assert [len(line["losses"]) for line in lines] == ([3, 3] if order == "together" else [1] * 6)
    assert {task for line in lines for task in line["losses"]} == {"sst", "quora", "sts"}
    assert not any(line["skipped"] for line in lines)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("phases.one.lrr=1", "phases.one: no setting of a phase: lrr; did you mean lr?"),
        ("phases.one.seed=1", "no setting of a phase: seed"),
        ("phases.one.lr=-1", "phases.one.lr = -1"),
        ("phases.one.train=['imdb']", "'imdb' is not among tasks"),
        ("phases.one=3", "phases.one"),
    ],
)
def test_a_phase_that_makes_no_sense(override, expected):
    with pytest.raises(InputError, match=expected.replace("[", r"\[").replace("?", r"\?")):
        recipes.load("demo", [override])


def test_a_later_phase_with_nothing_to_train_ends_the_run_before_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = ("task_schedule=cycle", "tasks.sts.head=cosine")
    settings = [*turns, "phases.a.max_steps=1", "phases.b.freeze_encoder=true"]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=r"^phases\.b: nothing is left to train by sts, since"):
            main(["demo", "--out", "run", *dry, "--set", *TINY, *settings])
    assert not list(tmp_path.iterdir())


def test_max_steps_ends_each_phase(tiny_run):
    folder = tiny_run("run", "--max-steps", "1", settings=PHASES)
    assert len(metrics(folder)) == 2


def test_a_phase_that_stops_early_goes_on_to_the_next(tiny_run, monkeypatch, capsys):
    settings = ("lr=1e-12", "phases.a.eval_every=1", "phases.a.patience=1", "phases.b.epochs=1")
    whole = tiny_run("whole", settings=settings)
    assert "a: stopped early after step 2: 1 evaluation " in capsys.readouterr().out
    assert list(evaluations(whole)) == [1, 2, 4]
    assert len(metrics(whole)) == 4
    progress = open_run(whole).checkpoints.progress()
    assert (progress.phase, progress.phase_start, progress.stale) == (1, 2, 0)
    assert progress.best_step == 1  # of all phases; the second has a best of its own
    cut_at(2, monkeypatch, lambda: tiny_run("cut", settings=settings))
    assert_same_run(tiny_run("cut", "--resume", settings=settings), whole)


def test_stopped_between_phases_it_goes_on(tiny_run, tmp_path, monkeypatch):
    whole = tiny_run("whole", settings=PHASES)
    from engine import train as program

    build = program.build_trainer
    arguments = ["demo", "--out", str(tmp_path / "cut"), "--set", *TINY, *PHASES]

    def build_or_die(*arguments, phase=0, **others):
        if phase == 1:
            raise RuntimeError("power cut")
        return build(*arguments, phase=phase, **others)

    with monkeypatch.context() as patch:
        patch.setattr(program, "build_trainer", build_or_die)
        with pytest.raises(RuntimeError, match="power cut"):
            main(arguments)
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "cut", whole)


@pytest.mark.parametrize(("step", "status"), [(1, 128 + signal.SIGTERM), (3, 0)])
def test_a_signal_in_the_last_step_of_a_phase_is_not_lost(step, status, tmp_path, monkeypatch):
    """The next phase is not begun; the last one is done all the same."""
    usual = MultitaskStep.__call__

    def interrupted(self, batches, number, lr):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, batches, number, lr)

    phases = ["phases.a.max_steps=2", "phases.b.max_steps=2"]
    arguments = ["demo", "--out", str(tmp_path / "run"), "--set", *TINY, *phases]
    with monkeypatch.context() as patch:
        patch.setattr(MultitaskStep, "__call__", interrupted)
        assert main(arguments) == status
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == step + 1
    if status:
        assert main([*arguments, "--resume"]) == 0
        assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
