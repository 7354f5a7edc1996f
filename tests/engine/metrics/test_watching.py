"""Metrics that a run writes as it trains, and where else they appear."""

import io
import json
import re
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.errors import CommError, UsageError

from engine.cli.progress import ProgressBar
from engine.metrics.log import MetricsLog
from engine.runtime.gpu import GpuMeter
from engine.train import main
from engine.utils.errors import InputError

from ..conftest import TINY
from ..whole_runs import written_scores

PAIRS = ["/".join(pair) for pair in combinations(("sst", "quora", "sts"), 2)]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_progress_shows_everything_on_a_narrow_terminal():
    seconds = 0.0
    terminal = Console(
        file=io.StringIO(),
        width=80,
        force_terminal=True,
        color_system=None,
        get_time=lambda: seconds,
    )
    tasks = ("reviews", "stars", "duplicates", "similarity", "topics")
    with ProgressBar(terminal, 100, 1330) as bar:
        for steps in (400, 700):
            seconds += 600
            line = {
                "losses": dict.fromkeys(tasks, 1.25) | {"topics": None},
                "conflict_rate": 0.4,
                "tokens_per_s": 12345.6,
            }
            bar.show(steps, line)
    shown = terminal.file.getvalue()
    *_, last = re.findall(r" 700/1330.*", shown)
    assert "conflict 40%  12,346 tokens/s 0:21:00 left" in last  # 630 steps, 2 s each
    for task in tasks[:-1]:
        assert f"{task} 1.250" in shown
    assert "topics not finite" in shown


def test_what_follows_the_progress_in_a_file_begins_a_line():
    console = Console(file=io.StringIO(), width=80)
    with ProgressBar(console, 0, 10) as bar:
        bar.show(10, {"losses": {"sst": 1.5}, "conflict_rate": 0.0, "tokens_per_s": 1.0})
    console.print("dev scores")
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[-2:] == ["losses  sst 1.500", "dev scores"]


