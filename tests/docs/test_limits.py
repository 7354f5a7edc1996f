"""What the page says is refused is refused, in the words that it gives; fields are there or not."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from engine import train
from engine.cli.help import recipe_fields
from engine.config import recipe as recipes
from engine.exporting import folder as export_folder
from engine.utils.errors import InputError
from kernels import TaskGradients
from kernels.distributed import wrappers
from tests.docs.pages import Page

PAGE = Page("limits")
FIELDS = {field.key for field in recipe_fields()}
ROWS = {
    row[0]: row
    for row in re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", PAGE.text, re.MULTILINE)
    if row[0] not in ("asked for", "---")
}


def row_of(begin: str) -> tuple[str, str, str]:
    """The row about something: what is asked for, state, way round."""
    (found,) = [row for asked, row in ROWS.items() if asked.startswith(begin)]
    return found


def quoted(begin: str) -> list[str]:
    """The messages that the state of a row quotes."""
    return re.findall(r"`([^`]*[ :][^`]*)`", row_of(begin)[1])


def refused(*arguments: str) -> str:
    """The one line about a run of the demo that cannot be."""
    with pytest.raises(InputError) as error:
        train.main(["demo", *arguments])
    (line,) = str(error.value).splitlines()
    return line


def small_model(folder: Path, kind: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return str(folder)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "deberta-v2", "mpnet", "albert"])
def test_models_of_other_types(tmp_path: Path, kind: str) -> None:
    line = refused("--init", small_model(tmp_path / kind, kind), "--dry-run")
    (shown,) = quoted("T5")
    assert shown.removesuffix("…").replace("t5", kind) in line


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ("other schedules", ["schedule=onecycle"]),
        ("a loss of your own", ["tasks.sst.loss=dice"]),
        ("LBFGS", ["optimizer=torch.Muon"]),
        ("LBFGS", ["optimizer=torch.SparseAdam", "weight_decay=0"]),
        ("LBFGS", ["optimizer=torch.LBFGS", "weight_decay=0"]),
        ("int8", ["precision=fp8"]),
        ("MLflow", ['loggers=["mlflow"]']),
        ("freeze the first", ["freeze_layers=4"]),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, asked: str, settings: list[str]) -> None:
    line = refused("--out", str(tmp_path / "run"), "--set", *settings, "--dry-run")
    name = settings[0].split("=")[0]
    assert name.removeprefix("torch.") in line
    state = row_of(asked)[1]
    for value in re.findall(r"'(\w+)'", line.partition("Input should be")[2]):
        assert not quoted(asked) or value in state
    if asked == "a loss of your own":
        assert len(re.findall(r"'\w+'", line.partition("Input should be")[2])) == 5
        assert "five" in state


def test_resuming_with_other_settings(tmp_path: Path) -> None:
    small = ["encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=64"]
    out = ["--out", str(tmp_path / "run"), "--max-steps", "1", "--set", *small]
    assert train.main(["demo", *out]) == 0
    line = refused(*out, "lr=1", "--resume")
    assert quoted("resume with other")[0] in line


@pytest.mark.parametrize("device", ["mps", "xpu", "xla"])
def test_other_devices(device: str) -> None:
    (shown,) = quoted("AMD")
    assert refused("--device", device) == shown.replace("mps", device)


@pytest.mark.parametrize(
    "layer",
    [torch.nn.BatchNorm1d(4), torch.nn.Conv1d(4, 4, 1), torch.nn.LSTM(4, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_a_joined_batch(layer: torch.nn.Module) -> None:
    gradients = TaskGradients(torch.nn.Sequential(layer), num_tasks=2)
    inputs = torch.randn(4, 4, 1) if isinstance(layer, torch.nn.Conv1d) else torch.randn(4, 4)
    with pytest.raises(NotImplementedError) as error, gradients.batch([2, 2]):
        layer(inputs)
    for words in quoted("BatchNorm")[0].split("…"):
        assert words.strip(" ,") in str(error.value)


def test_wrappers_that_are_refused() -> None:
    source = inspect.getsource(wrappers.find_wrappers)
    assert "(FSDP1)" in source
    assert "DeepSpeed ZeRO-3" in source
    assert "adapter_width" in row_of("export of a run")[0]
    assert "trained with adapter_width" in inspect.getsource(export_folder)


def test_fields_that_are_named_exist() -> None:
    named = {"class_weights", "focal_gamma", "label_smoothing"}
    assert {f"tasks.NAME.{name}" for name in named} <= FIELDS
    words = set(re.findall(r"`(\w+)`", PAGE.text))
    fields = {"freeze_encoder", "layer_lr_decay", "lora_rank", "max_length", "phases"}
    assert fields <= words & FIELDS
    assert {"patience", "average_best", "ema_decay", "distribute"} <= FIELDS
    recipe = recipes.load("demo")
    assert recipe.distribute == "sharded"
    assert not [name for name in FIELDS if re.search("distill|crf|quant|freeze_layers", name)]
