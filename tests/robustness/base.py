"""The start of every case: a small corpus, a run on it, a series, a model folder, papers.json."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from engine import evaluate, export, fill, predict, report, sweep, train
from engine.config import recipe as recipes
from engine.runs.data_paths import data_folder

PROGRAMS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "report": report,
    "sweep": sweep,
    "fill": fill,
}

RECIPE = "cgs"
TINY = (
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "precision=fp32"),
    *("batch_size=8", "micro_batches=1", "checkpoint_every=1", "log_every=1"),
)
_LINES = 30
"""Of each file of the small corpus."""


class Base(NamedTuple):
    """Where it lies.

    Attributes:
        data: the corpus.
        run: of two steps.
        series: of two seeds.
        model: the run, exported.
        papers: the outcomes of the run.
        rows: sentences to predict.
    """

    data: Path
    run: Path
    series: Path
    model: Path
    papers: Path
    rows: Path

    @classmethod
    def make(cls, folder: Path) -> "Base":
        """Make everything in this process, which loads what its children need later."""
        torch.set_num_threads(1)  # children are forked, and OpenMP's threads are not
        folder.mkdir()
        base = cls(
            *(folder / name for name in ("data", "run", "series", "model")),
            folder / "papers" / "papers.json",
            folder / "rows.tsv",
        )
        base.data.mkdir()
        for path in data_folder(recipes.load("demo")).iterdir():
            lines = path.read_bytes().splitlines(keepends=True)
            (base.data / path.name).write_bytes(b"".join(lines[:_LINES]))
        base.rows.write_text("id\tsentence\n1\ta fine film\n2\tdull\n")
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(base.training(base.run))
            train.main([*base.training(base.series, "seed=3"), "--seeds", "2"])
            evaluate.main([str(base.run), "--device", "cpu"])
            export.main([str(base.run), "--to", str(base.model)])
            report.main([str(base.run), "--papers", "--out", str(base.papers.parent)])
        return base

    def training(self, out: Path, *settings: str, steps: int = 2) -> list[str]:
        """Return the arguments that train a small run."""
        options = ["--data", str(self.data), "--out", str(out), "--device", "cpu"]
        return [RECIPE, *options, "--max-steps", str(steps), "--set", *TINY, *settings]

    def copy_run(self, to: Path) -> Path:
        """Return a copy of the run."""
        return Path(shutil.copytree(self.run, to))
