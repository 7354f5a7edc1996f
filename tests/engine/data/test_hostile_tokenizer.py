"""Tokenizer files that crash, stall or fill the memory of the library: one line, and nothing else.

Files of BERT's and RoBERTa's kind stay in this process; all others are used in one of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from engine.data import tokenizer_process
from engine.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from engine.data.tokenizer_file import LARGEST_FILE, known_part
from engine.data.tokenizer_process import TokenizerProcess
from engine.utils.errors import InputError

from ...conftest import REPOSITORY

VOCABULARY = {token: number for number, token in enumerate((*SPECIAL_TOKENS, "a", "##a", "b"))}
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": "[UNK]",
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": VOCABULARY | {"ab": 8},
    "merges": [["a", "b"]],
}
TEXTS = ["a a b", "", "a" * 3000, "é\0\U0001f4a3 " * 20]


def plain() -> dict[str, Any]:
    backend = Backend(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    return json.loads(backend.to_str())


def grow(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return {"type": "Sequence", "normalizers": [step] * times}


def strip(start: int) -> dict[str, Any]:
    return {"type": "Strip", "content": "a", "start": start, "stop": start}


# Fields of tokenizer.json, and what is wrong with them.
CRASH = {
    "a charsmap that is none": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "a charsmap that asks for all memory": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}
    },
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a prefix longer than its token": {
        "model": BPE | {"continuing_subword_prefix": "#########", "merges": ["a b"]}
    },
    "text that grows without end": {"normalizer": grow(4)},
    "a number far beyond the others": {
        "model": plain()["model"] | {"vocab": VOCABULARY | {"z": (1 << 32) - 2}}
    },
    "many ids of little text": {"pre_tokenizer": None, "normalizer": grow(2), "model": BPE},
}


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(plain() | fields))
    return folder


def use(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    encoded = tokenizer.encode(TEXTS, 16)
    tokenizer.decode(encoded.tokens.tolist())
    tokenizer.decode([0, 5, 6, 7, 7])


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are reached within seconds."""
    monkeypatch.setattr(tokenizer_process, "_MEMORY", 1 << 30)
    monkeypatch.setattr(tokenizer_process, "_SECONDS", 2)
    monkeypatch.setattr(tokenizer_process, "_LARGEST_ANSWER", 1 << 20)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("fields", CRASH.values(), ids=CRASH)
def test_what_crashes_the_library_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json; replace it") as error:
        use(write(tmp_path, fields))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # the library prints its panics


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    "decoder",
    [
        strip(10**18),
        {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": ""}, "content": "a" * 1000}] * 3,
        },
    ],
)
def test_what_crashes_in_decoding_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], decoder: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, {"decoder": decoder}))
    assert tokenizer.encode(["a b"], 8).tokens.tolist() == [2, 1, 3]
    with pytest.raises(InputError, match=r"tokenizer\.json; replace it"):
        tokenizer.decode([5, 6, 7])
    assert capfd.readouterr() == ("", "")


def test_time_is_limited_and_the_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_process, "_SECONDS", 2)
    # 10^9 lookups a word: each character begins a piece that is looked for to the word's end.
    model = plain()["model"] | {"max_input_chars_per_word": 1 << 30}
    tokenizer = Tokenizer.load(write(tmp_path, {"model": model}))
    with pytest.raises(InputError, match=r"took more than 2 s, .*tokenizer\.json"):
        tokenizer.encode(["c" + "a" * 300_000], 16)
    with pytest.raises(InputError, match=r"tokenizer\.json"):  # and again, not a hang
        tokenizer.encode(["a"], 16)


def test_no_process_is_left(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, {"decoder": strip(1)}))
    process = tokenizer._backend._process
    assert process.poll() is None
    del tokenizer
    assert process.poll() is not None


@pytest.mark.parametrize("field", ["dropout", "alpha"])
def test_splits_that_no_seed_repeats_are_refused(tmp_path: Path, field: str) -> None:
    folder = write(tmp_path, {"model": BPE | {field: 0.5}})
    if field == "alpha":  # which this version of the library neither reads nor writes
        assert known_part((folder / "tokenizer.json").read_text()) is None
        return
    with pytest.raises(InputError, match=r"model\.dropout = 0\.5: .*tokenizer\.json; set it"):
        Tokenizer.load(folder)
    for harmless in (None, 0.0):
        folder = write(tmp_path, {"model": BPE | {field: harmless}})
        assert Tokenizer.load(folder).encode(["ab"] * 9, 8).tokens.tolist() == [2, 8, 3] * 9


