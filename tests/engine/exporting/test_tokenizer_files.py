"""Whatever a tokenizer.json did, an export's frames sentences and pairs as the engine does."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from engine.data.split import tokenize
from engine.data.table import Table
from engine.data.tokenizer import Tokenizer
from engine.exporting.tokenizer_files import write_tokenizer
from engine.models.bert import BertConfig
from engine.models.modernbert import ModernBertConfig

from ..models.byte_pairs import byte_pairs

TEXTS = ["the film was good", "a story of people and rain"]
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}


def template(first: str, last: str, pair: str, numbers: dict[str, int]) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        kind = "Sequence" if name in ("A", "B") else "SpecialToken"
        return {kind: {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [part(first), part("A"), part(last)],
        "pair": [part(name) for name in pair.split()],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in numbers.items()
        },
    }


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
ROBERTAS = template("<s>", "</s>", "<s> A </s> </s> B </s>", {"<s>": 0, "</s>": 2})
NO_SEGMENTS = template("[CLS]", "[SEP]", "[CLS] A [SEP] B [SEP]", {"[CLS]": 2, "[SEP]": 3})
# By the tokenizer, what its file says, and whether an export says the same.
PROCESSORS = {
    "bert-none": (None, False),
    "bert-own": ({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}, True),
    "bert-other-numbers": (
        {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 3]},
        False,
    ),
    "bert-no-segments": (NO_SEGMENTS, False),
    "bert-no-last": (template("[CLS]", "[CLS]", "[CLS] A B", {"[CLS]": 2}), False),
    "roberta-own": (
        {
            "type": "RobertaProcessing",
            "sep": ["</s>", 2],
            "cls": ["<s>", 0],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        True,
    ),
    "roberta-one-separator": (
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
        False,
    ),
    "roberta-template": (ROBERTAS, True),
    "roberta-byte-level": (BYTE_LEVEL, False),
    "roberta-sequence": ({"type": "Sequence", "processors": [BYTE_LEVEL, ROBERTAS]}, True),
    "roberta-sequence-of-one": ({"type": "Sequence", "processors": [BYTE_LEVEL]}, False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_sentences_and_pairs_are_framed_as_in_training(tmp_path, name) -> None:
    processor, is_kept = PROCESSORS[name]
    if name.startswith("bert"):
        backend = Backend.from_str(Tokenizer.train(TEXTS * 9, 90).to_json())
    else:
        backend = byte_pairs(TEXTS * 9)
    content = json.loads(backend.to_str()) | {"post_processor": processor}
    tokenizer = Tokenizer(Backend.from_str(json.dumps(content)))
    config = BertConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
    run = SimpleNamespace(tokenizer=tokenizer, config=config, max_length=64)
    write_tokenizer(tmp_path, run)
    written = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert (written == json.loads(tokenizer.to_json())["post_processor"]) == is_kept

    theirs = Backend.from_file(str(tmp_path / "tokenizer.json"))
    table = Table(["0"], ([TEXTS[0]], [TEXTS[1]]), None)
    split = tokenize("", table, tokenizer, 64)
    sentences = np.split(split.tokens, split.offsets[1:-1])
    for text, ours in zip(TEXTS, sentences, strict=True):
        assert theirs.encode(text).ids == ours.tolist()
    pair = tokenize("", table, tokenizer, 64, joins_pairs=True)
    encoding = theirs.encode(*TEXTS)
    assert encoding.ids == pair.tokens.tolist()
    if pair.token_types is not None:
        assert encoding.type_ids == pair.token_types.tolist()
    if name.startswith("roberta"):  # without the blank before a word
        assert theirs.encode(TEXTS[0]).offsets[-2][1] == len(TEXTS[0])


def test_an_encoder_without_token_types_is_given_none(tmp_path) -> None:
    tokenizer = Tokenizer.train(TEXTS, 90)
    config = ModernBertConfig(vocab_size=90, **SHAPE)
    write_tokenizer(tmp_path, SimpleNamespace(tokenizer=tokenizer, config=config, max_length=9))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["model_max_length"] == 9
