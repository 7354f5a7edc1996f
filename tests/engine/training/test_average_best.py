"""The average of the best evaluations: its weights, when it is kept, what resuming makes of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import evaluate, export
from engine.checkpoints.manifest import Progress
from engine.checkpoints.store import Checkpoints, average_weights
from engine.runs.run import open_run
from engine.training import average_best
from engine.utils.errors import InputError

from ..whole_runs import assert_same_run, evaluations, written_scores

EVERY = ("eval_every=1", "schedule=constant", "warmup=0")
AVERAGED = (*EVERY, "average_best=3", "lr=3e-3")
STAYS = (*EVERY, "average_best=3", "lr=1e-12")
"""Scores never change: the first three are averaged, and the average is no worse."""


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def steps_of(folder: Path, kind: str) -> list[int]:
    found = open_run(folder).checkpoints.all(kind)
    return sorted(int(path.name.rpartition("-")[2]) for path in found)


def content(folder: Path) -> dict[str, bytes]:
    """What does not depend on clock and memory, but the state to resume from."""
    files = folder.glob("checkpoints/[bta]*/*")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return found | {"metrics.json": json.dumps(written_scores(folder)).encode()}


def assert_is_mean(folder: Path, steps: list[int]) -> None:
    checkpoints = open_run(folder).checkpoints
    (path,) = checkpoints.all("average")
    kept = [weights_in(checkpoints.path("top", step)) for step in steps]
    for name, tensor in weights_in(path).items():
        expected = torch.stack([own[name].double() for own in kept]).mean(0).float()
        assert torch.equal(tensor, expected), name


def score_as(monkeypatch, more: float) -> None:
    """Let the average score so much more than it does."""
    score = average_best.score_splits

    def scored(*given, **options):
        return {name: value + more for name, value in score(*given, **options).items()}

    monkeypatch.setattr(average_best, "score_splits", scored)


BY_ERROR = ("best_of=sts", "tasks.sts.metrics=['mse']")


@pytest.mark.parametrize(
    ("settings", "by", "is_kept"), [((), 1.0, True), (BY_ERROR, 1.0, True), ((), -1.0, False)]
)
def test_the_average_is_kept_if_it_is_not_worse(
    tiny_run,
    monkeypatch,
    capsys,
    settings,
    by,
    is_kept,
):
    sign = -1 if settings else 1
    score_as(monkeypatch, by * sign)
    folder = tiny_run("run", settings=(*AVERAGED, *settings))
    shown = capsys.readouterr().out
    scores = evaluations(folder)
    of = {step: sign * own["sts" if settings else "overall"] for step, own in scores.items()}
    steps = sorted(sorted(of, key=lambda step: (-of[step], step))[:3])
    best = max(of, key=lambda step: of[step])
    assert list(scores) == [1, 2, 3, 4, 5, 6]
    assert f"the average of steps {', '.join(map(str, steps))}: " in shown
    assert f"of the best step {best} alone {sign * of[best]:.4f}; " in shown
    measured = json.loads((folder / "metrics.json").read_text())
    if not is_kept:
        assert "it scores worse and is not kept" in shown
        assert steps_of(folder, "average") == []
        assert (measured["step"], measured["scores"]) == (best, scores[best])
        assert f"best evaluation (step {best})" in shown
        return
    assert "the average is kept as the best" in shown
    assert "dev scores, the average of steps" in shown
    assert (measured["step"], measured["averaged"]) == (6, steps)
    assert_is_mean(folder, steps)


def test_commands_load_the_average_and_it_scores_what_it_did(
    tiny_run,
    tmp_path,
    capsys,
):
    folder = tiny_run("run", settings=(*STAYS, "tasks.quora.threshold=dev"))
    assert_is_mean(folder, [1, 2, 3])
    model, progress = open_run(folder).trained_model(torch.device("cpu"))
    (path,) = open_run(folder).checkpoints.all("average")
    for name, tensor in weights_in(path).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert progress.source == "the average of steps 1, 2, 3"
    (threshold,) = model.thresholds["quora"]
    assert threshold != 0  # that of its own evaluation
    before = (folder / "metrics.json").read_text()
    capsys.readouterr()
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    assert "dev scores of the average of steps 1, 2, 3" in capsys.readouterr().out
    assert (folder / "metrics.json").read_text() == before
    assert export.main([str(folder), "--to", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "the weights are those of the average of steps 1, 2, 3." in card


def test_only_what_a_checkpoint_names_stays(tiny_run):
    folder = tiny_run("run", settings=(*AVERAGED, "max_train_examples=256", "epochs=2"))
    found = open_run(folder).checkpoints
    progress = found.progress()
    assert progress.step == 16
    named = {step for step, _ in progress.top}
    assert len(named) == 3
    older = average_best.verify(found.all("step")[1]).progress
    assert set(steps_of(folder, "top")) == named | {step for step, _ in older.top}


def test_of_equal_scores_the_first_are_averaged_and_those_that_are_not_finite_never():
    progress = Progress()
    for step, score in enumerate([0.5, float("nan"), 0.7, 0.5, 0.7, 0.6], start=1):
        progress = progress._replace(step=step).evaluated(score, 3)
    assert progress.top == ((3, 0.7), (5, 0.7), (6, 0.6))
    assert progress.in_phase(1).top == ()
    assert progress._replace(step=7).evaluated(1.0).top == progress.top  # of a phase without


def interrupt(monkeypatch, module, name: str, when) -> None:
    """Let a call end as in a power cut: after it was done, where ``when`` of its arguments says."""
    function = getattr(module, name)

    def cut(*arguments):
        done = function(*arguments)
        if when(*arguments):
            raise RuntimeError("power cut")
        return done

    monkeypatch.setattr(module, name, cut)


CUTS = {
    "between the weights and their checkpoint": (
        (Checkpoints, "save_weights"),
        lambda _, kind, progress, *__: (kind, progress.step) == ("top", 3),
    ),
    "before the average": ((average_best, "average_weights"), lambda *_: True),
    "between scores and average": ((average_best, "write_scores"), lambda *_: True),
    "after the average": (
        (Checkpoints, "save_weights"),
        lambda _, kind, *__: kind == "average",
    ),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, STAYS) for name in CUTS), ("before the average", (*AVERAGED, "ema_decay=0.5"))],
)
def test_a_run_that_is_killed_makes_the_same_average(
    tiny_run,
    monkeypatch,
    name,
    settings,
):
    score_as(monkeypatch, 1.0)
    whole = tiny_run("whole", settings=settings)
    target, when = CUTS[name]
    with monkeypatch.context() as patch:
        interrupt(patch, *target, when)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run("cut", settings=settings)
    cut = tiny_run("cut", "--resume", settings=settings)
    assert_same_run(cut, whole)
    assert content(cut) == content(whole)
    assert len(steps_of(cut, "average")) == 1
    tiny_run("cut", "--resume", settings=settings)
    assert content(cut) == content(whole)


def test_a_run_that_is_trained_on_makes_another_average(tiny_run):
    settings = (*STAYS, "epochs=6")
    whole = tiny_run("whole", "--max-steps", "6", settings=settings)
    folder = tiny_run("run", "--max-steps", "4", settings=settings)
    assert steps_of(folder, "average") == [4]
    tiny_run("run", "--resume", "--max-steps", "6", settings=settings)
    assert content(folder) == content(whole)
    assert steps_of(folder, "average") == [6]


def test_a_run_that_is_trained_on_and_killed_has_its_best_weights_again(
    tiny_run,
    monkeypatch,
):
    settings = (*STAYS, "epochs=6")
    folder = tiny_run("run", "--max-steps", "4", settings=settings)
    interrupt(monkeypatch, average_best, "write_scores", lambda *_: True)
    for _ in range(2):  # whenever it was killed
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run("run", "--resume", "--max-steps", "6", settings=settings)
        assert written_scores(folder) == {
            "split": "dev",
            "step": 1,
            "scores": evaluations(folder)[1],
        }
    (folder / "evaluations.jsonl").write_text("")
    with pytest.raises(
        InputError, match=r"evaluations.jsonl: has no scores of step 1, the best wi"
    ):
        tiny_run("run", "--resume", "--max-steps", "6", settings=settings)


def test_the_last_phase_alone_is_averaged_and_held_against_all(
    tiny_run,
    capsys,
):
    settings = (*STAYS, "phases.one.max_steps=2", "phases.two.max_steps=3")
    folder = tiny_run("run", settings=settings)
    assert "the average of steps 3, 4, 5: " in (shown := capsys.readouterr().out)
    assert "of the best step 1 alone" in shown  # an earlier phase's
    assert steps_of(folder, "top") == [3, 4, 5]
    assert_is_mean(folder, [3, 4, 5])


def test_a_phase_that_stops_early_is_averaged_once(tiny_run, capsys):
    settings = (*STAYS, "patience=2")
    folder = tiny_run("run", settings=settings)
    shown = capsys.readouterr().out
    assert shown.index("stopped early after step 3") < shown.index("the average of steps 1, 2, 3: ")
    before = content(folder)
    tiny_run("run", "--resume", settings=settings)
    assert "the average of steps 1, 2, 3: " not in capsys.readouterr().out
    assert content(folder) == before


def test_damaged_weights_are_left_out(tiny_run, capsys):
    folder = tiny_run("run", settings=STAYS)
    found = open_run(folder).checkpoints
    (found.path("average", 6) / "model.safetensors").write_bytes(b"spoilt")
    (found.path("top", 2) / "model.safetensors").write_bytes(b"spoilt")
    capsys.readouterr()
    tiny_run("run", "--resume", settings=STAYS)
    shown = capsys.readouterr().out
    assert "top-00000002/model.safetensors: damaged" in shown
    assert "; left out of the average" in shown
    assert_is_mean(folder, [1, 3])


def test_one_evaluation_is_not_averaged(tiny_run, capsys):
    folder = tiny_run("run", "--max-steps", "1", settings=STAYS)
    shown = capsys.readouterr().out
    assert "average_best = 3: no effect, the last phase has one evaluation alone" in shown
    assert "nothing to average" in shown
    assert steps_of(folder, "average") == []


def test_sums_in_float64(tmp_path):
    """In fp32 the small one would be lost beside the large ones, which cancel."""
    for number, value in enumerate([1e8, 1.0, -1e8, 2.0]):
        (tmp_path / str(number)).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / str(number) / "model.safetensors")
    found = average_weights([tmp_path / str(number) for number in range(4)])
    assert found["w"].tolist() == [0.75] * 3
    assert found["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"w": torch.ones(2)}, "w is not as in"),
        ({"v": torch.ones(3)}, "v is not as in"),
        ({"w": torch.ones(3, dtype=torch.int32)}, "w"),
    ],
)
def test_weights_of_another_model(tmp_path, spoil, message):
    for name, weights in (("a", {"w": torch.ones(3)}), ("b", spoil)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    with pytest.raises(InputError, match=message):
        average_weights([tmp_path / "a", tmp_path / "b"])
