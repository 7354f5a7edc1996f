"""Exact match and F1 of words: cases that are worked out by hand, after SQuAD's rules."""

import pytest

from engine.models.heads.answer_metrics import (
    AnswerTexts,
    best_of,
    is_exact,
    mean_of,
    normalized,
    word_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's\tan\r\nanswer.", "cats answer"),
        ("a.b", "ab"),  # punctuation goes before articles
        ("A-the", "athe"),
        ("theatre an", "theatre"),
        ("  \u201cÉcole\u201d \u2013 The A ", "\u201cécole\u201d \u2013"),  # ASCII alone
        ("the", ""),
        ("...", ""),
        ("$1,000", "1000"),
        ("e\u0301", "e\u0301"),
        ("", ""),
    ],
)
def test_what_is_compared(text: str, expected: str):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("predicted", "known", "exact", "f1"),
    [
        ("the cat", "Cat.", 1, 1),
        ("a black cat", "cat", 0, 2 / 3),  # 1 of 2 words, all of 1
        ("cat cat", "cat", 0, 2 / 3),  # a word counts as often as both have it
        ("cat dog", "dog cat", 0, 1),
        ("cat", "dog", 0, 0),
        ("", "dog", 0, 0),
        ("dog", "", 0, 0),
        ("", "", 1, 1),
        ("the", "...", 1, 1),
        ("in the year 1066", "1066", 0, 0.5),
    ],
)
def test_scores_of_an_answer(predicted: str, known: str, exact: float, f1: float):
    assert is_exact(predicted, known) == exact
    assert word_f1(predicted, known) == pytest.approx(f1)


def test_the_answer_that_fits_best_counts():
    assert best_of(word_f1, "black cat", ["dog", "cat", "the black cat"]) == 1
    assert best_of(is_exact, "", []) == 1
    assert best_of(is_exact, "cat", []) == 0
    assert best_of(is_exact, "", ["the", "cat"]) == 0, "an answer of an article alone is none"
    assert best_of(is_exact, "", ["the"]) == 1
    texts = AnswerTexts(["cat", "", "black cat"], [["cat", "x"], ["y"], ["cat"]])
    assert mean_of(is_exact, texts) == pytest.approx(1 / 3)
    assert mean_of(word_f1, texts) == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_torchmetrics_agrees():
    """On answers that are there: of empty ones it follows the first version's script."""
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    predicted = ["The cat.", "a black cat", "cat cat", "in the year 1066", "dog", "Cafe\u0301 no"]
    known = [["cat"], ["cat", "the dog"], ["cat"], ["1066", "year"], ["cat"], ["no Cafe\u0301!"]]
    given = [{"prediction_text": text, "id": str(n)} for n, text in enumerate(predicted)]
    wanted = [
        {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(n)}
        for n, texts in enumerate(known)
    ]
    found = squad(given, wanted)
    texts = AnswerTexts(predicted, known)
    assert 100 * mean_of(is_exact, texts) == pytest.approx(float(found["exact_match"]))
    assert 100 * mean_of(word_f1, texts) == pytest.approx(float(found["f1"]))
