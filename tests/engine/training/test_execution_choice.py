"""Recording or compiling that is impossible is refused by name, before anything is trained."""

from pathlib import Path

import pytest
import torch

from engine.config import recipe as recipes
from engine.distributed.ranks import Ranks
from engine.runs import run as runs
from engine.runtime.execution import EXECUTIONS
from engine.training.build import build_trainer, execution_kind
from engine.training.trainer import Trainer
from engine.utils.errors import InputError

GPU, ALONE, TWO = torch.device("cuda"), Ranks(), Ranks(rank=0, size=2)


def build(folder: Path, *settings: str) -> Trainer:
    recipe = recipes.load("demo", ["max_steps=2", *settings])
    return build_trainer(runs.begin(recipe, folder), torch.device("cpu"))


@pytest.mark.parametrize("ranks", [ALONE, TWO])
def test_a_gpu_records_eager_code_unless_it_is_told_otherwise(ranks: Ranks) -> None:
    assert execution_kind(recipes.load("demo", []), GPU, ranks) == "graphs"
    assert execution_kind(recipes.load("demo", []), torch.device("cpu"), ranks) == "eager"
    asked = [kind for kind in EXECUTIONS if kind != "auto"]
    if ranks.size > 1:
        asked = ["eager", "graphs"]
    for kind in asked:
        assert execution_kind(recipes.load("demo", [f"execution={kind}"]), GPU, ranks) == kind


@pytest.mark.parametrize("kind", ["compile", "compiled_graphs"])
def test_several_ranks_do_not_compile(kind: str) -> None:
    recipe = recipes.load("demo", [f"execution={kind}"])
    with pytest.raises(InputError, match=f"execution = {kind}: several ranks do not compile"):
        execution_kind(recipe, GPU, TWO)


def test_objectives_of_several_ranks_are_not_recorded() -> None:
    text = ["objectives.text.kind=masked_lm", "train=['sst','text']"]
    assert execution_kind(recipes.load("demo", text), GPU, TWO) == "eager"
    assert execution_kind(recipes.load("demo", text), GPU, ALONE) == "graphs"
    with pytest.raises(InputError, match=r"execution = graphs: batches of objectives differ"):
        execution_kind(recipes.load("demo", [*text, "execution=graphs"]), GPU, TWO)


def test_torchs_optimizers_are_not_recorded() -> None:
    assert execution_kind(recipes.load("demo", ["optimizer=sgd"]), GPU, ALONE) == "eager"
    recipe = recipes.load("demo", ["optimizer=torch.Adam", "execution=graphs"])
    with pytest.raises(InputError, match=r"execution = graphs: torch's optimizers wait for"):
        execution_kind(recipe, GPU, ALONE)


def test_what_waits_for_the_device_is_not_recorded(tmp_path: Path) -> None:
    pytest.importorskip("torchjd")
    torchjd = "balance=torchjd.MeanWeighting"
    assert build(tmp_path / "auto", torchjd).step.execution.kind == "eager"
    with pytest.raises(InputError, match=r"execution = graphs: apex's .* wait for the device"):
        build(tmp_path / "graphs", torchjd, "execution=graphs")
