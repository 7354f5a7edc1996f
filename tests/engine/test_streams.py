"""Runs on streams: resumed to the bit, with other tasks, and faults in one line."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from engine.config import recipe as recipes
from engine.data import streamed
from engine.distributed.ranks import Ranks
from engine.evaluate import main as evaluate
from engine.runs.rank_files import line_on_other_ranks
from engine.runs.resume import resume
from engine.runs.run import begin, open_run
from engine.train import main, train_run
from engine.training.step import MultitaskStep
from engine.utils.errors import DivergedError, InputError

from .data.streams import numbered, write_numbered, write_shards
from .whole_runs import assert_same_run, evaluations, metrics

RECIPE = """
train = ["numbers"]
batch_size = 6
max_steps = 24
eval_every = 8
log_every = 1
lr = 1e-3
precision = "fp32"
balance = "sum"
[tasks.numbers]
head = "single"
[tasks.numbers.source]
kind = "classification"
text = ["sentence"]
classes = 2
dataset = "{folder}"
streaming = true
[encoder]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 48
vocab_size = 256
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a stream of 50 rows, and of a dev split of 12."""
    folder = write_numbered(tmp_path / "set", [20, 30])
    write_numbered(folder, [12], "validation")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def train(recipe: Path, out: Path, *settings: str, further: Sequence[str] = ()) -> int:
    given = ["--set", *settings] if settings else []
    return main([str(recipe), "--out", str(out), "--device", "cpu", *further, *given])


def stopped_and_resumed(recipe: Path, out: Path, steps: Sequence[int], *settings: str) -> None:
    """Train a run in several sessions, each of which reads the stream anew."""
    loaded, console = recipes.load(str(recipe), settings), Console(quiet=True)
    run = begin(loaded, out)
    for stop in steps:
        train_run(run, torch.device("cpu"), console, stop_after=stop)
        run = resume(loaded, out)
    train_run(run, torch.device("cpu"), console)


@pytest.mark.parametrize("buffer", [4, 16, 1000])
@pytest.mark.parametrize("apart", [10, 1000])
def test_a_resumed_run_has_the_bits_of_a_whole_one(
    recipe, tmp_path, monkeypatch, buffer, apart
) -> None:
    """24 steps of 6 examples go almost three times through the 50 rows."""
    monkeypatch.setattr(streamed, "_PIECE", 8)
    monkeypatch.setattr(streamed, "_BETWEEN_MARKS", apart)  # of the places it goes on from
    setting = f"tasks.numbers.source.shuffle_buffer={buffer}"
    train(recipe, tmp_path / "whole", setting)
    stopped_and_resumed(recipe, tmp_path / "parts", (3, 8, 19), setting)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    kept = json.loads((tmp_path / "parts" / "stream-numbers-rank-0.json").read_text())["marks"]
    assert (len(kept) > 1) == (apart == 10)


def test_a_run_without_kept_places_reads_all_again(recipe, tmp_path) -> None:
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", "max_steps=16")
    (tmp_path / "parts" / "stream-numbers-rank-0.json").unlink()
    train(recipe, tmp_path / "parts", further=["--resume"])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_skipped_rows_do_not_change_what_a_resumed_run_sees(tmp_path, recipe, capsys) -> None:
    rows = [
        row | {"label": 9} if number % 4 == 0 else row for number, row in enumerate(numbered(50))
    ]
    write_shards(tmp_path / "set", [rows[:20], rows[20:]])
    settings = ("on_bad_row=skip", "micro_batches=2", "tasks.numbers.source.shuffle_buffer=11")
    train(recipe, tmp_path / "whole", *settings)
    assert "rows of the stream skipped (label is outside 0 to 1)" in capsys.readouterr().out
    stopped_and_resumed(recipe, tmp_path / "parts", (5, 18), *settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_is_not_promised_is_said(recipe, tmp_path, capsys) -> None:
    train(recipe, tmp_path / "run", "tasks.numbers.source.shuffle_buffer=16")
    lines = capsys.readouterr().out.splitlines()
    assert (
        "numbers: streamed, shuffled in a buffer of 16 rows; another number of ranks sees other "
        "batches"
    ) in lines
    assert list(evaluations(tmp_path / "run")) == [8, 16, 24]
    assert not any("no effect" in line for line in lines)


def test_one_epoch_is_all_steps(recipe, tmp_path, capsys) -> None:
    train(recipe, tmp_path / "run", "epochs=1")
    assert "no effect" not in capsys.readouterr().out


def test_nothing_is_copied_to_the_disk(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SUPERBERT_CACHE", str(tmp_path / "cache"))
    train(recipe, tmp_path / "run")
    about = [json.loads(path.read_text()) for path in tmp_path.glob("cache/*/about.json")]
    kinds = sorted(each["what"] for each in about)
    assert len(kinds) == 2
    assert kinds[1] == "tokens of 12 rows of numbers"  # the dev split
    assert "tokens" in kinds[0]  # of the vocabulary


def test_dev_is_read_anew_when_it_has_changed(recipe, tmp_path, capsys) -> None:
    train(recipe, tmp_path / "run")
    assert evaluate([str(tmp_path / "run"), "--device", "cpu"]) == 0
    bad = [{"sentence": "number 1", "label": 3}]
    write_shards(tmp_path / "set", [bad], "validation")
    with pytest.raises(InputError, match="label is outside 0 to 1: '3'"):
        evaluate([str(tmp_path / "run"), "--device", "cpu"])


def test_another_number_of_ranks_is_said_on_resuming(recipe, tmp_path) -> None:
    settings = ("max_steps=8", "phases={one={}}")
    train(recipe, tmp_path / "run", *settings)
    run = open_run(tmp_path / "run")
    assert line_on_other_ranks(run, Ranks()) == ""
    line = line_on_other_ranks(run, Ranks(0, 2))
    assert line.startswith("warning: trained by 1 rank so far, now by 2, which read other examples")


def test_a_stream_alone_has_the_whole_batch(recipe) -> None:
    loaded = recipes.load(str(recipe), ["sampling_alpha=0.5"])
    assert loaded.batch_sizes([0]) == [6]  # its rows are not counted


def test_dry_run_reads_the_first_rows(recipe, tmp_path, capsys) -> None:
    assert train(recipe, tmp_path / "run", further=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "numbers: streamed" in out
    assert "24, 24 an epoch" in out
    assert not (tmp_path / "run").exists()


WITH_SST = ("train=['sst','numbers']", "tasks.sst.head=single", "tasks.sst.first_n=40")


@pytest.mark.parametrize("schedule", ["together", "cycle"])
def test_a_stream_flows_on_beside_a_task_with_epochs(recipe, tmp_path, schedule) -> None:
    """An epoch has the seven batches of the 40 examples of sst."""
    settings = (*WITH_SST, f"task_schedule={schedule}", "epochs=2", "max_steps=0", "eval_every=0")
    train(recipe, tmp_path / "whole", *settings)
    a_step = 2 if schedule == "cycle" else 1
    assert list(evaluations(tmp_path / "whole")) == [7 * a_step, 14 * a_step]
    stopped_and_resumed(recipe, tmp_path / "parts", (4, 9), *settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_phases_begin_with_the_first_rows(recipe, tmp_path) -> None:
    settings = ("phases={one={max_steps=6},two={max_steps=8}}", "eval_every=0")
    train(recipe, tmp_path / "whole", *settings)
    assert open_run(tmp_path / "whole").checkpoints.progress().step == 14
    stopped_and_resumed(recipe, tmp_path / "parts", (4, 9), *settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_bad_row_ends_the_run_and_the_checkpoints_stay(recipe, tmp_path, monkeypatch) -> None:
    """What is trained before is there to be resumed from, with the row skipped or corrected."""
    monkeypatch.setattr(streamed, "_PIECE", 8)
    rows = numbered(300)
    write_shards(tmp_path / "set", [rows[:150], rows[150:]])
    settings = ("max_steps=60", "tasks.numbers.source.shuffle_buffer=1", "checkpoint_every=4")
    run = begin(recipes.load(str(recipe), settings), tmp_path / "run")  # learns the vocabulary
    bad = [row | {"label": 9} for row in rows[280:]]
    write_shards(tmp_path / "set", [rows[:150], [*rows[150:280], *bad]])
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet, row 130; correct the"):
        train_run(run, torch.device("cpu"), Console(quiet=True))
    assert open_run(tmp_path / "run").checkpoints.progress().step >= 8


class InterruptedReading(streamed.StreamedExamples):
    """A stream during which Ctrl-C is pressed once, when 20 examples are passed over."""

    is_pressed = False

    def _read_chunk(self, first):
        super()._read_chunk(first)
        if first > 20 and self._end >= 20 and not self.is_pressed:
            self.is_pressed = True
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_while_rows_are_passed_over(recipe, tmp_path, monkeypatch) -> None:
    """It ends the command at once: no step is done that would be lost."""
    monkeypatch.setattr(streamed, "_PIECE", 8)
    setting = "tasks.numbers.source.shuffle_buffer=8"
    train(recipe, tmp_path / "run", setting, "max_steps=16")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("engine.runs.run.StreamedExamples", InterruptedReading)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", setting, further=["--resume"])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    train(recipe, tmp_path / "run", setting, further=["--resume"])
    train(recipe, tmp_path / "whole", setting)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class SlowReading(streamed.StreamedExamples):
    """A stream whose batches take long, and that one thread at a time may ask for."""

    at_work = threading.Lock()

    def task_batch(self, chosen, step):
        assert self.at_work.acquire(blocking=False), "two loaders read one stream"
        time.sleep(0.05)
        batch = super().task_batch(chosen, step)
        self.at_work.release()
        return batch


def test_a_stream_of_which_steps_are_skipped(recipe, tmp_path, monkeypatch) -> None:
    """The batch that is written down is the first of these, read anew."""
    seen, run = [], MultitaskStep.__call__

    def without_labels(self, batch, step, lr):
        seen.append(batch[0].input_ids[1 : batch[0].cu_seqlens[1] - 1].tolist())
        if step >= 3:
            batch[0].labels[0].fill_(torch.nan)
        return run(self, batch, step, lr)

    monkeypatch.setattr(MultitaskStep, "__call__", without_labels)
    monkeypatch.setattr("engine.runs.run.StreamedExamples", SlowReading)
    with pytest.raises(DivergedError, match="not finite in 4 steps in a row, from step 3 on"):
        train(recipe, tmp_path / "run", "max_skipped=4", "max_steps=60", "eval_every=0")
    saved = json.loads((tmp_path / "run" / "skipped-00000003.json").read_text())
    assert saved["tasks"]["numbers"][0]["tokens"][0][1:-1] == seen[3]
    assert len(saved["tasks"]["numbers"]) == 6


def test_without_the_library(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the library datasets \(pip install datasets\)"):
        train(recipe, tmp_path / "run")


def test_a_split_that_is_not_there(recipe, tmp_path) -> None:
    splits = "tasks.numbers.source.splits={train='training',dev='validation'}"
    with pytest.raises(InputError, match="cannot load split training"):
        train(recipe, tmp_path / "run", splits)
    assert not (tmp_path / "run").exists()


REFUSED = {
    "max_steps: numbers is a stream, whose examples are not counted, so it has no epochs; say": (
        "max_steps=0",
    ),
    "max_train_examples: numbers is a stream": ("max_train_examples=5",),
    "sampling_alpha: numbers is a stream": (*WITH_SST, "sampling_alpha=0.5"),
    "task_schedule = sampled: numbers is a stream": (*WITH_SST, "task_schedule=sampled"),
    "task_schedule = annealed: numbers is": (*WITH_SST, "task_schedule=annealed"),
    "task_schedule = sequential: numbers is": (*WITH_SST, "task_schedule=sequential"),
    "task_schedule = round_robin: numbers": (*WITH_SST, "task_schedule=round_robin"),
    "balance = proportional: numbers is a": (*WITH_SST, "balance=proportional"),
    "tasks.numbers.first_n: numbers is a": ("tasks.numbers.first_n=5",),
    "tasks.numbers.class_weights: numbers is": ("tasks.numbers.class_weights=balanced",),
    "freeze_encoder: the encoder's states are": ("freeze_encoder=true",),
    "execution = graphs: the shapes of": ("execution=graphs",),
    "execution = compiled_graphs: the shapes": ("execution=compiled_graphs",),
    "objectives.lm.sentences_of: numbers is a stream, whose texts": (
        "train=['numbers','lm']",
        "objectives.lm.kind=masked_lm",
    ),
    "phases.one.max_steps: numbers is a stream": ("max_steps=0", "phases={one={lr=1e-3}}"),
    "splits.train: train[:5] is a slice, which cannot be streamed; name a whole split": (
        "tasks.numbers.source.splits={train='train[:5]',dev='validation'}",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_streams_cannot_have_is_refused_before_they_are_read(tmp_path, message) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "nowhere"))
    with pytest.raises(InputError) as error:
        recipes.load(str(path), REFUSED[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_stream_can_have_is_not_refused(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "nowhere"))
    allowed = (
        *("freeze_encoder=true", "adapter_width=8", "execution=compile", "epochs=3"),
        *("tasks.numbers.label_smoothing=0.1", "tasks.numbers.batch_size=3"),
    )
    loaded = recipes.load(str(path), allowed)
    assert loaded.streamed == ("numbers",)


@pytest.mark.parametrize("name", ["shuffle_buffer_size", "buffer_size"])
def test_names_of_others_for_the_buffer(tmp_path, name) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    with pytest.raises(InputError, match="shuffle_buffer"):
        recipes.load(str(path), [f"tasks.numbers.source.{name}=5"])
