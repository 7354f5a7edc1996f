"""Masked tokens, and the segments that are joined."""

import numpy as np
import pytest

from engine.config.objective import ObjectiveRecipe
from engine.data import prepare, rows
from engine.data.collate import pack
from engine.data.masked_text import MaskedText
from engine.data.objective_sequences import SequenceSettings, write_sequences
from engine.data.raw_text import evenly, joined, lines_of, split_sentences
from engine.data.tokenizer import Tokenizer
from engine.runs.objectives import build_examples
from engine.utils.errors import InputError

WORDS = [f"word{number}" for number in range(50)]
TEXTS = [" ".join(WORDS[start : start + 20]) for start in range(25)]
DOCUMENTS = [
    f"{WORDS[n]} one. {WORDS[n]} two! {WORDS[n]} three? {WORDS[n]} four." for n in range(12)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, *DOCUMENTS], 400)


def masked(tokenizer: Tokenizer) -> MaskedText:
    return build_examples("mlm", ObjectiveRecipe(kind="masked_lm"), TEXTS, tokenizer, 128, 3)


def with_next(tokenizer: Tokenizer, max_length: int, texts=DOCUMENTS) -> MaskedText:
    settings = ObjectiveRecipe(kind="masked_lm_next")
    return build_examples("mlm", settings, texts, tokenizer, max_length, 3)


def test_a_share_of_the_tokens_is_told_and_most_of_it_masked(tokenizer):
    text = masked(tokenizer)
    instead, told, candidates = [], [], 0
    for step in range(40):
        batch = text.task_batch(np.arange(len(text)), step)
        whole = np.concatenate([text._frame(e.first, None)[0] for e in text.examples])
        candidates += len(whole) - 2 * len(text)
        positions = batch.labels.positions.numpy()
        assert len(set(positions)) == len(positions)
        np.testing.assert_array_equal(batch.labels.targets.numpy(), whole[positions])
        untouched = np.delete(batch.tokens, positions)
        np.testing.assert_array_equal(untouched, np.delete(whole, positions))
        instead.append(batch.tokens[positions])
        told.append(whole[positions])
    instead, told = np.concatenate(instead), np.concatenate(told)
    assert not np.isin(told, [tokenizer.cls_id, tokenizer.sep_id]).any()
    # 3 of each 20 tokens exactly; the shares of about 3,000 draws within 4 standard deviations
    assert len(told) / candidates == pytest.approx(0.15, abs=0.01)
    deviation = 4 * (0.8 * 0.2 / len(told)) ** 0.5
    assert (instead == tokenizer.mask_id).mean() == pytest.approx(0.8, abs=deviation)
    assert (instead == told).mean() == pytest.approx(0.1, abs=deviation)


def test_masks_follow_from_step_and_example_alone(tokenizer):
    text = masked(tokenizer)
    both, second = text.task_batch(np.array([4, 9]), 7), text.task_batch(np.array([9]), 7)
    first = both.sizes[0]
    np.testing.assert_array_equal(both.tokens[first:], second.tokens)
    assert not np.array_equal(text.task_batch(np.array([9]), 8).tokens, second.tokens)


def test_the_second_segment_follows_in_half_of_the_examples(tokenizer):
    text = with_next(tokenizer, 40)
    pairs = list(text.examples)
    follows = []
    for step in range(60):
        for index in range(len(text)):
            second, is_next = text._second(index, step)
            follows.append(is_next)
            own = text.examples[index]
            if is_next:
                np.testing.assert_array_equal(second, own.second)
            else:
                assert any(
                    np.array_equal(second, other.second)
                    for other in pairs
                    if other.text != own.text
                )
    deviation = 4 * 0.5 / len(follows) ** 0.5
    assert np.mean(follows) == pytest.approx(0.5, abs=deviation)
    task_batch = text.task_batch(np.arange(len(text)), 0)
    assert task_batch.sizes.max() <= 40
    batch = pack([text], [np.arange(len(text))], 0)
    starts = batch.cu_seqlens[:-1].long()
    assert not batch.token_type_ids[starts].any()
    assert (batch.token_type_ids[batch.cu_seqlens[1:].long() - 1] == 1).all()
    assert task_batch.labels.is_next.shape == (len(text),)


def test_neighbouring_segments_come_from_one_text_in_its_order(tokenizer):
    pairs = with_next(tokenizer, 64).examples
    assert len(pairs) == len(DOCUMENTS)
    for pair, text in zip(pairs, DOCUMENTS, strict=True):
        read = tokenizer.decode([*pair.first, *pair.second]).replace(" ", "")
        assert read == text.replace(" ", "")


def test_texts_of_one_sentence_have_no_next(tokenizer):
    with pytest.raises(InputError, match="fewer than two texts"):
        with_next(tokenizer, 40, texts=["one sentence", "another one"])
    with pytest.raises(InputError, match="fewer than two texts"):
        with_next(tokenizer, 64, ["one sentence.", "two. sentences."])


@pytest.mark.parametrize(
    ("short", "expected"), [(8, [7, 8, 4, 2]), (3, [3, 4, 8, 4, 2])], ids=["all", "short ones"]
)
def test_short_pieces_are_joined_and_long_ones_cut(short, expected):
    pieces = [np.full(size, size) for size in (3, 4, 9, 2, 2, 2)]
    assert [len(piece) for piece in joined(pieces, 2, 8, short)] == expected


