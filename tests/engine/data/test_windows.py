"""Windows of contexts: every token with its characters, answers in place, nothing left out."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.data import tokenizer as tokenizers
from engine.data.cache import load_split
from engine.data.collate import pack
from engine.data.origins import DataFile
from engine.data.source import TaskSource
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import Table
from engine.data.task_batch import AnswerSpans
from engine.data.task_schema import TaskSchema
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_process import TokenizerProcess
from engine.data.windows import windows_of
from engine.utils.errors import InputError

from ..models.byte_pairs import byte_pairs

CONTEXTS = [
    # Characters beyond 16 bits, accents that the tokenizer drops, line ends of Windows, no end.
    "  Zoe\u0308 saw \U0001f409\U0001f409 at\r\nCafe\u0301 Noir\u200d, said  Ann",
    " ".join(f"word{number}" for number in range(40)) + " .",
    "one",
]
QUESTIONS = ["who saw it?", "which word is the last of all of them, and of the others?", " one "]


def word_piece() -> Tokenizer:
    return Tokenizer.train([*CONTEXTS, *QUESTIONS], 200)


def byte_level() -> Tokenizer:
    """RoBERTa's kind: blanks are letters, a character may be several tokens."""
    return Tokenizer(byte_pairs(CONTEXTS))


def in_a_process() -> Tokenizer:
    return Tokenizer(TokenizerProcess(word_piece().to_json()))


KINDS = {"word_piece": word_piece, "byte_level": byte_level, "in_a_process": in_a_process}


def span(context: int, text: str) -> tuple[int, int]:
    start = CONTEXTS[context].index(text)
    return start, start + len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_know_their_characters(kind: str):
    tokenizer = KINDS[kind]()
    encoded, places = tokenizer.encode_with_places(CONTEXTS)
    plain = tokenizer.encode(CONTEXTS, 1 << 20)
    for number, context in enumerate(CONTEXTS):
        own = slice(*encoded.offsets[number : number + 2])
        framed = plain.tokens[slice(*plain.offsets[number : number + 2])]
        assert encoded.tokens[own].tolist() == framed[1:-1].tolist()
        # Every character that is no blank is in a token, and the tokens are in order.
        covered = {c for first, end in places[own].tolist() for c in range(first, end)}
        kept = {
            n for n, c in enumerate(context) if not c.isspace() and c not in "\u0308\u0301\u200d"
        }
        assert kept <= covered
        assert (np.diff(places[own, 0]) >= 0).all()
    if kind == "in_a_process":
        expected = word_piece().encode_with_places(CONTEXTS)[1]
        assert places.tolist() == expected.tolist()


def test_texts_are_encoded_in_chunks(monkeypatch):
    tokenizer = word_piece()
    whole, places = tokenizer.encode_with_places(CONTEXTS)
    monkeypatch.setattr(tokenizers, "_CHUNK", 2)
    parts, own = tokenizer.encode_with_places(CONTEXTS)
    assert np.array_equal(parts.tokens, whole.tokens)
    assert np.array_equal(parts.offsets, whole.offsets)
    assert np.array_equal(own, places)
    none, nowhere = tokenizer.encode_with_places([])
    assert (len(none.tokens), nowhere.shape) == (0, (0, 2))


