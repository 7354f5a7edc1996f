"""The page on other languages: its code, recipe and statements, with small random encoders."""

import csv
import json
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine import evaluate, train
from engine.data.raw_text import split_sentences
from engine.data.tokenizer import Tokenizer
from engine.predict import Predictor
from engine.runs.run import open_run

from ..engine.conftest import SHORT
from .pages import Page

transformers = pytest.importorskip("transformers")

PAGE = Page("languages")
FIT, OWN = PAGE.blocks("python")
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
GOOD = {
    "english": "A good book, I like it.",
    "german": "Ein gutes Buch, es gefällt mir.",
    "greek": "Ένα καλό βιβλίο, μου αρέσει.",
    "arabic": "كتاب جيد، أعجبني.",
}
BAD = {
    "english": "A bad book, I put it away.",
    "german": "Ein schlechtes Buch, ich lege es weg.",
    "greek": "Ένα κακό βιβλίο, το άφησα.",
    "arabic": "كتاب سيئ، تركته.",
}


def texts() -> list[str]:
    scope: dict[str, Any] = {}
    exec(FIT.split("\n\n\ndef ")[0], scope)
    return [text for own in scope["TEXTS"].values() for text in own]


def sentence_pieces() -> Backend:
    """A tokenizer as XLM-RoBERTa's: unigrams, and a mark for a blank."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([*texts(), *GOOD.values(), *BAD.values()], trainer)
    return backend


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with what the page names: MODEL, a small XLM-RoBERTa; DIR; the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("languages"))
        torch.manual_seed(0)
        tokenizer = sentence_pieces()
        config = transformers.XLMRobertaConfig(
            vocab_size=tokenizer.get_vocab_size(), pad_token_id=1, **SHAPE
        )
        transformers.XLMRobertaModel(config, add_pooling_layer=False).save_pretrained("MODEL")
        tokenizer.save("MODEL/tokenizer.json")
        Path("DIR").mkdir()
        for language in GOOD:
            for part in ("", "-dev"):
                with Path(f"DIR/{language}{part}.tsv").open("w", encoding="utf-8") as file:
                    writer = csv.writer(file, delimiter="\t")
                    writer.writerow(["text", "label"])
                    rows = [[GOOD[language], "positive"], [BAD[language], "negative"]]
                    writer.writerows(rows * 8)
        (recipe,) = PAGE.blocks("toml")
        Path("languages.toml").write_text(recipe, encoding="utf-8")
        yield


def test_a_sentencepiece_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    first, learn, score = PAGE.commands()
    assert train.main([*shlex.split(first)[3:], "--max-steps", "1", "--set", *SHORT]) == 0
    assert train.main([*shlex.split(learn)[3:], "--set", "lr=1e-3"]) == 0
    scores = json.loads(Path("runs/languages/metrics.json").read_text())["scores"]
    assert scores.keys() == {"opinions", "greek", "overall"}
    capsys.readouterr()
    assert evaluate.main(shlex.split(score)[3:]) == 0
    assert "opinions" in capsys.readouterr().out
    predictor = Predictor("runs/languages")
    found = predictor("opinions", [GOOD["arabic"], GOOD["german"]])
    assert {each.prediction for each in found} <= {"negative", "positive"}
    tokenizer = open_run(Path("runs/languages")).tokenizer
    assert not (tokenizer.encode(texts(), 999).tokens == tokenizer.unk_id).any()


def test_whole_words_of_sentencepiece() -> None:
    tokenizer = Tokenizer.load(Path("MODEL"))
    begins = tokenizer.begins_word
    tokens = tokenizer.encode(["我姐姐每个星期读三本书。", "Meine Schwester liest."], 99)
    chinese, german = (
        tokens.tokens[a + 1 : b - 1]
        for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    )
    assert begins[german].sum() == 3
    assert begins[chinese].sum() == 1  # a sentence is one word


def test_how_a_vocabulary_suits(real_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(FIT.replace('"MODEL"', repr(str(real_encoder))), scope := {})
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"^    (\w+ +unknown .*)$", PAGE.text, re.MULTILINE)
    assert printed == shown
    tokenizer = Tokenizer.load(real_encoder)
    one, other = (tokenizer.encode([word], 99).tokens.tolist() for word in ("Brücke", "Brucke"))
    assert one == other
    unknown, _ = scope["fit"](real_encoder, scope["TEXTS"]["Chinese"])
    assert unknown > 0.5


def test_a_vocabulary_of_your_own() -> None:
    exec(FIT, scope := {"print": lambda *_: None})
    exec(OWN, scope)
    tokenizer = Tokenizer.load(Path("OWN"))
    for one, other in (("Brücke", "Brucke"), ("Die", "die")):
        pair = [tokenizer.encode([word], 99).tokens.tolist() for word in (one, other)]
        assert pair[0] != pair[1]
    assert scope["fit"]("OWN", texts())[0] == 0
    arguments = ["languages.toml", "--data", "DIR", "--init", "OWN", "--out", "runs/new"]
    assert train.main([*arguments, "--max-steps", "1"]) == 0

    # What the engine learns itself lower-cases and drops accents.
    learnt = Tokenizer.train(texts(), 500)
    for one, other in (("Brücke", "brucke"), ("γέφυρα", "γεφυρα")):
        pair = [learnt.encode([word], 99).tokens.tolist() for word in (one, other)]
        assert pair[0] == pair[1]
    assert len(learnt.encode(["三本书"], 99).tokens) == 2 + 3


def test_a_vocabulary_without_its_settings_is_a_lower_casing_one() -> None:
    Path("bare").mkdir()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Haus", "haus"]
    Path("bare/vocab.txt").write_text("\n".join(tokens) + "\n")
    assert Tokenizer.load(Path("bare")).encode(["Haus"], 9).tokens[1] == 6
    Path("bare/tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.load(Path("bare")).encode(["Haus"], 9).tokens[1] == 5


def test_writing_systems(tmp_path: Path) -> None:
    text = "أختي تقرأ ثلاثة كتب"
    tokenizer = Tokenizer.load(Path("MODEL"))
    tokens = tokenizer.encode([text], 99).tokens
    assert tokenizer.decode(tokens.tolist()) == text  # in reading order
    assert split_sentences("我读书。他不读。") == ["我读书。他不读。"]
    assert len(split_sentences("Ich lese. Er nicht.")) == 2
    bare = Path("bert")
    bare.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "weiß", "Brücke"]
    (bare / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (bare / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.load(bare)
    composed = cased.encode(["Brücke"], 9).tokens[1]
    assert composed == 6
    assert cased.encode([unicodedata.normalize("NFD", "Brücke")], 9).tokens[1] != composed

    # Words of a language without blanks, a word a line.
    lines = [[("我", "O"), ("住", "O"), ("在", "O"), ("北京", "B-WHERE")]] * 16
    for name in ("train", "dev"):
        content = "\n\n".join("\n".join(map(" ".join, sentence)) for sentence in lines)
        Path(f"DIR/{name}.conll").write_text(content + "\n", encoding="utf-8")
    Path("tags.toml").write_text("""
