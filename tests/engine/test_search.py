"""Find passages: the object, the table, JSON lines, and what is refused."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from engine import predict, train
from engine.predict import Predictor
from engine.utils.errors import InputError

from .conftest import TINY

PASSAGES = ["the sea is wide", "a film of ada lee", "dull music", "it snowed on the hill"]
ANCHORS = ["who was in the film ?", "dull music"]
RECIPE = """
train = ["finds", "dots", "verdict"]
batch_size = 4
[tasks.finds]
head = "cosine"
[tasks.finds.source]
kind = "retrieval"
text = ["question", "passage", "other"]
id = "key"
files = { train = "rows.jsonl", dev = "rows.jsonl" }
[tasks.dots]
head = "dot"
[tasks.dots.source]
kind = "retrieval"
text = ["question", "passage"]
files = { train = "rows.jsonl", dev = "rows.jsonl" }
[tasks.verdict]
head = "single"
[tasks.verdict.source]
kind = "classification"
text = ["question"]
classes = 2
files = { train = "rows.jsonl", dev = "rows.jsonl" }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "recipe.toml").write_text(RECIPE)
    rows = [
        {"key": f"={n}", "question": q, "passage": p, "other": "it rained", "label": n}
        for n, (q, p) in enumerate(zip(ANCHORS, PASSAGES[1:], strict=False))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    options = ["--data", str(folder), "--out", str(folder / "run"), "--max-steps", "2"]
    assert train.main([str(folder / "recipe.toml"), *options, "--set", *TINY, "epochs=1"]) == 0
    keyed = [{"key": f"q{n}", "question": text} for n, text in enumerate(ANCHORS)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in keyed))
    keyed = [{"key": f"p{n}", "passage": text} for n, text in enumerate(PASSAGES)]
    (folder / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in keyed))
    return folder / "run"


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run, device="cpu", precision="fp32")


@pytest.mark.parametrize("task", ["finds", "dots"])
def test_matches_are_those_of_the_sentence_vectors(predictor: Predictor, task: str) -> None:
    asked, told = predictor.embed(ANCHORS), predictor.embed(PASSAGES)
    if task == "finds":
        asked, told = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, told))
    similarities = asked @ told.T
    for k in (1, 3, 10):
        matches = predictor.search(task, ANCHORS, PASSAGES, k)
        for own, found in zip(similarities, matches, strict=True):
            order = np.argsort(-own)[:k]
            assert [match.number for match in found] == order.tolist()
            np.testing.assert_allclose([m.similarity for m in found], own[order], rtol=1e-4)


def test_the_table_json_lines_and_text_have_the_same_matches(run, tmp_path, capsys) -> None:
    expected = Predictor(run, device="cpu").search("finds", ANCHORS, PASSAGES, 2)
    (tmp_path / "asked.txt").write_text("\n".join(ANCHORS))
    (tmp_path / "told.txt").write_text("\n".join(PASSAGES))
    plain = ["--input-format", "text"]
    for folder, ending, options in ((run.parent, "jsonl", []), (tmp_path, "txt", plain)):
        options = [*options, "--passages", str(folder / f"told.{ending}"), "--top", "2"]
        found = {}
        for form in ("tsv", "jsonl"):
            to = tmp_path / f"{ending}.{form}"
            source = ["--task", "finds", "--input", str(folder / f"asked.{ending}")]
            assert predict.main([str(run), *source, "--output", str(to), *options]) == 0
            found[form] = to.read_text()
        assert "wrote 2 predictions to" in capsys.readouterr().out
        header, *rows = csv.reader(io.StringIO(found["tsv"]), delimiter="\t")
        assert header == ["id", "rank", "passage", "similarity"]
        records = [json.loads(line) for line in found["jsonl"].splitlines()]
        prefix = ("q", "p") if ending == "jsonl" else ("", "")
        for number, matches in enumerate(expected):
            own = rows[2 * number : 2 * number + 2]
            assert [row[:3] for row in own] == [
                [f"{prefix[0]}{number}", str(rank), f"{prefix[1]}{match.number}"]
                for rank, match in enumerate(matches, start=1)
            ]
            assert [float(row[3]) for row in own] == pytest.approx(
                [match.similarity for match in matches], abs=1e-4
            )
            assert [each["id"] for each in records[number]["passages"]] == [row[2] for row in own]


