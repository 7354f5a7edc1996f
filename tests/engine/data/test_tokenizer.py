"""Token ids: equal to transformers', framed and cut as BERT wants them."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer

from engine.data.split import tokenize
from engine.data.table import Table, read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from engine.utils.errors import InputError


def test_every_sentence_is_framed_and_cut(tokenizer: Tokenizer) -> None:
    texts = ["the plot was good .", "", "good", "the " * 50]
    encoded = tokenizer.encode(texts, max_length=8)
    rows = [
        encoded.tokens[a:b].tolist()
        for a, b in zip(encoded.offsets, encoded.offsets[1:], strict=False)
    ]
    assert [len(row) for row in rows] == [7, 2, 3, 8]
    assert all(row[0] == tokenizer.cls_id and row[-1] == tokenizer.sep_id for row in rows)
    assert encoded.truncated == 1
    assert tokenizer.decode(rows[0]) == "the plot was good."


def test_many_sentences_are_encoded_in_order(tokenizer: Tokenizer) -> None:
    texts = ["the plot was good", "bad"] * 2500  # more than one chunk of the library's
    encoded = tokenizer.encode(texts, max_length=32)
    np.testing.assert_array_equal(np.diff(encoded.offsets), [6, 3] * 2500)
    assert len(encoded.tokens) == encoded.offsets[-1]


def test_no_sentence_and_no_room(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([], max_length=8).tokens.shape == (0,)
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.encode(["x"], max_length=2)


@pytest.mark.parametrize("max_length", [64, 9, 8, 5])
def test_pairs_in_one_sequence_are_those_of_transformers(
    tokenizer: Tokenizer, tmp_path: Path, max_length: int
) -> None:
    """Equal and different lengths around the limit, of which none, one or both are cut."""
    words = "the plot was good and the film was bad"
    texts = ["", *(" ".join(words.split()[:count]) for count in (1, 2, 3, 4, 9))]
    first, second = (list(column) for column in zip(*product(texts, texts), strict=True))
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(first, second, truncation="longest_first", max_length=max_length)
    table = Table(["-"] * 36, (first, second), None)
    found = tokenize("quora", table, tokenizer, max_length, joins_pairs=True)
    assert found.columns == 1
    rows = [np.split(row, found.offsets[1:-1]) for row in (found.tokens, found.token_types)]
    assert [row.tolist() for row in rows[0]] == expected["input_ids"]
    assert [row.tolist() for row in rows[1]] == expected["token_type_ids"]
    assert (found.truncated > 0) == (max_length < 64)
    batch = found.task_batch(np.array([7, 3]), 0)
    assert batch.tokens.tolist() == [*rows[0][7], *rows[0][3]]
    assert batch.token_types.tolist() == [*rows[1][7], *rows[1][3]]
    with pytest.raises(InputError, match="max_length = 4: expected 5 or more"):
        tokenize("quora", table, tokenizer, 4, joins_pairs=True)


def test_training_is_repeatable(demo: Path) -> None:
    # Hash tables are seeded anew for every table, so one process shows what two would.
    table = read_table(FORMATS["sts"].file(demo, "train"), FORMATS["sts"])
    texts = [text for column in table.sentences for text in column]
    first = Tokenizer.train(texts, 250)
    assert first.vocab_size == 250
    assert all(Tokenizer.train(texts, 250).to_json() == first.to_json() for _ in range(5))
    assert first.unk_id not in first.encode(["quick unseen words"], 64).tokens


def test_special_tokens_of_the_trained_are_berts(tokenizer: Tokenizer) -> None:
    added = Backend.from_str(tokenizer.to_json()).get_added_tokens_decoder().values()
    assert [token.content for token in added] == list(SPECIAL_TOKENS)
    assert tokenizer.pad_id == 0


def test_case_is_ignored(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(
        tokenizer.encode(["The PLOT"], 8).tokens, tokenizer.encode(["the plot"], 8).tokens
    )


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    texts = ["the plot was really good .", "unseen wörds ! 你好"]
    expected = tokenizer.encode(texts, 16).tokens
    assert Tokenizer.load(tmp_path).to_json() == tokenizer.to_json()
    (tmp_path / "tokenizer.json").unlink()
    from_vocabulary = Tokenizer.load(tmp_path)
    np.testing.assert_array_equal(from_vocabulary.encode(texts, 16).tokens, expected)
    assert from_vocabulary.vocab_size == tokenizer.vocab_size


_BERT = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
_ACCENTED = ["the plöt was Good", "e\u0301 你好the", "\x96the[MASK]plot"]


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_the_vocabulary_and_its_settings_say_all(
    tokenizer: Tokenizer, tmp_path: Path, lower: bool, accents: bool | None, chinese: bool
) -> None:
    settings = {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("你好\nplöt\nGood\né\ne\u0301\n")
    first, saved = Tokenizer.load(tmp_path), tmp_path / "saved"
    saved.mkdir()
    first.save(saved)
    assert settings.items() <= json.loads((saved / "tokenizer_config.json").read_text()).items()
    expected = first.encode(_ACCENTED, 32).tokens.tolist()
    theirs = AutoTokenizer.from_pretrained(saved)(_ACCENTED)["input_ids"]
    assert [token for row in theirs for token in row] == expected
    for left_out in ("vocab.txt", "tokenizer.json"):
        shutil.copytree(saved, tmp_path / f"without {left_out}")
        (tmp_path / f"without {left_out}" / left_out).unlink()
        again = Tokenizer.load(tmp_path / f"without {left_out}")
        assert again.encode(_ACCENTED, 32).tokens.tolist() == expected


_NOT_BERTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "other normalizer": lambda parts: parts.update(normalizer={"type": "NFC"}),
    "no normalizer": lambda parts: parts.update(normalizer=None),
    "control characters": lambda parts: parts["normalizer"].update(clean_text=False),
    "other words": lambda parts: parts.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "short words": lambda parts: parts["model"].update(max_input_chars_per_word=3),
    "other unknown": lambda parts: parts["model"].update(unk_token="the"),
    "a gap": lambda parts: parts["model"]["vocab"].update(new=1000),
    "a line's end": lambda parts: parts["model"]["vocab"].update({"a\nb": 500}),
    "half a line's end": lambda parts: parts["model"]["vocab"].update({"ab\r": 500}),
    "an added token": lambda parts: parts["added_tokens"].append(
        parts["added_tokens"][-1] | {"id": 500, "content": "plot was"}
    ),
    "a token within words": lambda parts: parts["added_tokens"][-1].update(single_word=True),
}


@pytest.mark.parametrize("name", _NOT_BERTS)
def test_what_a_vocabulary_cannot_say_has_none(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    parts = json.loads(tokenizer.to_json())
    assert len(parts["model"]["vocab"]) == 500  # what is added has the next number
    _NOT_BERTS[name](parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    loaded, saved = Tokenizer.load(tmp_path), tmp_path / "saved"
    saved.mkdir()
    loaded.save(saved)
    assert not (saved / "vocab.txt").exists()
    texts = [*_ACCENTED, "the plot was good"]
    theirs = AutoTokenizer.from_pretrained(saved)(texts, add_special_tokens=False)["input_ids"]
    framed = [[loaded.cls_id, *row, loaded.sep_id] for row in theirs]
    assert loaded.encode(texts, 32).tokens.tolist() == [token for row in framed for token in row]


_ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "another number of an added token": lambda parts: parts["added_tokens"][3].update(id=89),
    "an added token with a number that is taken": lambda parts: parts["added_tokens"].append(
        parts["added_tokens"][-1] | {"id": 60, "content": "brand new"}
    ),
    "an added token twice": lambda parts: parts["added_tokens"].append(parts["added_tokens"][-1]),
    "special tokens that are added alone": lambda parts: [
        parts["model"]["vocab"].pop(token) for token in SPECIAL_TOKENS
    ],
    "a gap": lambda parts: parts["model"]["vocab"].update(new=1000),
}


@pytest.mark.parametrize("name", _ODD)
def test_a_tokenizer_is_the_same_once_it_is_saved(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    parts = json.loads(tokenizer.to_json())
    _ODD[name](parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    saved, texts = tmp_path / "saved", ["the plot was [SEP] brand new", "new good"]
    saved.mkdir()
    first = Tokenizer.load(tmp_path)
    first.save(saved)
    again = Tokenizer.load(saved)
    assert (again.sep_id, again.vocab_size) == (first.sep_id, first.vocab_size)
    expected = first.encode(texts, 32).tokens.tolist()
    assert again.encode(texts, 32).tokens.tolist() == expected


@pytest.mark.parametrize("taken", ["the", "[SEP]"])
@pytest.mark.parametrize("word", ["plot", "##s", "new"])
def test_two_tokens_with_one_number(
    tokenizer: Tokenizer, tmp_path: Path, word: str, taken: str
) -> None:
    """The library would write one of them, another from time to time."""
    parts = json.loads(tokenizer.to_json())
    vocabulary = parts["model"]["vocab"]
    vocabulary[word] = vocabulary[taken]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match=r"tokenizer\.json; replace it"):
        Tokenizer.load(tmp_path)


def test_settings_of_the_folder_do_not_cut_or_pad(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_str(tokenizer.to_json())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = ["the plot was good .", "good"]
    loaded = Tokenizer.load(tmp_path)
    np.testing.assert_array_equal(
        loaded.encode(texts, 32).tokens, tokenizer.encode(texts, 32).tokens
    )
    assert loaded.to_json() == tokenizer.to_json()


def test_a_word_that_nothing_stands_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = json.loads(tokenizer.to_json())
    del settings["model"]["vocab"]["[UNK]"]  # which is still among the added tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"Missing \[UNK\].*tokenizer\.json"):
        Tokenizer.load(tmp_path).encode(["the plot", "\U0001f4a3"], 16)


def test_cased_vocabulary_stays_cased(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.load(tmp_path)
    assert cased.settings["do_lower_case"] is False
    assert cased.encode(["PLOT"], 8).tokens[1] == cased.unk_id


def test_folders_without_a_usable_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json or vocab.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nthe\n[SEP]\nthe\n[MASK]\n")
    with pytest.raises(InputError, match=r"'the' stands twice.*:6"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n[UNK]\n\xff\n")
    with pytest.raises(InputError, match=r"not UTF-8.*:3"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    with pytest.raises(InputError, match=r"no token \[MASK\]"):
        Tokenizer.load(tmp_path)
    for settings in ("{", "[]", "\x00"):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(InputError, match=r"tokenizer_config\.json"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer.*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):  # may name special tokens
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "a", "unk_token": ["a"]}')
    with pytest.raises(InputError, match=r"no token \[PAD\]"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("from_vocabulary", [False, True], ids=["tokenizer.json", "vocab.txt"])
def test_agrees_with_transformers(
    real_encoder: Path, tmp_path: Path, from_vocabulary: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    if from_vocabulary:
        shutil.copy(real_encoder / "vocab.txt", tmp_path)
    ours = Tokenizer.load(tmp_path if from_vocabulary else real_encoder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(real_encoder))
    texts = [
        "A film 's `` charm '' , don't you think?",
        "Çédille ÄÖ naïve café — “quotes” … 100%",
        "你好 mixed with latin, привет",
        "tab\tand nbsp\xa0zero\u200bwidth \x96 control \x7f",
        "[MASK] and [SEP] inside",
        "supercalifragilisticexpialidocious" * 4,
        "🙂 emoji",
        "long " * 600,
    ]
    encoded = ours.encode(texts, 512)
    expected = theirs(texts, truncation=True, max_length=512)["input_ids"]
    assert encoded.tokens.tolist() == [token for row in expected for token in row]
    assert encoded.truncated == 1


@pytest.mark.parametrize(
    ("name", "is_word_piece"),
    [
        *((f"{kind}Tokenizer", True) for kind in ("Bert", "DistilBert", "Electra", "MPNet")),
        *((f"{kind}Tokenizer", True) for kind in ("DPRContextEncoder", "DPRReader", "Splinter")),
        ("BertTokenizerFast", True),
        ("PreTrainedTokenizerFast", True),
        (None, True),
        *(
            (f"{kind}Tokenizer", False)
            for kind in ("BertJapanese", "Bertweet", "Phobert", "RoFormer")
        ),
        ("CharacterBertTokenizer", False),
    ],
)
def test_a_vocabulary_of_another_kind_of_tokenizer_is_refused(tmp_path, name, is_word_piece):
    """Such as one whose words a morphological analysis divides."""
    vocabulary = [*SPECIAL_TOKENS, "a", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    if is_word_piece:
        assert Tokenizer.load(tmp_path).encode(["a film"], 8).tokens.tolist() == [2, 5, 6, 3]
        return
    with pytest.raises(InputError, match=rf"tokenizer_class '{name}' .* with tokenizer.json"):
        Tokenizer.load(tmp_path)
