"""Small runs on the demo corpus."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.train import main

from .small_models import make_batch, make_model  # noqa: F401 (fixtures)

SHORT = [
    "max_train_examples=64",  # two steps an epoch
    "epochs=3",
    "log_every=1",
    "precision=fp32",  # what the tests compare must not depend on the machine's instructions
]
"""Of a run with ``--init``, whose encoder has a shape of its own."""

TINY = [
    "encoder.hidden_size=32",
    "encoder.num_hidden_layers=1",
    "encoder.num_attention_heads=2",
    "encoder.intermediate_size=48",
    "encoder.vocab_size=256",
    *SHORT,
]


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny demo run in ``tmp_path / name``; return its folder."""

    def run(
        name: str, *arguments: str, recipe: str = "demo", settings: tuple[str, ...] = ()
    ) -> Path:
        folder = tmp_path / name
        status = main([recipe, "--out", str(folder), *arguments, "--set", *TINY, *settings])
        assert status == 0
        return folder

    return run
