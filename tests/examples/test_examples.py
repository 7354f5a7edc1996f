"""The examples run, learn, and do what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import (
    finetune_sentence_transformers,
    pcgrad_ddp,
    pcgrad_lightning,
    pcgrad_loop,
    pcgrad_sentence_transformers,
    pcgrad_transformers_trainer,
    three_tasks,
)

from ..conftest import REPOSITORY

# The trainers warn of what their own libraries deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_pcgrad_in_a_loop_learns() -> None:
    totals = pcgrad_loop.main(["--steps", "12"])
    assert sum(totals[-3:]) < sum(totals[:3])


def test_three_tasks_in_one_packed_pass_learn() -> None:
    totals = three_tasks.main(["--steps", "15"])
    assert sum(totals[-3:]) < sum(totals[:3])


def test_pcgrad_in_lightning_is_the_same_training() -> None:
    """Packed batches on an accelerated model, to rounding."""
    totals = pcgrad_lightning.main(["--steps", "5"])
    assert totals == pytest.approx(pcgrad_loop.main(["--steps", "5"]), rel=1e-5)


def test_pcgrad_in_transformers_trainer_learns() -> None:
    logged = pcgrad_transformers_trainer.main(["--steps", "15"])
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {"loss_sst", "loss_quora", "loss_sts"} <= logged[0].keys()


def test_pcgrad_in_sentence_transformers_learns() -> None:
    logged = pcgrad_sentence_transformers.main(["--steps", "20"])
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {"loss_scored", "loss_asked"} <= logged[0].keys()


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let an Accelerator have settings of its own, which a process keeps for all of them."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pcgrad_in_accelerate_learns(precision: str) -> None:
    from examples import pcgrad_accelerate

    totals = pcgrad_accelerate.main(["--steps", "8", "--precision", precision])
    assert len(totals) == 16
    assert sum(totals[-4:]) < sum(totals[:4])


def test_sentence_transformers_trains_on_our_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    scores = finetune_sentence_transformers.main(["--steps", "40"])
    assert scores["pearson_cosine"] > 0.3
    printed = capsys.readouterr().out
    assert "attention=('0.model',)" in printed
    assert "encoder.layer.1.output.LayerNorm" in printed


# ---- on two processes ----------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "127.0.0.1:0"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
ACCELERATE += ["--config_file", "examples/accelerate_two_processes.yaml"]
ON_CPU = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
ON_TWO = {
    "pcgrad_ddp": (TORCHRUN, ["--steps", "8"]),
    "pcgrad_fsdp": (TORCHRUN, ["--steps", "8"]),
    "pcgrad_accelerate": (ACCELERATE, ["--steps", "4"]),
    "pcgrad_lightning": ([], ["--steps", "8", "--devices", "2"]),
    "pcgrad_transformers_trainer": (TORCHRUN, ["--steps", "10"]),
    "pcgrad_sentence_transformers": (TORCHRUN, ["--steps", "10"]),
}


@pytest.mark.parametrize("example", ON_TWO)
def test_examples_on_two_processes_learn_the_same_weights(example: str, tmp_path: Path) -> None:
    launcher, arguments = ON_TWO[example]
    command = [sys.executable, *launcher, "-m", "tests.examples.on_rank", example, str(tmp_path)]
    ended = subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=os.environ | ON_CPU,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    if example == "pcgrad_ddp":  # torch hangs now and then where one is left
        assert first["wrapped"] == second["wrapped"] == [0]
    if isinstance(first["returned"][0], dict):  # logged by a trainer, of all ranks
        losses = [entry["loss"] for entry in first["returned"]]
        assert losses == [entry["loss"] for entry in second["returned"]]
        assert losses[-1] < losses[0]
    else:
        totals = [sum(pair) for pair in zip(first["returned"], second["returned"], strict=True)]
        assert sum(totals[-3:]) < sum(totals[:3])


def test_ddp_trains_as_one_process_does() -> None:
    """Without torchrun, to the bit; with it, see tests/kernels/distributed."""
    assert pcgrad_ddp.main(["--steps", "2"]) == pcgrad_loop.main(["--steps", "2"])
