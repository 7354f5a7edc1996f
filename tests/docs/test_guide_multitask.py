"""The multitask guides' data, recipes and commands, on few examples."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import guides
from engine import evaluate, predict, sweep, train
from examples import intent_slots, nli_sts_retrieval

from ..engine.in_process import workers_in_process

GUIDE = intent_slots.GUIDE.read_text(encoding="utf-8")
_, VOICE, SCENES, _ = re.split(r"^## ", GUIDE, flags=re.MULTILINE)
SMALL = ["encoder.hidden_size=16", "encoder.num_hidden_layers=1", "encoder.intermediate_size=16"]
FEW = {"train": 48, "dev": 24, "test": 24}

Follow = Callable[[str], dict[str, str]]


def commands(section: str) -> list[str]:
    """The commands of a section that need no pretrained model; other indented lines are output."""
    begins = r"(?:python -m|printf|for|head|cut) "
    found = re.findall(rf"^    ({begins}.*)$", section, re.MULTILINE)
    return [command for command in found if "runs/pretrained" not in command]


@pytest.fixture
def follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Follow:
    """Run the commands of a section in an empty folder; return the output of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.sweep.workers_of", workers_in_process)
    monkeypatch.setattr(intent_slots, "SIZES", FEW)
    monkeypatch.setattr(nli_sts_retrieval, "SIZES", dict.fromkeys(nli_sts_retrieval.SIZES, FEW))

    def guides_main(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["guides", *arguments])
        return guides.main()

    def seeds(given: list[str]) -> str:
        return "2" if "balance=pcgrad,sum,cagrad" in given else "1"

    settings = ["--max-steps", "2", "--set", *SMALL]
    programs: dict[str, Callable[[list[str]], Any]] = {
        "examples.intent_slots": intent_slots.main,
        "examples.nli_sts_retrieval": nli_sts_retrieval.main,
        "engine.train": lambda given: train.main([*given, *settings]),
        "engine.sweep": lambda given: sweep.main([*given, "--seeds", seeds(given), *settings]),
        "engine.evaluate": evaluate.main,
        "engine.predict": predict.main,
        "bench.guides": guides_main,
    }

    def run(command: str) -> str:
        piped, python, program = command.partition("python -m ")
        if not python:
            done = subprocess.run(
                ["bash", "-ec", command], check=True, capture_output=True, text=True
            )
            return done.stdout
        if piped:
            text = re.fullmatch(r"printf '(.*)' \| ", piped)[1]
            given = text.replace("\\n", "\n").replace("\\t", "\t").encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        name, *arguments = shlex.split(program)
        capsys.readouterr()
        assert not programs[name](arguments), command
        return capsys.readouterr().out

    return lambda section: {command: run(command) for command in commands(section)}


def check_comparison(file: Path, tasks: list[str], weighed: str) -> None:
    """Every setting is there, and those of two seeds are compared with the sum."""
    results = json.loads(file.read_text())["results"]
    methods, weights = ["pcgrad", "sum", "cagrad"], [f"sum, {weighed} x {n}" for n in (2, 4)]
    settings = {*methods, *weights, *(f"{task} alone" for task in tasks)}
    assert results["compared"].keys() == settings
    for setting, found in results["compared"].items():
        is_alone = setting.endswith(" alone")
        assert found["seeds"] == ([0, 1] if setting in methods else [0])
        trained = [setting.removesuffix(" alone")] if is_alone else tasks
        assert {name for name in found["scores"] if "." not in name} == {*trained}
        assert (found["against_sum"] == {}) == (setting not in ("pcgrad", "cagrad"))
        assert (found["conflict_rate"] is None) == (len(trained) == 1)
    assert len(results["runs"]) == 2 * 3 + 2 + len(tasks)
    assert {run["steps"] for run in results["runs"]} == {2}


def test_intents_and_slots(follow: Follow, tmp_path: Path) -> None:
    outputs = follow(VOICE)
    classes, tags = (text for command, text in outputs.items() if command.startswith("cut"))
    recipe = GUIDE.split("```toml\n")[1]
    assert {*classes.split()} <= {*intent_slots.INTENTS}
    assert all(f'"{name}"' in recipe for name in {*classes.split(), *tags.split()})
    (answers, taggings) = (text for command, text in outputs.items() if "predict" in command)
    assert [line.split("\t")[0] for line in answers.splitlines()] == ["id", "0", "1"]
    counts = [len(line.split("\t")[1].split()) for line in taggings.splitlines()[1:]]
    assert counts == [4, 6]
    check_comparison(tmp_path / "voice.json", ["intent", "slots"], "slots")


def test_inference_similarity_and_retrieval(follow: Follow, tmp_path: Path) -> None:
    outputs = follow(SCENES)
    inferred, found = (text for command, text in outputs.items() if "predict" in command)
    assert inferred.splitlines()[1].split("\t")[1] in nli_sts_retrieval.LABELS
    assert [line.split("\t")[:2] for line in found.splitlines()[1:]] == [["0", "1"], ["0", "2"]]
    check_comparison(tmp_path / "scenes.json", ["nli", "triples", "sts"], "nli")


def test_the_beginnings_of_the_files_are_as_shown(tmp_path: Path) -> None:
    intent_slots.write_corpus(tmp_path / "voice")
    nli_sts_retrieval.write_corpus(tmp_path / "scenes")
    columns = [
        (tmp_path / "voice" / "train" / name).read_text().splitlines()[:2]
        for name in ("seq.in", "seq.out", "label")
    ]
    for row in zip(*columns, strict=True):
        assert "    " + "\t".join(row) in VOICE
    assert (tmp_path / "scenes" / "triples-train.jsonl").read_text().splitlines()[0] in SCENES
