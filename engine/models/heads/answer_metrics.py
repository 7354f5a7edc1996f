"""Scores of answers as texts: exact match and F1 of words, as SQuAD counts them.

Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1, and 2018 (arXiv:1806.03822) for questions
without an answer.  Texts are compared without case, ASCII punctuation, English articles and
superfluous blanks; of several answers in the data the one that fits best counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class AnswerTexts(NamedTuple):
    """Answers to R questions, as texts.

    Attributes:
        predicted: of the model; empty for no answer.
        known: those of the data, none where a question has no answer.
    """

    predicted: list[str]
    known: list[list[str]]


def normalized(text: str) -> str:
    """Return a text as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_exact(predicted: str, known: str) -> float:
    """Return 1 where two answers are the same, 0 elsewhere."""
    return float(normalized(predicted) == normalized(known))


def word_f1(predicted: str, known: str) -> float:
    """Return the F1 score of the words that two answers share; of an empty one 1 or 0."""
    one, other = normalized(predicted).split(), normalized(known).split()
    if not one or not other:
        return float(one == other)
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other))


def best_of(score: Callable[[str, str], float], predicted: str, known: Sequence[str]) -> float:
    """Return the score against the answer that fits best; one of punctuation alone is none."""
    return max(score(predicted, text) for text in [t for t in known if normalized(t)] or [""])


def mean_of(score: Callable[[str, str], float], texts: AnswerTexts) -> float:
    """Return the mean score of all questions."""
    found = [best_of(score, *each) for each in zip(texts.predicted, texts.known, strict=True)]
    return sum(found) / len(found)
