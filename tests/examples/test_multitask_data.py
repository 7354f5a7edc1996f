"""The grammars of the multitask guides."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.data.tags import check_tags
from examples import intent_slots, nli_sts_retrieval

WRITERS = {"assistant": intent_slots.write_corpus, "sentences": nli_sts_retrieval.write_corpus}
CASES = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@CASES
def test_a_seed_decides_every_byte(tmp_path: Path, write: Callable[..., None]) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write(tmp_path / name, seed)
    first, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_no_sentence_to_an_assistant_stands_twice(tmp_path: Path) -> None:
    intent_slots.write_corpus(tmp_path / "data")
    texts = list[str]()
    for split, size in intent_slots.SIZES.items():
        columns = [
            (tmp_path / "data" / split / name).read_text().splitlines()
            for name in ("seq.in", "seq.out", "label")
        ]
        assert [len(column) for column in columns] == [size] * 3
        texts += columns[0]
        for text, tags, intent in zip(*columns, strict=True):
            assert len(text.split()) == len(tags.split())
            check_tags(tags.split(), "BIO")
            assert {tag[2:] for tag in tags.split()} <= {*intent_slots.SLOTS, ""}
            assert intent in intent_slots.INTENTS
    assert len(set(texts)) == len(texts)


def test_no_first_sentence_stands_twice(tmp_path: Path) -> None:
    """Neither in one split, nor in two, nor in two tasks, which share an encoder."""
    nli_sts_retrieval.write_corpus(tmp_path / "data")
    firsts, labels, scores = list[str](), list[str](), list[float]()
    for task, sizes in nli_sts_retrieval.SIZES.items():
        for split, size in sizes.items():
            lines = (tmp_path / "data" / f"{task}-{split}.jsonl").read_text().splitlines()
            assert len(lines) == size
            rows = [json.loads(line) for line in lines]
            firsts += [next(iter(row.values())) for row in rows]
            labels += [row["label"] for row in rows if task == "nli"]
            scores += [row["score"] for row in rows if task == "sts"]
            assert all(row["negative"] != row["positive"] for row in rows if task == "triples")
    assert len(set(firsts)) == len(firsts)
    assert set(labels) == {*nli_sts_retrieval.LABELS}
    assert min(labels.count(label) for label in set(labels)) > 0.3 * len(labels)
    assert (min(scores), max(scores)) == (0, 1)


@pytest.mark.parametrize("example", [intent_slots, nli_sts_retrieval])
def test_a_folder_that_is_there_is_kept(
    tmp_path: Path, example: type[intent_slots], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main([str(tmp_path)])
    assert "give a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