@pytest.mark.parametrize("max_length", [6, 9, 17, 64, 512])
@pytest.mark.parametrize("overlap", [0, 3, 128])
@pytest.mark.parametrize("kind", ["word_piece", "byte_level"])
def test_windows_hold_the_whole_context(kind: str, max_length: int, overlap: int):
    tokenizer = KINDS[kind]()
    found = windows_of(QUESTIONS, CONTEXTS, None, tokenizer, max_length, overlap)
    tokens, offsets, spans = found.encoded.tokens, found.encoded.offsets, found.spans
    told, places = tokenizer.encode_with_places(CONTEXTS)
    asked, _ = tokenizer.encode_with_places(QUESTIONS)
    separators = tokenizer.pair_separators
    room = max_length - separators - 2
    for row in range(len(CONTEXTS)):
        whole = told.tokens[slice(*told.offsets[row : row + 2])]
        whole_places = places[slice(*told.offsets[row : row + 2])]
        question = asked.tokens[slice(*asked.offsets[row : row + 2])][: room // 2]
        width, end = room - len(question), 0
        for number, window in enumerate(np.flatnonzero(spans.rows == row).tolist()):
            own = slice(*offsets[window : window + 2])
            begins = [tokenizer.cls_id, *question, *[tokenizer.sep_id] * separators]
            assert tokens[own][: len(begins)].tolist() == begins
            assert tokens[own][-1] == tokenizer.sep_id
            part = tokens[own][len(begins) : -1]
            start = end - min(overlap, width // 2) if number else 0
            assert part.tolist() == whole[start : start + width].tolist()
            assert len(part) == min(width, len(whole) - start)
            inside = spans.places[own][len(begins) : -1]
            assert inside.tolist() == whole_places[start : start + width].tolist()
            assert (np.delete(spans.places[own], np.s_[len(begins) : -1], axis=0) == -1).all()
            if separators == 1:
                types = [0] * len(begins) + [1] * (len(part) + 1)
                assert found.token_types[own].tolist() == types
            assert end < len(whole) or not number, "no window beyond the end"
            end = start + len(part)
        assert end == len(whole)
    assert (found.token_types is None) == (separators == 2)
    cut = (np.diff(asked.offsets) > room // 2).sum()
    assert found.encoded.truncated == cut


ANSWERS = [
    [span(0, "Cafe\u0301 Noir"), span(0, "Zoe\u0308")],  # the first one is trained on
    [span(1, "word38 word39")],
    [],
]


@pytest.mark.parametrize("max_length", [12, 20, 512])
@pytest.mark.parametrize("kind", ["word_piece", "byte_level"])
def test_targets_are_the_tokens_of_the_first_answer(kind: str, max_length: int):
    found = windows_of(QUESTIONS, CONTEXTS, ANSWERS, KINDS[kind](), max_length, 4)
    spans, offsets = found.spans, found.encoded.offsets
    inside = {0: 0, 1: 0, 2: 0}
    for window, row in enumerate(spans.rows.tolist()):
        places = spans.places[slice(*offsets[window : window + 2])]
        first, last = spans.targets[window]
        if not first:
            assert last == 0
            continue
        inside[row] += 1
        text = CONTEXTS[row][places[first, 0] : places[last, 1]].strip(" \u200d")
        wanted = CONTEXTS[row][slice(*ANSWERS[row][0])]
        assert text.rstrip("\u0301") == wanted.rstrip("\u0301")
    assert inside[2] == 0
    if max_length == 512:
        assert inside == {0: 1, 1: 1, 2: 0}
    assert [spans.context(row) for row in range(3)] == CONTEXTS
    assert spans.answers_to(0) == ["Cafe\u0301 Noir", "Zoe\u0308"]
    assert spans.answers_to(2) == []


def test_an_answer_that_no_window_holds_wholly_is_in_none():
    long = [[(0, len(CONTEXTS[1]))]]
    found = windows_of(QUESTIONS[1:2], CONTEXTS[1:2], long, word_piece(), 20, 4)
    assert len(found.spans.rows) > 3
    assert not found.spans.targets.any()


def test_an_answer_at_the_very_end_and_a_part_of_a_word():
    answers = [[span(0, "nn")], [span(1, ".")], [span(2, "n")]]
    found = windows_of(QUESTIONS, CONTEXTS, answers, word_piece(), 512, 128)
    for row, text in enumerate(("Ann", ".", "one")):
        own = found.spans.places[slice(*found.encoded.offsets[row : row + 2])]
        first, last = found.spans.targets[row]
        assert text.endswith(CONTEXTS[row][own[first, 0] : own[last, 1]]) or text == "one"
        assert last == len(own) - 2


def test_a_limit_without_room_is_refused():
    with pytest.raises(InputError, match=r"max_length = 4: expected 5 or more for a question and"):
        windows_of(QUESTIONS, CONTEXTS, None, word_piece(), 4, 128)


def form_of(**fields: object) -> TaskSchema:
    given = {"kind": "question_answering", "text": ("question", "context"), "label": "answers"}
    source = TaskSource(**(given | {"files": {"train": "t.jsonl"}, "unanswerable": True} | fields))
    return source.format("squad")


def split_of(tokenizer: Tokenizer, max_length: int = 20) -> TokenizedSplit:
    table = Table(
        ids=["a", "b", "c"],
        sentences=(QUESTIONS, CONTEXTS),
        labels=np.array([1, 1, 0], dtype=np.float32),
        answers=ANSWERS,
    )
    return tokenize("t", table, tokenizer, max_length, schema=form_of(window_overlap=4))


def test_batches_point_to_the_tokens_of_their_answers():
    split = split_of(word_piece())
    assert len(split) == len(split.spans.rows) > 3
    assert split.notes == (f"{len(split)} windows of 3 questions' contexts",)
    assert split.labels.tolist() == [float(first > 0) for first, _ in split.spans.targets]
    chosen = np.flatnonzero(split.spans.targets[:, 0])[::-1].copy()
    chosen = np.concatenate([chosen, [0]])
    batch = pack([split], [chosen])
    (labels,) = batch.labels
    assert isinstance(labels, AnswerSpans)
    assert batch.examples == batch.terms == (len(chosen),)
    assert labels.offsets.tolist() == batch.cu_seqlens.tolist()
    for number, window in enumerate(chosen.tolist()):
        own = split.tokens[slice(*split.offsets[window : window + 2])]
        for place, target in zip(
            (labels.first, labels.last), split.spans.targets[window], strict=True
        ):
            assert batch.input_ids[place[number]] == own[target]


def test_the_cache_keeps_the_windows(tmp_path: Path):
    rows = [
        {
            "question": QUESTIONS[n],
            "context": CONTEXTS[n],
            "answers": {
                "text": [CONTEXTS[n][slice(*a)] for a in ANSWERS[n]],
                "answer_start": [a[0] for a in ANSWERS[n]],
            },
        }
        for n in range(3)
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    tokenizer = word_piece()
    expected = split_of(tokenizer)
    for _ in range(2):
        form = form_of(window_overlap=4)
        kept = load_split(DataFile(path), form, tokenizer, 20, cache=tmp_path / "cache")
        for name in ("tokens", "offsets", "token_types", "labels"):
            assert np.array_equal(getattr(kept, name), getattr(expected, name)), name
        for name, array in expected.spans._asdict().items():
            assert np.array_equal(getattr(kept.spans, name), array), name
        assert kept.notes == (f"read t.jsonl as {expected.notes[0]}",)
    apart = form_of(window_overlap=0)
    other = load_split(DataFile(path), apart, tokenizer, 20, cache=tmp_path / "cache")
    assert len(other) < len(kept), "windows that overlap less are fewer"
    none = load_split(DataFile(path), form, tokenizer, 20, labelled=False, cache=tmp_path / "cache")
    assert none.labels is None
    assert len(none.spans.answers) == 0