def test_anchors_of_a_split(run, tmp_path, capsys) -> None:
    """Their format is the recipe's, that of the passages may be another."""
    (tmp_path / "told").write_text("\n".join(PASSAGES))
    options = ["--task", "finds", "--split", "dev", "--top", "1", "--input-format", "text"]
    told, out = str(tmp_path / "told"), str(tmp_path / "out.tsv")
    assert predict.main([str(run), *options, "--passages", told, "--output", out]) == 0
    assert "wrote 8 predictions" in capsys.readouterr().out
    _, *rows = csv.reader((tmp_path / "out.tsv").read_text().splitlines(), delimiter="\t")
    found = Predictor(run, device="cpu").search("finds", ANCHORS, PASSAGES, 1)
    assert [row[2] for row in rows] == [str(match.number) for (match,) in found] * 4
    with pytest.raises(InputError, match="is the file that is read"):
        predict.main([str(run), *options, "--passages", told, "--output", told, "--force"])


def test_standard_input_is_read_once(run) -> None:
    options = ["--task", "finds", "--input", "-", "--passages", "-", "--output", "-"]
    with pytest.raises(InputError, match="--passages -: --input reads standard input"):
        predict.main([str(run), *options])


def test_bad_rows_keep_their_place_among_anchors_and_are_no_passages(run, tmp_path) -> None:
    asked, told = tmp_path / "asked.jsonl", tmp_path / "told.jsonl"
    asked.write_text('{"key": "a", "question": ""}\n{"key": "b", "question": "who ?"}\n')
    told.write_text('{"key": "x", "passage": " "}\n{"key": "y", "passage": "ada"}\n')
    options = ["--task", "finds", "--input", str(asked), "--passages", str(told)]
    out = tmp_path / "out"
    with pytest.raises(InputError, match="empty sentence: column 'question'"):
        predict.main([str(run), *options, "--output", str(out)])
    for form in ("tsv", "jsonl"):
        given = [*options, "--output", str(out), "--force", "--on-bad-row", "skip"]
        assert predict.main([str(run), *given, "--output-format", form]) == 0
        lines = out.read_text().splitlines()
        if form == "tsv":
            assert lines[1] == "a\t\t\t"
            assert lines[2].startswith("b\t1\ty\t")
        else:
            assert json.loads(lines[0]) == {"id": "a", "passages": None}
            assert [each["id"] for each in json.loads(lines[1])["passages"]] == ["y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verdict", ["a"], ["b"]), "task 'verdict': finds no passages"),
        (("no", ["a"], ["b"]), "task 'no': .* has finds, dots, verdict"),
        (("finds", "a", ["b"]), "expected a list of texts, got one str"),
        (("finds", ["a"], "b"), "expected a list of texts, got one str"),
        (("finds", ["a"], ["b"], 0), "k = 0: expected a whole number of 1 or more"),
        (("finds", ["a"], ["b"], 2.5), "k = 2.5: expected a whole number"),
        (("finds", ["a"], ["b"], True), "k = True: expected a whole number"),
        (("finds", None, ["b"]), "expected a list of texts, got one NoneType"),
        (("finds", ["a"], {"b"}), "expected a list of texts, got one set"),
        (("finds", ["a"], (text for text in "b")), "expected a list of texts, got one generator"),
        (("finds", ["a", " "], ["b"]), "example 1: an empty text"),
        (("finds", ["a"], [3]), "example 0: expected a text, got int"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(predictor, arguments, message) -> None:
    with pytest.raises(InputError, match=message) as raised:
        predictor.search(*arguments)
    assert "\n" not in str(raised.value)
    assert predictor.search("finds", [], PASSAGES) == []
    assert predictor.search("finds", ANCHORS, []) == [[], []]