def test_every_evaluation_has_a_line(tiny_run):
    folder = tiny_run("run")
    evaluations = lines(folder / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    best = written_scores(folder)
    (of_best,) = [line for line in evaluations if line["step"] == best["step"]]
    assert of_best == best


def test_a_resumed_run_has_every_evaluation_once(tiny_run, monkeypatch):
    whole = tiny_run("whole")
    add = MetricsLog.add

    def crash(log, step, *rest):
        if step == 4:
            raise RuntimeError("power cut")
        return add(log, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run("cut")
    cut = tiny_run("cut", "--resume")
    assert lines(cut / "evaluations.jsonl") == lines(whole / "evaluations.jsonl")


def test_cosines_of_layers(tiny_run):
    folder = tiny_run("run", settings=("log_layer_cosines_every=2", "balance_granularity=layer"))
    steps = lines(folder / "metrics.jsonl")
    assert ["layer_cosines" in line for line in steps] == [True, False] * 3
    layers = steps[0]["layer_cosines"]
    assert list(layers) == ["encoder.embeddings", "encoder.layers.0", "heads.sst", "heads.quora"]
    for cosines in layers.values():
        assert list(cosines) == PAIRS
    # One task alone reaches a head.
    assert set(layers["heads.sst"].values()) == {0.0}
    assert any(layers["encoder.layers.0"].values())
    # What is recorded beside the training does not change it.
    plain = lines(tiny_run("plain", settings=("balance_granularity=layer",)) / "metrics.jsonl")
    assert [line["losses"] for line in plain] == [line["losses"] for line in steps]


def test_the_layers_make_up_the_model(tiny_run):
    """With one layer that holds nearly everything, its cosines are nearly the model's."""
    line = lines(
        tiny_run("run", "--max-steps", "1", settings=("log_layer_cosines_every=1",))
        / "metrics.jsonl"
    )
    of_model, of_layers = line[0]["cosines"], line[0]["layer_cosines"]
    for pair in PAIRS:
        shared = [of_layers[name][pair] for name in ("encoder.embeddings", "encoder.layers.0")]
        # The dot product of all is the sum of those of the parts, the norms are at most theirs.
        assert min(0, *shared) - 1e-6 <= of_model[pair] <= max(0, *shared) + 1e-6


def test_tensorboard_gets_what_the_file_has(tiny_run):
    folder = tiny_run("run", settings=('loggers=["tensorboard"]',))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps = lines(folder / "metrics.jsonl")
    recorded = [(event.step, event.value) for event in events.Scalars("losses/sst")]
    assert recorded == [
        (line["step"], pytest.approx(line["losses"]["sst"], rel=1e-6)) for line in steps
    ]
    assert {f"cosines/{pair}" for pair in PAIRS} <= set(events.Tags()["scalars"])
    scores = [(event.step, event.value) for event in events.Scalars("dev/overall")]
    assert scores == [
        (line["step"], pytest.approx(line["scores"]["overall"], rel=1e-6))
        for line in lines(folder / "evaluations.jsonl")
    ]


# wandb leaves closing some of its streams to the interpreter.
@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(tiny_run):
    folder = tiny_run("run", "--max-steps", "2", settings=('loggers=["wandb_offline"]',))
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for name in (b"losses/sst", b"conflict_rate", b"dev/overall"):
        assert name in content


def test_wandb_gets_the_recipe_and_is_online_unless_told(tiny_run, monkeypatch):
    calls: list[dict] = []
    logged: list[dict] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append({**values, "step": step}), finish=lambda: None
    )
    monkeypatch.setattr("wandb.login", lambda: True)
    monkeypatch.setattr("wandb.init", lambda **options: calls.append(options) or run)
    folder = tiny_run("run", "--max-steps", "1", settings=('loggers=["wandb"]',))
    (options,) = calls
    assert (options["mode"], options["name"], options["dir"]) == ("online", "run", folder)
    assert options["config"]["max_steps"] == 1
    assert logged[0]["losses/sst"] == lines(folder / "metrics.jsonl")[0]["losses"]["sst"]


@pytest.mark.parametrize(("call", "left"), [("login", False), ("init", True)])
@pytest.mark.parametrize("error", [UsageError("no key"), CommError("no host"), ValueError("39")])
def test_wandb_that_lets_nobody_in(tmp_path, monkeypatch, call, left, error):
    def refuse(**options):
        raise error

    monkeypatch.setattr("wandb.login", lambda: True)
    monkeypatch.setattr(f"wandb.{call}", refuse)
    arguments = ["demo", "--out", str(tmp_path / "run"), "--set", *TINY, 'loggers=["wandb"]']
    expected = f"loggers: wandb: {error}; or set loggers=['wandb_offline']"
    with pytest.raises(InputError, match=re.escape(expected)):
        main(arguments)
    assert (tmp_path / "run").exists() == left


def test_a_sink_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.metrics.loggers.find_spec", lambda name: None)
    arguments = ["demo", "--out", str(tmp_path / "run"), "--set", *TINY, 'loggers=["wandb"]']
    with pytest.raises(InputError, match="pip install wandb"):
        main(arguments)
    assert not (tmp_path / "run").exists()


class NotSupportedError(Exception):
    """What the library raises for a sensor that a GPU does not have."""


def fake_nvml() -> SimpleNamespace:
    """Return the functions of pynvml for one GPU that has no sensor for its clocks."""

    def no_sensor(handle, clock):
        raise NotSupportedError

    return SimpleNamespace(
        NVMLError=NotSupportedError,
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlDeviceGetPowerUsage=lambda handle: 412_500,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 7_200_500,
        nvmlDeviceGetTemperature=lambda handle, sensor: {0: 61}[sensor],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 << 30, total=80 << 30),
        nvmlDeviceGetClockInfo=no_sensor,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97, memory=40),
    )


READINGS = {
    "power_w": 412.5,
    "energy_j": 7200.5,
    "temperature_c": 61.0,
    "memory_mib": 3072.0,
    "utilization": 97.0,
}


def test_gpu_readings_leave_out_what_has_no_sensor():
    assert GpuMeter(fake_nvml(), None).read() == READINGS


def test_a_gpu_is_found_by_its_own_number_whatever_is_hidden(monkeypatch):
    asked: list[str] = []
    library = fake_nvml()
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = asked.append
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    meter = GpuMeter.find(torch.device("cuda"))
    assert asked == ["GPU-12-34"]
    assert meter.read() == READINGS

    def no_driver():
        raise NotSupportedError

    library.nvmlInit = no_driver
    assert GpuMeter.find(torch.device("cuda")) is None


def test_gpu_readings_reach_the_file(tiny_run, monkeypatch):
    meter = GpuMeter(fake_nvml(), None)
    monkeypatch.setattr(GpuMeter, "find", lambda device: meter)
    steps = lines(tiny_run("run", settings=("log_every=2",)) / "metrics.jsonl")
    assert [line.get("gpu") for line in steps] == [None, READINGS] * 3


def test_a_cpu_has_no_meter():
    assert GpuMeter.find(torch.device("cpu")) is None
