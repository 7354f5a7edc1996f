"""``tokenizer.json`` of every model that the library ``tokenizers`` has, and parts to graft in."""

import base64
import copy
import json
import random
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, trainers

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_CORPUS = ["a fine film with a dull end", "will it rain soon", "the cat sat on the mat", "no"] * 3


def whole_tokenizers(vocab_size: int) -> list[tuple[str, dict[str, Any]]]:
    """Return tokenizers that can be used, of at most so many entries, by name."""
    size = min(vocab_size, 90)
    made = {
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
        "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer),
        "BPE with dropout": (models.BPE(unk_token="[UNK]", dropout=0.5), trainers.BpeTrainer),
        "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer),
    }
    found = []
    for name, (model, trainer) in made.items():
        tokenizer = Tokenizer(model)
        unknown = {"unk_token": "[UNK]"} if name == "Unigram" else {}
        training = trainer(vocab_size=size, special_tokens=_SPECIAL, show_progress=False, **unknown)
        tokenizer.train_from_iterator(_CORPUS, training)
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
        found.append((name, json.loads(tokenizer.to_str())))
    return found


def _charsmap(draw: random.Random) -> Any:
    """Return what stands in a ``Precompiled``: a length, a trie and texts, or what is none."""
    trie = draw.randbytes(draw.choice([0, 4, 64, 1024]))
    lengths = [len(trie), 0, 1, 3, len(trie) + 4, 2**31, 2**32 - 1]
    texts = draw.choice([b"", b"a\0b\0", b"\xff\xfe", b"\xed\xa0\x80\0"])
    whole = draw.choice(lengths).to_bytes(4, "little") + trie + texts
    encoded = base64.b64encode(whole).decode()
    return draw.choice([encoded, encoded, encoded, "", "AA", "AAAA", "AAAAAA==", "!", None, 0, []])


_REGEXES = [
    *(
        "",
        ".",
        "(",
        "a*",
        "(a+)+$",
        "(?<=a)b",
        "\\p{L}+",
        "[",
        "(?R)",
        "((((((((((x))))))))))" * 40,
    ),
    *("(?=.*)", "$", "\\b", "x{1000}{1000}", "(.*)*\\1", "\\x{110000}", "[\\d-x]"),
]


def _pattern(draw: random.Random) -> Any:
    text = draw.choice(_REGEXES)
    return draw.choice([{"Regex": text}, {"Regex": text}, {"String": text}, text, {}])


def _part(kind: str, draw: random.Random, depth: int = 0) -> Any:
    """Return a normalizer, pre-tokenizer, post-processor or decoder with fields of any value."""
    number = draw.choice([-1, 0, 1, 2, 3, 1000, 2**31, 2**63, 2**64, 1e300])
    text = draw.choice(["", " ", "\u2581", "##", "ab", "\0", "x" * 5000])
    behavior = draw.choice(["Removed", "Isolated", "MergedWithPrevious", "Contiguous", "x"])
    split = {"pattern": _pattern(draw), "behavior": behavior, "invert": draw.random() < 0.5}
    switch, scheme = draw.random() < 0.5, draw.choice(["always", "never", "first", "x"])
    meta = {"type": "Metaspace", "replacement": text, "prepend_scheme": scheme, "split": switch}
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": switch,
        "trim_offsets": True,
        "use_regex": switch,
    }
    replace = {"type": "Replace", "pattern": _pattern(draw), "content": text}
    strip = {"type": "Strip", "content": text, "start": number, "stop": number}
    pairs = {"type": "RobertaProcessing", "sep": [text, number], "cls": ["[CLS]", number]}
    template = {
        "type": "TemplateProcessing",
        "single": draw.choice([[], [{"Sequence": {"id": "A", "type_id": number}}]]),
        "pair": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "special_tokens": draw.choice([{}, {"x": {"id": "x", "ids": [number], "tokens": []}}]),
    }
    parts: dict[str, list[Any]] = {
        "normalizer": [
            {"type": "Precompiled", "precompiled_charsmap": _charsmap(draw)},
            {"type": "Precompiled", "precompiled_charsmap": _charsmap(draw)},
            *(replace, {"type": "Prepend", "prepend": text}, {"type": "ByteLevel"}),
            {"type": "Strip", "strip_left": switch, "strip_right": True},
            *({"type": name} for name in ("NFC", "NFKD", "Nmt", "Lowercase", "StripAccents", "X")),
        ],
        "pre_tokenizer": [
            *({"type": "Split", **split}, {"type": "Split", **split}, meta, bytes_),
            *(
                {"type": "FixedLength", "length": number},
                {"type": "Digits", "individual_digits": switch},
            ),
            *({"type": "CharDelimiterSplit", "delimiter": text}, {"type": "UnicodeScripts"}),
            {"type": "Punctuation", "behavior": behavior},
        ],
        "post_processor": [template, pairs, bytes_],
        "decoder": [replace, meta, strip, {"type": "ByteFallback"}, {"type": "CTC"}, bytes_],
    }
    if depth < 3 and draw.random() < 0.2:
        name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(
            kind, "processors"
        )
        return {"type": "Sequence", name: [_part(kind, draw, depth + 1) for _ in range(2)]}
    return draw.choice(parts[kind])


def graft(document: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """Return a tokenizer with one to three of its parts replaced, and which."""
    corrupted, said = copy.deepcopy(document), []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.choice(
            ["normalizer", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"]
        )
        if kind == "model":
            said.append(f"model {_graft_model(corrupted['model'], draw)}")
        else:
            corrupted[kind] = _part(kind, draw)
            said.append(f"{kind} {corrupted[kind]['type']}")
    return corrupted, " and ".join(said)


def _graft_model(model: dict[str, Any], draw: random.Random) -> str:
    """Replace one field of a model: numbers at their edges, merges and scores that do not fit."""
    values: dict[str, list[Any]] = {
        "dropout": [0.0, 0.5, 1.0, 2.0, -1.0, None],
        "unk_id": [None, 0, 10**6, -1],
        "unk_token": [None, "", "missing"],
        "max_input_chars_per_word": [0, 1, 2**63, -1],
        "continuing_subword_prefix": ["", None, "##", "x" * 5000],
        "end_of_word_suffix": ["", "</w>"],
        "byte_fallback": [True],
        "fuse_unk": [True],
        "ignore_merges": [True],
        "merges": [[], [["a", "b"]], ["a b"], [["x"]], [["a", "missing"]], ["a"], 0],
        "vocab": [{}, [], {"a": 0}, [["a", 0.0]], [["a", 1e300]], [["a", -1e300], ["b", 0]]],
        "type": ["BPE", "Unigram", "WordLevel", "WordPiece", "X"],
    }
    key = draw.choice([key for key in values if key in model or draw.random() < 0.2] or ["type"])
    model[key] = draw.choice(values[key])
    return key