def test_texts_are_taken_from_everywhere():
    texts = [str(number) for number in range(10)]
    assert evenly(texts, 4) == ["0", "3", "6", "9"]
    assert evenly(texts, 0) == evenly(texts, 10) == evenly(texts, 99) == texts


def test_sentences_end_at_marks_that_a_space_follows():
    assert split_sentences("Mr 3.5 said so. Did he? Yes!") == ["Mr 3.5 said so.", "Did he?", "Yes!"]


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "no text"), (b"\xff", "not UTF-8")])
def test_a_file_without_text(tmp_path, content, reason):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        lines_of(tmp_path / "text")
    with pytest.raises(InputError, match="cannot read"):
        lines_of(tmp_path / "none")


def words_of(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """The number of the word of each token."""
    return np.cumsum([not tokenizer.id_to_token(int(t)).startswith("##") for t in tokens])


def test_whole_words_are_masked_or_not_at_all(tokenizer):
    settings = ObjectiveRecipe(kind="masked_lm", whole_words=True, mask_share=0.3)
    small = Tokenizer.train(TEXTS, 30)  # words of several tokens
    text = build_examples("mlm", settings, TEXTS, small, 128, 3)
    shares = []
    for step in range(30):
        for example in range(len(text)):
            batch = text.task_batch(np.array([example]), step)
            whole, _ = text._frame(text.examples[example].first, None)
            words = words_of(small, whole)
            told = np.zeros(len(whole), dtype=bool)
            told[batch.labels.positions] = True
            sizes, hidden = np.bincount(words), np.bincount(words, weights=told)
            assert set(hidden / np.maximum(sizes, 1)) == {0.0, 1.0}
            shares.append(told.sum() / (len(whole) - 2))
    assert 0.25 < np.mean(shares) <= 0.3


def test_a_word_that_is_longer_than_the_share_is_masked_where_no_other_is():
    small = Tokenizer.train(["abcdefgh"], 16)
    settings = ObjectiveRecipe(kind="masked_lm", whole_words=True)
    text = build_examples("mlm", settings, ["abcdefgh"], small, 32, 3)
    size = len(text.examples[0].first)
    assert size > 1
    assert len(text.task_batch(np.array([0]), 0).labels.positions) == size


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "masked_lm"},
        {"kind": "masked_lm", "divide": True},
        {"kind": "masked_lm", "join": 8},
        {"kind": "masked_lm_next"},
    ],
)
def test_texts_that_spell_special_tokens(tokenizer, settings, whole_words):
    """They have nothing to tell, and what is told is none of them."""
    special = ["[SEP]", "[CLS] [SEP]", "[SEP]" * 30, "[SEP] " * 20 + "word1", "[SEP]. [CLS]. [SEP]"]
    texts = [*special, *DOCUMENTS, "[SEP]. [SEP]! word1 [SEP] one. [CLS]! word2 two."]
    objective = ObjectiveRecipe(whole_words=whole_words, **settings)
    text = build_examples("mlm", objective, texts, tokenizer, 18, 3)
    ends = (tokenizer.cls_id, tokenizer.sep_id)
    for step in range(4):
        for number in range(len(text)):
            targets = text.task_batch(np.array([number]), step).labels.targets.numpy()
            assert len(targets)
            assert not np.isin(targets, ends).any()
    with pytest.raises(InputError, match=r"no text of it has a token|fewer than two texts"):
        build_examples("mlm", objective, special[:3], tokenizer, 18, 3)


def test_long_texts_are_divided(tokenizer):
    long = " ".join(WORDS)
    cut = ObjectiveRecipe(kind="masked_lm")
    ids = tokenizer.encode([long], 1 << 20).tokens[1:-1]
    for divide in (False, True):
        settings = cut.model_copy(update={"divide": divide})
        text = build_examples("mlm", settings, [long, WORDS[0]], tokenizer, 12, 3)
        own = [example.first for example in text.examples]
        assert max(map(len, own)) == 10
        if divide:
            np.testing.assert_array_equal(np.concatenate(own[:-1]), ids)
            assert len(own) == -(-len(ids) // 10) + 1
        else:
            assert len(own) == 2
    np.testing.assert_array_equal(text.sizes, [len(each) + 2 for each in own])


@pytest.mark.parametrize("kind", ["masked_lm", "masked_lm_next", "simcse"])
def test_sequences_are_the_same_whatever_the_workers(tokenizer, monkeypatch, kind):
    monkeypatch.setattr(rows, "_ROWS_OF_A_PIECE", 3)
    monkeypatch.setattr(prepare, "_HERE", 1)
    settings = SequenceSettings(kind=kind, max_length=24, join=2, short=30, divide=False)

    def arrays_of(workers: int) -> dict[str, np.ndarray]:
        found = {"tokens": [], "offsets": [], "texts": []}
        texts = [*DOCUMENTS, *TEXTS]
        append = lambda name, array: found[name].append(array)  # noqa: E731
        write_sequences(texts, settings, tokenizer, append, workers)
        return {name: np.concatenate(pieces) for name, pieces in found.items()}

    one, several = arrays_of(1), arrays_of(3)
    for name, array in one.items():
        assert len(array) > 10
        np.testing.assert_array_equal(array, several[name])
