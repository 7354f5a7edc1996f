"""What a run does when numbers, memory or other ranks fail it."""

import json
import signal
import time

import pytest
import torch

from engine.errors import InputError
from engine.multitask.step import MultitaskStep
from engine.run import open_run
from engine.runtime.failure import memory_explained
from engine.train import main

from ..engine.conftest import TINY, tiny_run  # noqa: F401 (a fixture)
from .launch import start


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tiny_run, tmp_path):  # noqa: F811
    """At such a rate the first update leaves weights with which nothing is finite."""
    settings = ("lr=1e38", "schedule=constant", "warmup=0", "max_skipped=3", "epochs=20")
    with pytest.raises(InputError, match=r"not finite in 3 steps in a row, from step 1 on"):
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


def test_skipped_steps_count_where_epochs_are_shorter_than_a_block(tiny_run):  # noqa: F811
    settings = ("lr=1e38", "schedule=constant", "warmup=0", "max_skipped=3", "epochs=20")
    with pytest.raises(InputError, match=r"not finite in [34] steps in a row, from step 1 on"):
        tiny_run("run", settings=(*settings, "log_every=10"))


def test_a_few_skipped_steps_do_not_end_a_run(tiny_run, monkeypatch):  # noqa: F811
    run = MultitaskStep.__call__

    def spoilt(self, batch, step, lr):
        if step in (1, 2, 4):
            batch[0].labels[2].fill_(torch.nan)
        return run(self, batch, step, lr)

    monkeypatch.setattr(MultitaskStep, "__call__", spoilt)
    folder = tiny_run("run", settings=("max_skipped=3",))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0, 1, 0]
    assert lines[1]["losses"]["sts"] is None


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


def test_a_model_that_memory_does_not_suffice_for(tiny_run):  # noqa: F811
    settings = ("encoder.hidden_size=1000000000", "encoder.num_attention_heads=1")
    with pytest.raises(InputError, match="out of memory: take a smaller encoder"):
        tiny_run("run", settings=settings)


def test_a_run_of_fewer_steps_than_it_has_is_done(tiny_run):  # noqa: F811
    folder = tiny_run("run", "--max-steps", "4")
    tiny_run("run", "--resume", "--max-steps", "3")
    assert open_run(folder).checkpoints.progress().step == 4


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
    tiny_run("run", "--resume", "--max-steps", "1")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        tiny_run("other", "--resume", "--max-steps", "1")


def test_a_rank_that_hangs_is_named_and_the_run_goes_on_later(tmp_path):
    """Killed ranks, whose connections break at once, are in tests/faults."""
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