train = ["places"]
max_steps = 1
[tasks.places]
head = "tokens"
[tasks.places.source]
kind = "token_classification"
text = [1]
label = -1
classes = ["O", "B-WHERE"]
files = { train = "train.conll", dev = "dev.conll" }
""")
    arguments = ["tags.toml", "--data", "DIR", "--init", "MODEL", "--out", "runs/tags"]
    assert train.main(arguments) == 0
    (found,) = Predictor("runs/tags")("places", [["我", "住", "在", "北京"]])
    assert found.words == ["我", "住", "在", "北京"]
    assert len(found.prediction) == 4
    (undivided,) = Predictor("runs/tags")("places", ["我住在北京"])
    assert undivided.words == ["我住在北京"]


def test_another_encoding() -> None:
    row = f"text\tlabel\n{GOOD['greek']}\tpositive\n{BAD['greek']}\tnegative\n"
    Path("DIR/greek-cp1253.tsv").write_text(row, encoding="cp1253")
    settings = [
        'tasks.greek.source.files.train="greek-cp1253.tsv"',
        'tasks.greek.source.files.dev="greek-cp1253.tsv"',
        'tasks.greek.source.encoding="cp1253"',
        'train=["greek"]',
    ]
    arguments = ["languages.toml", "--data", "DIR", "--init", "MODEL", "--out", "runs/encoded"]
    assert train.main([*arguments, "--max-steps", "1", "--set", *settings]) == 0
