"""The example runs on a tiny model, and puts back what it replaced."""

import math

import pytest

from examples.finetune_transformers import main


# The Trainer warns of what its own libraries deprecate.
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_trains_on_our_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    scores = main(["--steps", "3"])
    assert 0 < scores["eval_loss"] < 2 * math.log(2)
    printed = capsys.readouterr().out
    assert "attention=('', 'bert')" in printed
    assert "bert.encoder.layer.1.output.LayerNorm" in printed
