"""The page on pretraining: its recipes on a small text, and what it says of their runs."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import export, fill, train
from engine.config.recipe import RECIPES
from engine.models.hf_weights import has_weights
from engine.runs.objectives import build_examples
from engine.runs.run import open_run

from ..engine.conftest import SHORT, TINY
from ..engine.models.encoder_cases import write_folder
from ..engine.models.test_lora import BERT
from .pages import Page

transformers = pytest.importorskip("transformers")

PAGE = Page("pretraining")
CONTINUED, PHASES, SIMCSE, SCRATCH = PAGE.blocks("toml")
PROGRAMS = {"train": train.main, "fill": fill.main, "export": export.main}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with what the page names: MODEL, DIR with texts, held-out.txt, the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pretraining"))
        write_folder(BERT, Path("MODEL"))
        Path("DIR").mkdir()
        texts = [f"the film {number} was fine, i saw it {number} times" for number in range(60)]
        Path("held-out.txt").write_text("\n".join(texts[40:]) + "\n")
        Path("DIR/sentences.txt").write_text("\n".join(texts[:40]) + "\n")
        documents = [*texts[:30], " . ".join(texts[30:40])]
        Path("DIR/corpus.txt").write_text("\n".join(documents) + "\n")
        small = CONTINUED.replace("8192", "400").replace("10_000", "60").replace("5e-5", "1e-2")
        Path("pretrain.toml").write_text(small)
        yield


def run(line: str, *more: str) -> None:
    program, *arguments = shlex.split(line.removeprefix("python -m engine."))
    assert PROGRAMS[program]([*arguments, *more]) == 0


def steps_of(run: str) -> list[dict[str, Any]]:
    text = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def pretrained(folder: None) -> dict[str, Any]:
    """All commands of the first part, and the names of its code."""
    first, tasks, filling, exporting = PAGE.commands()
    run(first, "--set", "epochs=100")
    run(tasks, "--max-steps", "2", "--set", *SHORT)
    run(filling)
    run(exporting)
    return PAGE.run_python()


def test_it_learns_the_text(pretrained: dict[str, Any]) -> None:
    lines = steps_of("runs/pretrained")
    losses = [line["losses"]["masked_lm"] for line in lines]
    assert len(losses) == 60
    assert sum(losses[-10:]) < sum(losses[:10])
    tokens = [line["tokens"] for line in lines]
    assert sum(tokens) / len(tokens) == pytest.approx(400, rel=0.2)
    texts = pretrained["texts"]
    assert len(texts) == 20
    after = pretrained["held_out_loss"]("pretrained", texts)
    assert after < pretrained["held_out_loss"]("MODEL", texts)
    assert after < math.log(90)  # the logarithm of the vocabulary's size: chance


def test_sequences_are_filled(pretrained: dict[str, Any]) -> None:
    """Up to the limit of the model, 64; without divide the document would lose its end."""
    run = open_run(Path("runs/pretrained"))
    assert run.max_length == 64
    settings = run.recipe.objectives["masked_lm"]
    texts = Path("DIR/corpus.txt").read_text().splitlines()
    own = [len(run.tokenizer.encode([text], 1 << 20).tokens) - 2 for text in texts]

    def sizes(**changes: Any) -> list[int]:
        changed = settings.model_copy(update=changes)
        made = build_examples("masked_lm", changed, texts, run.tokenizer, run.max_length, 0)
        return made.sizes.tolist()

    filled = sizes()
    assert sum(filled) - 2 * len(filled) == sum(own)
    assert max(filled) <= 64
    assert len(filled) < len(texts)
    alone = sizes(divide=False, join=1)
    assert len(alone) == len(texts)
    assert sum(alone) - 2 * len(alone) < sum(own)


def test_it_begins_from_it_and_from_its_export(
    pretrained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--max-steps", "1", "--set", *SHORT]
    for begin in ("runs/pretrained", "pretrained"):
        assert (
            train.main(
                [
                    *arguments[:1],
                    "--init",
                    begin,
                    "--out",
                    f"from-{Path(begin).parent}",
                    *arguments[1:],
                ]
            )
            == 0
        )
    assert "taken from step 60: tokenizer, encoder" in " ".join(capsys.readouterr().out.split())
    assert has_weights(Path("pretrained"))


def test_pretraining_and_tasks_in_one_recipe() -> None:
    demo = (RECIPES / "demo.toml").read_text(encoding="utf-8")
    Path("both.toml").write_text(f"{demo}\n{PHASES}", encoding="utf-8")
    small = ["--max-steps", "2", "--set", *TINY]
    assert train.main(["both.toml", "--out", "runs/both", *small]) == 0
    lines = steps_of("runs/both")
    assert [[*line["losses"]] for line in lines] == [["masked_lm"]] * 2 + [
        ["sst", "quora", "sts"]
    ] * 2

    Path("beside.toml").write_text(f"{demo}\n{PHASES[: PHASES.index('[phases')]}")
    train_all = 'train=["sst","quora","sts","masked_lm"]'
    assert train.main(["beside.toml", "--out", "runs/beside", *small, train_all]) == 0
    assert "sst/masked_lm" in steps_of("runs/beside")[0]["cosines"]


def test_simcse() -> None:
    Path("simcse.toml").write_text(SIMCSE)
    arguments = ["simcse.toml", "--data", "DIR", "--init", "MODEL", "--out", "runs/simcse"]
    assert train.main(arguments) == 0
    assert len(Path("runs/simcse/metrics.jsonl").read_text().splitlines()) == 1  # 40 of 64


def test_from_scratch() -> None:
    small = SCRATCH.replace("8192", "200").replace("256", "32").replace("1024", "48")
    recipe = Path("pretrain.toml").read_text().replace("= 60 ", "= 2 ")
    recipe = recipe.replace("= 400 ", "= 900 ")
    Path("scratch.toml").write_text(f"{recipe}\n{small}")
    assert train.main(["scratch.toml", "--data", "DIR", "--out", "runs/scratch"]) == 0
    run = open_run(Path("runs/scratch"))
    assert run.config.num_hidden_layers == 4
    assert run.max_length == 512
    capitals, small_letters = (run.tokenizer.encode([text], 99).tokens for text in ("FILM", "film"))
    assert capitals.tolist() == small_letters.tolist()


def test_figures_are_those_of_the_results() -> None:
    results = Page("results")
    speeds = re.search(r"take ([\d,]+) tokens a second in sentences, ([\d,]+) in", PAGE.text)
    (row,) = re.findall(r"^\| this engine, bf16 \| (7.*)$", results.text, re.MULTILINE)
    sentences, _, blocks, *_ = row.split(" | ")
    assert speeds.groups() == (sentences, blocks)
    section = results.section("The systems of five papers")
    scores = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+)(?: ±.*)? \|$", section, re.MULTILINE))
    shown = re.search(r"nothing: (.*?)\s+\(\[(.*?)\]", PAGE.text, re.DOTALL)
    names = re.findall(r"`([\w-]+)`", shown[2])
    assert re.findall(r"0\.\d+", shown[1]) == [scores[name] for name in names]
