"""A run's memory in parts: counted from its tensors, and beside what the system saw."""

import json
import mmap
import re
import weakref
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from engine import evaluate
from engine.config import recipe as recipes
from engine.runs.run import begin
from engine.runtime.live_bytes import LiveBytes
from engine.train import main, train_run
from engine.training import memory_parts
from engine.training.build import build_trainer
from engine.training.memory_parts import (
    MemoryMeter,
    gradients_of,
    moments_of,
    most_tokens,
    rows_of,
    weights_of,
)
from engine.utils.memory import (
    peak_resident_memory,
    resident_memory,
    resident_of_files,
    restart_peak,
)

from ..conftest import SHORT, TINY
from ..models.encoder_cases import write_folder
from ..models.test_lora import BERT
from ..test_phases import PHASES, cut_at
from ..whole_runs import assert_same_run, written_scores

CPU = torch.device("cpu")
MIB = 1 << 20
LORA = ("lora_rank=3", "lora_alpha=6")
PARTS = [f"{name}_bytes" for name in memory_parts.MemoryParts.__dataclass_fields__]
MEASURED = [
    "process_predicted_peak_bytes",
    "process_measured_peak_bytes",
    "process_explained_share",
    "process_explained_share_of_training",
]


def new_trainer(folder: Path, *settings: str):
    if LORA[0] not in settings:
        return build_trainer(begin(recipes.load("demo", [*TINY, *settings]), folder), CPU)
    init = write_folder(BERT, folder.with_name("model"))
    recipe = recipes.load("demo", [*SHORT, f"init={init}", *settings])
    return build_trainer(begin(recipe, folder), CPU)


def memory_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["memory"]


