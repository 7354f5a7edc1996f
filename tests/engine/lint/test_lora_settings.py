"""Settings of low-rank updates: what has an effect changes training, what has none is said."""

from pathlib import Path

import pytest

from ..models.encoder_cases import write_folder
from ..models.test_lora import BERT
from .test_idle_settings import (
    attempt,
    few_examples,  # noqa: F401 (a fixture of whole files)
    same,
)

LORA = ("lora_rank=2", "lr=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The settings of a small pretrained model."""
    folder: Path = write_folder(BERT, tmp_path_factory.mktemp("base") / "model")
    config = BERT.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shape = [f"encoder.{name}={getattr(config, name)}" for name in names]
    return (f"init={folder}", *shape)


@pytest.mark.parametrize(
    ("settings", "override"),
    [
        ((), "lora_rank=2"),
        (LORA, "lora_rank=3"),
        (LORA, "lora_alpha=2"),
        (LORA, "lora_dropout=0.5"),
        (LORA, "lora_targets=['output']"),
        (LORA, "freeze_encoder=true"),
        (LORA, "layer_lr_decay=0.5"),
        (LORA, "balance=mgda"),
        (LORA, "encoder.hidden_dropout_prob=0.5"),
    ],
)
def test_what_has_an_effect_changes_training(base, settings, override):
    before, after = attempt(*base, *settings), attempt(*base, *settings, override)
    assert not same(before.outcome, after.outcome)
    key = override.partition("=")[0]
    assert not any(line.startswith(f"{key} = ") for line in after.lines)


@pytest.mark.parametrize(
    ("settings", "override", "reason"),
    [
        ((), "lora_alpha=2", "no low-rank update is trained"),
        ((), "lora_dropout=0.5", "no low-rank update is trained"),
        ((), "lora_targets=['output']", "no low-rank update is trained"),
        ((*LORA, "freeze_encoder=true"), "lora_alpha=2", "no low-rank update is trained"),
        ((*LORA, "freeze_encoder=true"), "lora_dropout=0.5", "no low-rank update is trained"),
    ],
)
def test_what_has_no_effect_is_said_and_changes_nothing(base, settings, override, reason):
    before, after = attempt(*base, *settings), attempt(*base, *settings, override)
    key = override.partition("=")[0]
    (line,) = (line for line in after.lines if line.startswith(f"{key} = "))
    assert line.endswith(f": no effect, {reason}")
    assert same(before.outcome, after.outcome)


def test_the_rank_of_a_frozen_encoder(base):
    said = attempt(*base, "lora_rank=2", "freeze_encoder=true").lines
    assert (
        "lora_rank = 2: no effect, freeze_encoder leaves the updates at their beginning, zero"
        in (said)
    )