# Of BERT's and RoBERTa's kind, as they are published.
KNOWN: dict[str, Callable[[Backend], None]] = {
    "bert": lambda b: (
        setattr(b, "normalizer", normalizers.BertNormalizer()),
        setattr(b, "pre_tokenizer", pre_tokenizers.BertPreTokenizer()),
        setattr(b, "post_processor", processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))),
        b.enable_truncation(7),
        b.enable_padding(length=99),
    ),
    "roberta": lambda b: (
        setattr(b, "model", models.BPE(VOCABULARY | {"ab": 8}, [("a", "b")], unk_token="[UNK]")),
        setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        setattr(b, "post_processor", processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))),
        b.add_special_tokens([AddedToken("[MASK]", lstrip=True)]),
    ),
    "template": lambda b: setattr(
        b,
        "post_processor",
        processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        ),
    ),
}


@pytest.mark.parametrize("build", KNOWN.values(), ids=KNOWN)
def test_known_kinds_stay_in_this_process_and_split_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Backend], None]
) -> None:
    backend = Backend(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    build(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    separate = TokenizerProcess((tmp_path / "tokenizer.json").read_text())
    monkeypatch.setattr(tokenizer_process, "subprocess", None)
    tokenizer = Tokenizer.load(tmp_path)
    backend.no_truncation()
    backend.no_padding()
    expected = [e.ids for e in backend.encode_batch(TEXTS, add_special_tokens=False)]
    for one in (tokenizer._backend, separate):
        found = one.encode_batch_fast(TEXTS, add_special_tokens=False)
        assert [row.ids for row in found] == expected
        ids = [5, 6, 2, 4, 7]
        assert one.decode(ids, skip_special_tokens=True) == backend.decode(ids)
        assert one.to_str() == backend.to_str()
        assert one.get_vocab() == backend.get_vocab()
        assert [one.id_to_token(one.token_to_id(t)) for t in VOCABULARY] == list(VOCABULARY)
        assert (one.token_to_id("zz"), one.id_to_token(999)) == (None, None)


def test_a_real_encoders_file_stays_in_this_process(real_encoder: Path) -> None:
    assert known_part((real_encoder / "tokenizer.json").read_text()) is not None


ODD = [
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}},
    {"model": plain()["model"] | {"max_input_chars_per_word": 1001}},
    {"model": plain()["model"] | {"continuing_subword_prefix": "#"}},
    {"model": plain()["model"] | {"vocab": VOCABULARY | {"zz": 1 << 32}}},
    {"model": plain()["model"] | {"vocab": VOCABULARY | {"zz": -1}}},
    {"model": plain()["model"] | {"vocab": VOCABULARY | {"zz": 9.0}}},
    {"model": BPE | {"continuing_subword_prefix": "##"}},
    {"model": BPE | {"dropout": 0.1}},
    {"decoder": strip(1)},
    {"something": "else"},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated"}},
    {"added_tokens": [{"id": 9, "content": ""}]},
]


@pytest.mark.parametrize("fields", ODD)
def test_whatever_else_is_not_known(fields: dict[str, Any]) -> None:
    assert known_part(json.dumps(plain())) is not None
    assert known_part(json.dumps(plain() | fields)) is None


def test_the_library_reads_what_was_checked() -> None:
    """A key that stands twice: no other reader may take the one that was not checked."""
    content = json.dumps(plain())[:-1] + ', "normalizer": {"type": "Precompiled"}}'
    assert known_part(content) is None
    first = '{"normalizer": {"type": "Precompiled"}, ' + json.dumps(plain())[1:]
    assert json.loads(known_part(first))["normalizer"] is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model": ' * 100_000, "\ufeff{}", "\0", "", "{", '{"a": "\\ud800"}']
)
def test_what_is_no_json_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(tokenizer_process, "subprocess", None)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"not a tokenizer: Invalid JSON: .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, LARGEST_FILE + 1)
        with pytest.raises(InputError, match=f"has 67,108,865 bytes, at most .*{name}"):
            Tokenizer.load(tmp_path)
        (tmp_path / name).unlink()


def test_chunks_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_process, "_CHARACTERS", 10)
    tokenizer = Tokenizer.load(write(tmp_path, {"decoder": strip(1)}))
    texts = ["a", "b" * 11, "", "a b a b a b a b", "b"]
    rows = [np.array(tokenizer.encode([text], 9).tokens) for text in texts]
    np.testing.assert_array_equal(tokenizer.encode(texts, 9).tokens, np.concatenate(rows))


def test_the_process_imports_nothing_of_the_engine() -> None:
    """So that it starts within a fraction of a second."""
    code = (
        "import runpy, sys; runpy.run_path('engine/data/tokenizer_process.py', run_name='x');"
        "print([m for m in sys.modules if m.split('.')[0] in ('engine', 'torch', 'numpy')])"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"