def storages_in(value: object, found: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes of all storages reachable from an object, found without the module under test."""
    if id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for further in (value.grad,):
            storages_in(further, found, seen)
    elif isinstance(value, dict):
        for each in value.items():
            storages_in(each, found, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            storages_in(each, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        storages_in(vars(value), found, seen)
    return found


SETTINGS = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    "averaged": ("ema_decay=0.9", "precision=bf16"),
    "frozen": ("freeze_encoder=true", "precision=bf16"),
    "adapters": ("adapter_width=8", "freeze_encoder=true"),
    "LoRA": LORA,
    "turns": ("task_schedule=cycle",),
    "LAMB": ("optimizer=lamb",),
    "torch": ("optimizer=torch.Adam",),
    "sgd": ("optimizer=sgd", "momentum=0.9"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_weights_gradients_and_moments_are_the_bytes_of_all_storages(tmp_path, settings):
    """Nothing large that model, parameters and optimizer hold is missing or counted twice."""
    trainer = new_trainer(tmp_path / "run", *settings)
    with trainer.loader(0) as loader:
        trainer.step([next(iter(loader))], 0, 1e-3)
    held = [trainer.model, trainer.parameters, trainer.optimizer, trainer.step.average]
    found = storages_in(held, {}, set())
    parts = weights_of(trainer) | gradients_of(trainer) | moments_of(trainer)
    missing = {at: size for at, size in found.items() if at not in parts and size > 4096}
    assert not missing
    assert {at: size for at, size in found.items() if at in parts} == {
        at: size for at, size in parts.items() if at in found
    }
    weights, gradients = weights_of(trainer), gradients_of(trainer)
    assert not weights.keys() & gradients.keys()
    parts_told = MemoryMeter(CPU).predict(trainer)
    assert parts_told.weights == sum(weights.values())
    assert parts_told.gradients == trainer.parameters.rows.nbytes
    assert parts_told.moments == sum(
        size for at, size in moments_of(trainer).items() if at not in weights
    )
    saved = trainer.state.tensors()
    assert parts_told.checkpoint == sum(tensor.nbytes for tensor in saved.values())


def test_fp32_weights_count_once_and_bf16_twice(tmp_path):
    numel = {}
    for precision in ("fp32", "bf16"):
        trainer = new_trainer(tmp_path / precision, f"precision={precision}")
        numel[precision] = sum(weights_of(trainer).values())
        count = trainer.parameters.numel
        assert trainer.optimizer.vectors.keys() == {"exp_avg", "exp_avg_sq"}
        assert sum(moments_of(trainer).values()) - 8 * count < 64  # the count of updates
    assert numel["bf16"] - numel["fp32"] == 2 * count


def test_parts_add_up(tmp_path):
    trainer = new_trainer(tmp_path / "run")
    parts = MemoryMeter(CPU).predict(trainer)
    sizes = asdict(parts)
    assert all(type(size) is int and size >= 0 for size in sizes.values())
    del sizes["mapped_rows"]
    assert sizes["activations"] == 0, "no step was trained"
    assert parts.total == sum(sizes.values()) == parts.on_host + parts.on_device


def test_live_bytes_are_those_that_the_forward_pass_saves(tmp_path):
    trainer = new_trainer(tmp_path / "run", "batch_size=64")
    with trainer.loader(0) as loader:
        batch = next(iter(loader))
    before = weights_of(trainer) | memory_parts.storages(batch.tensors)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = trainer.step.forward_losses([batch])
    kept = sum(saved.values())
    del losses
    with LiveBytes() as counted:
        losses = trainer.step.forward_losses([batch])
        # Besides what is saved: buffers of modules, the losses.
        assert kept <= counted.live <= 1.1 * kept
        del losses
    assert counted.peak >= counted.live

    meter = MemoryMeter(CPU)
    with meter.step(trainer, [batch]):
        trainer.step([batch], 0, 1e-3)
    activations = meter.predict(trainer).activations
    # One layer and 32 columns: gradients of a layer are a large share of what five layers save.
    assert kept <= activations * batch.num_tokens / most_tokens(trainer) <= 2 * kept


def test_live_bytes_count_storages_once_and_forget_freed_ones():
    outside = torch.ones(1000)
    with LiveBytes() as counted:
        made = outside + 1
        view = made[:10].view(5, 2)
        outside.add_(1)
        assert counted.live == 4000
        del made
        assert counted.live == 4000  # the view holds it
        del view
        assert counted.live == 0
        twice = (outside * 2).square()
    assert counted.peak == 8000
    del twice  # after the end nothing is counted
    assert counted.live == 4000


def test_counting_changes_no_bit(tmp_path):
    weights = []
    for number in range(2):
        trainer = new_trainer(tmp_path / str(number), "dropout=0.1")
        meter = MemoryMeter(CPU)
        with trainer.loader(0) as loader:
            for step, batch in zip(range(3), loader, strict=False):
                if number:
                    trainer.step([batch], step, 1e-2)
                else:
                    with meter.step(trainer, [batch]):
                        trainer.step([batch], step, 1e-2)
        weights.append(trainer.parameters.master.clone())
    assert torch.equal(*weights)


def test_the_largest_batch_counts(tmp_path):
    trainer = new_trainer(tmp_path / "run")
    batch = SimpleNamespace(num_tokens=100)
    meter = MemoryMeter(CPU)
    with meter.step(trainer, [batch]):
        kept = torch.zeros(1000)
    measured = kept.nbytes
    with meter.step(trainer, [SimpleNamespace(num_tokens=300)]):
        torch.zeros(1 << 20)  # of later steps only the tokens count
    meter.end_phase(trainer)
    assert meter.report()["activations_bytes"] == 3 * measured


def test_most_tokens_are_those_of_the_largest_step(tmp_path):
    trainer = new_trainer(tmp_path / "run")
    with trainer.loader(0) as loader:
        tokens = [batch.num_tokens for batch in loader]
    assert most_tokens(trainer) == max(tokens)


def test_the_peak_on_a_gpu_is_of_all_parts_of_one_run(monkeypatch):
    """Torch's counter, which another run left high, begins anew with each part."""
    now, peak = 10, 900

    def reset(_device) -> None:
        nonlocal peak
        peak = now

    for name, function in {
        "is_initialized": lambda: True,
        "memory_allocated": lambda _device: now,
        "max_memory_allocated": lambda _device: peak,
        "max_memory_reserved": lambda _device: peak,
        "reset_peak_memory_stats": reset,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    meter = MemoryMeter(torch.device("cuda"))
    with meter._measured("activations"):
        peak = 70
    with meter.evaluation():
        peak = 30
    assert meter._tensors == {"activations": 60, "evaluation": 20}
    assert meter.note_gpu_peaks() == (70, 70)


def test_mapped_rows_are_told_apart(tmp_path):
    trainer = new_trainer(tmp_path / "run")
    before = rows_of(trainer).own
    trainer.samplers[0].batch(0)
    rows = rows_of(trainer)
    splits = [*trainer.train_sets, *trainer.dev_sets.values()]
    mapped = {id(split.tokens): split.tokens.nbytes for split in splits}
    assert rows.mapped >= sum(mapped.values())
    assert all(file.suffix == ".npy" for file in rows.files)
    assert rows.own == before + 4 * len(trainer.samplers[0])  # the order of an epoch
    frozen = new_trainer(tmp_path / "frozen", "freeze_encoder=true")
    states = [each.states for each in [*frozen.train_sets, *frozen.dev_sets.values()]]
    assert rows_of(frozen).own >= sum(array.nbytes for array in states)


@pytest.mark.parametrize(
    "kept", [list, tuple, deque, lambda arrays: dict(enumerate(arrays)), lambda arrays: [[*arrays]]]
)
def test_rows_are_counted_in_any_container(kept):
    arrays = [np.zeros(3), np.zeros(4)]
    held = SimpleNamespace(train_sets=kept(arrays), dev_sets={}, samplers=[arrays[0][1:]])
    assert rows_of(held).own == 7 * 8


def test_the_system_tells_pages_of_files_and_the_peak(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros(4 * MIB, dtype=np.uint8))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    files = {Path(mapped.filename).resolve()}
    before = resident_of_files(files)
    assert mapped.sum() == 0
    assert before < 2 * MIB < 4 * MIB <= resident_of_files(files)
    restart_peak()
    start = sum(resident_memory())
    with mmap.mmap(-1, 64 * MIB) as block:  # new pages: malloc may hand out resident ones
        block.write(b"\1" * len(block))
        assert peak_resident_memory() > start + 60 * MIB


def test_of_all_examples_there_is_no_list(tmp_path):
    """An order takes 4 bytes for each, and nothing else of a table grows with its rows."""
    trainer = new_trainer(tmp_path / "run", "max_train_examples=0")
    assert rows_of(trainer).own == 0
    trainer.samplers[0].batch(0)
    assert rows_of(trainer).own == 4 * len(trainer.train_sets[0])


KINDS = {
    "plain": (),
    "frozen encoder": ("freeze_encoder=true",),
    "phases": PHASES,
    "micro-batches": ("micro_batches=2",),
    "recomputed layers": ("checkpoint_layers=true",),
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_metrics_have_the_parts_and_what_the_system_saw(tiny_run, settings):
    memory = memory_of(tiny_run("run", settings=settings))
    assert [*memory] == [*(["phase"] if settings == PHASES else []), *PARTS, *MEASURED]
    assert all(type(size) is int for name, size in memory.items() if name.endswith("_bytes"))
    assert all(memory[name] > 0 for name in PARTS)
    shared = memory["mapped_rows_bytes"] + min(
        memory["activations_bytes"], memory["evaluation_bytes"]
    )
    total = memory["process_predicted_peak_bytes"]
    assert total == sum(memory[name] for name in PARTS) - shared
    share = total / memory["process_measured_peak_bytes"]
    assert memory["process_explained_share"] == pytest.approx(share, abs=1e-4)
    assert 0.5 < share < 1.5
    if settings == PHASES:
        assert memory["phase"] == "all"  # of the larger sum: its encoder is trained


def test_a_resumed_run_tells_its_own_memory(tiny_run, monkeypatch):
    whole = tiny_run("whole")
    cut_at(3, monkeypatch, lambda: tiny_run("cut"))
    assert "memory" not in json.loads((whole.parent / "cut/metrics.json").read_text())
    resumed = tiny_run("cut", "--resume")
    assert_same_run(resumed, whole)
    assert memory_of(resumed).keys() == memory_of(whole).keys()
    assert memory_of(resumed)["weights_bytes"] == memory_of(whole)["weights_bytes"]


def test_a_run_that_stops_before_its_scores_has_no_metrics_yet(tmp_path):
    run = begin(recipes.load("demo", TINY), tmp_path / "run")
    for steps, is_there in ((1, False), (2, True)):
        assert train_run(run, CPU, Console(quiet=True), stop_after=steps) is None
        assert (tmp_path / "run/metrics.json").exists() == is_there
    assert memory_of(tmp_path / "run")["activations_bytes"] > 0


def test_other_scores_leave_the_memory(tiny_run):
    folder = tiny_run("run")
    memory = memory_of(folder)
    assert evaluate.main([str(folder), "--split", "train"]) == 0
    assert written_scores(folder)["split"] == "train"
    assert memory_of(folder) == memory


def test_a_dry_run_predicts_what_the_run_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "run", "--dry-run", "--set", *TINY]) == 0
    text = capsys.readouterr().out
    labels = {
        "process_bytes": "the process itself, and libraries",
        "weights_bytes": "weights, with copies",
        "gradients_bytes": "gradients",
        "moments_bytes": "moments",
        "activations_bytes": "activations of the largest batch",
        "evaluation_bytes": "evaluation",
        "checkpoint_bytes": "copy for a checkpoint",
    }
    told = {
        name: float(re.search(rf"│ {label} +│ ([\d.,]+) MiB", text)[1].replace(",", ""))
        for name, label in labels.items()
    }
    assert "rows of the data (" in text
    assert "the whole process, at the peak of these steps" in text
    total = float(re.search(r"│ sum \(\w+ or \w+\) +│ ([\d.,]+) MiB", text)[1].replace(",", ""))
    larger = max(told["activations_bytes"], told["evaluation_bytes"])
    smaller = min(told["activations_bytes"], told["evaluation_bytes"])
    assert total == pytest.approx(sum(told.values()) - smaller, abs=2)  # and rows
    assert larger > 0
    assert main(["demo", "--out", "run", "--set", *TINY]) == 0
    memory = memory_of(tmp_path / "run")
    for name in ("weights", "gradients", "moments", "checkpoint"):
        assert told[f"{name}_bytes"] == pytest.approx(memory[f"{name}_bytes"] / MIB, abs=0.06)
    for name in ("activations", "evaluation"):
        found = memory[f"{name}_bytes"] / MIB
        assert told[f"{name}_bytes"] == pytest.approx(found, rel=0.25, abs=0.06)


def test_runs_without_scores_tell_their_memory(tmp_path):
    text = tmp_path / "text.txt"
    words = ["film", "plot", "house", "garden", "music", "year", "river", "summer", "winter", "day"]
    lines = [f"The {one} was as good as the {other}." for one in words for other in words]
    text.write_text("\n".join(lines))
    settings = ["objectives.lm.kind=masked_lm", f"objectives.lm.files=['{text}']", "train=['lm']"]
    command = ["demo", "--out", str(tmp_path / "run"), "--max-steps", "2", "--set", *TINY]
    assert main([*command, *settings]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text()).keys() == {"memory"}
    assert memory_of(tmp_path / "run")["evaluation_bytes"] == 0


def test_lora_keeps_few_moments_and_all_weights(tmp_path):
    trainer = new_trainer(tmp_path / "lora", *LORA)
    parts = MemoryMeter(CPU).predict(trainer)
    trained = trainer.parameters.numel
    assert 8 * trained <= parts.moments <= 8 * trained + 64
    frozen = sum(tensor.nbytes for tensor in trainer.parameters.frozen.values())
    assert frozen > parts.moments
    assert parts.weights >= frozen + 4 * trained


def test_a_phase_is_built_when_the_one_before_is_freed(tiny_run, monkeypatch):
    from engine import train as program

    built, alive = [], []

    def build(*arguments, **settings):
        alive.extend(gradients() is not None for gradients in built)
        trainer = build_trainer(*arguments, **settings)
        built.append(weakref.ref(trainer.parameters.rows))
        return trainer

    monkeypatch.setattr(program, "build_trainer", build)
    tiny_run("run", "--max-steps", "1", settings=PHASES)
    assert alive == [False]
