"""Predictions of every kind of task: the same lines wherever a file is cut, bad rows and all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import predict, train

from .conftest import TINY
from .data.test_pieces import cut

RECIPE = """
train = ["t"]
batch_size = 4
[tasks.t]
head = "{head}"
[tasks.t.source]
{source}
id = "key"
files = {{ train = "rows.jsonl", dev = "rows.jsonl" }}
"""
WORDS = ("fine", "dull", "long", "short", "thin")

Record = dict[str, Any]


def classed(number: int) -> Record:
    return {"text": f"a {WORDS[number % 5]} film", "label": ("no", "yes")[number % 2]}


def scored(number: int) -> Record:
    return {"text": f"a {WORDS[number % 5]} film", "other": WORDS[number % 3], "label": number % 5}


def several(number: int) -> Record:
    return {"text": f"a {WORDS[number % 5]} film", "label": [["x"], ["y", "z"], []][number % 3]}


def tagged(number: int) -> Record:
    end = 1 + number % 3
    return {"text": ["a", WORDS[number % 5], "film"][:end], "label": ["O", "X", "O"][:end]}


def asked(number: int) -> Record:
    word = WORDS[number % 5]
    answers = {"text": ["film"], "answer_start": [5 + len(word)]}
    return {
        "text": f"what {word}",
        "other": f"the {word} film " * (1 + number % 9),
        "label": answers,
    }


def found(number: int) -> Record:
    anchor, passage = f"a {WORDS[number % 5]} film {number}", f"{WORDS[number % 3]} {number}"
    return {"text": anchor, "other": passage}


KINDS: dict[str, tuple[str, str, Callable[[int], Record]]] = {
    "classification": ("single", 'text = ["text"]\nclasses = ["no", "yes"]', classed),
    "pair_regression": ("cosine", 'text = ["text", "other"]\nrange = [0, 5]', scored),
    "multi_label_classification": ("single", 'text = ["text"]\nclasses = ["x", "y", "z"]', several),
    "token_classification": (
        "tokens",
        'text = ["text"]\nclasses = ["O", "X"]\nscheme = "none"',
        tagged,
    ),
    "question_answering": ("tokens", 'text = ["text", "other"]\nlabel = "label"', asked),
    "retrieval": ("cosine", 'text = ["text", "other"]', found),
}


def lines(records: list[Record | str]) -> str:
    spelt = (one if isinstance(one, str) else json.dumps(one) for one in records)
    return "".join(f"{line}\n" for line in spelt)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind of task, and a file with more bad rows in a row than a piece has."""
    folder = tmp_path_factory.mktemp(request.param)
    head, source, make = KINDS[request.param]
    source = f'kind = "{request.param}"\n{source}'
    (folder / "recipe.toml").write_text(RECIPE.format(head=head, source=source))
    good = [{"key": f"k{number}"} | make(number) for number in range(40)]
    bad = [*[""] * 9, "x", {"key": "k"}, {**good[0], "text": ""}, {**good[0], "key": ""}, [1]]
    (folder / "rows.jsonl").write_text(lines(good))
    (folder / "in.jsonl").write_text(lines([*bad, *good[:15], *bad * 3, *good[15:], *bad, "x"]))
    options = ["--data", str(folder), "--out", str(folder / "run"), "--max-steps", "2"]
    assert train.main([str(folder / "recipe.toml"), *options, "--set", *TINY, "epochs=1"]) == 0
    return folder / "run"


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_blanked_rows_keep_their_lines(run: Path, tmp_path, monkeypatch, form: str) -> None:
    source = run.parent / "in.jsonl"
    tries = [[]]
    if run.parent.name.startswith("retrieval"):
        tries.append(["--passages", str(source), "--top", "2"])
    for more in tries:
        answers = []
        for size in (1 << 20, 1, 60, 700):
            with monkeypatch.context() as patch:
                cut(patch, size)
                to = tmp_path / f"{size}{len(more)}.{form}"
                options = ["--task", "t", "--input", str(source), "--output", str(to), *more]
                assert predict.main([str(run), *options, "--on-bad-row", "skip"]) == 0
                answers.append(to.read_text())
        assert answers[1:] == answers[:1] * 3
        if not more:
            assert answers[0].count("\n") == 40 + 14 * 5 + 1 + (form == "tsv")
            assert all(answers[0].count(f"k{number}") for number in range(40))
