"""Words with tags, and lists of labels: every layout of file, tokens of words, ugly input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pyarrow import parquet
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from engine.data.origins import DataFile
from engine.data.source import TaskSource
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import Table
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

WORDS = [["Ann", "sees", "New", "York"], ["unbelievable", "!"]]
TAGS = [["B-PER", "O", "B-LOC", "I-LOC"], ["O", "O"]]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
NUMBERS = [1, 0, 3, 4, 0, 0]

CONLL = "-DOCSTART- -X- O\n\nAnn NNP B-PER\nsees VBZ O\nNew NNP B-LOC\nYork NNP I-LOC\n\n\n"
CONLL += "unbelievable JJ O\n! . O"
CONLLU = "# sent_id = 1\n1\tAnn\tB-PER\n2-3\tx\t_\n2\tsees\tO\n3\tNew\tB-LOC\n4\tYork\tI-LOC\n\n"
CONLLU += "# text = unbelievable!\n1\tunbelievable\tO\n1.1\tis\tO\n2\t!\tO\n"
RECORDS = [{"tokens": w, "tags": t} for w, t in zip(WORDS, TAGS, strict=True)]


def source_of(name: str, **fields: object) -> TaskSource:
    given = {"kind": "token_classification", "text": ["tokens"], "label": "tags", "classes": NAMES}
    return TaskSource(**(given | {"files": {"train": name}} | fields))


def read(path: Path, **fields: object) -> Table:
    labelled, on_bad_row = fields.pop("labelled", True), fields.pop("on_bad_row", "error")
    form = source_of(path.name, **fields).format("ner")
    return DataFile(path).table(form, labelled=labelled, on_bad_row=on_bad_row)


def written(folder: Path, name: str) -> Path:
    path = folder / name
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    text = {
        "t.conll": CONLL,
        "t.conllu": CONLLU,
        "crlf.conll": CONLL.replace("\n", "\r\n"),
        "t.jsonl": lines,
        "t.json": json.dumps(RECORDS),
        "t.tsv": "tokens\ttags\n"
        + "".join(f"{' '.join(w)}\t{' '.join(t)}\n" for w, t in zip(WORDS, TAGS, strict=True)),
    }
    if name == "t.parquet":
        parquet.write_table(pa.table({"tokens": WORDS, "tags": TAGS}), path)
    else:
        path.write_bytes(text[name].encode())
    return path


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t.conll", {"text": [1], "label": 3}),
        ("t.conll", {"text": [1], "label": -1}),
        ("crlf.conll", {"text": [1], "label": -1}),
        ("t.conllu", {"text": [2], "label": 3}),
        *((name, {}) for name in ("t.jsonl", "t.json", "t.tsv", "t.parquet")),
    ],
)
def test_every_layout_gives_the_same_table(tmp_path: Path, name: str, fields: dict) -> None:
    table = read(written(tmp_path, name), **fields)
    assert table.words == WORDS
    assert table.sentences == ([" ".join(words) for words in WORDS],)
    assert table.labels.tolist() == NUMBERS
    assert table.ids == ["0", "1"]
    plain = read(written(tmp_path, name), labelled=False, **fields)
    assert plain.words == WORDS
    assert plain.labels is None


def test_a_data_set_by_name_has_lists_of_class_labels(tmp_path: Path) -> None:
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]  # in another order than the recipe's
    numbers = [[names.index(tag) for tag in tags] for tags in TAGS]
    features = Features(tokens=List(Value("string")), tags=List(ClassLabel(names=names)))
    data = Dataset.from_dict({"tokens": WORDS, "tags": numbers}, features=features)
    (tmp_path / "ner").mkdir()
    data.to_parquet(tmp_path / "ner" / "train.parquet")
    source = source_of("", files={}, dataset=str(tmp_path / "ner"))
    origin = source.origin("ner", "train", None)
    table = origin.table(source.format("ner"), labelled=True, on_bad_row="error")
    assert (table.words, table.labels.tolist()) == (WORDS, NUMBERS)


BAD = {
    "tags and words differ in number: 1 and 2": {"tokens": ["a", "b"], "tags": ["O"]},
    "label is not among the classes: 'B-X'": {"tokens": ["a"], "tags": ["B-X"]},
    "I-PER without its B-PER, word 2": {"tokens": ["a", "b"], "tags": ["O", "I-PER"]},
    "no words": {"tokens": [], "tags": []},
    "an empty word": {"tokens": ["a", " "], "tags": ["O", "O"]},
    "neither text nor number: no value in a list": {"tokens": ["a", None], "tags": ["O", "O"]},
    "neither text nor number: nan in a list": {"tokens": ["a", float("nan")], "tags": ["O", "O"]},
    "neither text nor number: dict": {"tokens": {"a": 1}, "tags": ["O"]},
    "neither text nor number: list in a list": {"tokens": [["a"]], "tags": ["O"]},
    "not Unicode": {"tokens": ["\ud800"], "tags": ["O"]},
    "missing column": {"tokens": ["a"]},
}


@pytest.mark.parametrize(("message", "record"), BAD.items(), ids=BAD)
def test_bad_rows_are_named_and_can_be_skipped(tmp_path: Path, message: str, record: dict) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (record, *RECORDS)))
    with pytest.raises(InputError) as error:
        read(path)
    assert message in str(error.value)
    assert f"{path}:1" in str(error.value)
    assert "\n" not in str(error.value)
    table = read(path, on_bad_row="skip")
    assert (table.words, table.labels.tolist()) == (WORDS, NUMBERS)
    assert list(table.bad_rows.values()) == [1]
    blanked = read(path, on_bad_row="blank")
    assert blanked.words == [[], *WORDS]
    assert blanked.blank == (0,)


def test_a_line_of_a_column_file_that_is_too_short_costs_its_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.conll"
    path.write_text("a X O\nb\nc X O\n\n" + CONLL)
    with pytest.raises(InputError, match=r"number of fields: 1, expected 3 or more, .*t.conll:2"):
        read(path, text=[1], label=3)
    assert read(path, text=[1], label=3, on_bad_row="skip").words == WORDS
    with pytest.raises(InputError, match=r"no column 'tokens', .*called 1, 2, … or -1"):
        read(path)


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u2009", "\x85", "\u2028", "\x0c"])
@pytest.mark.parametrize("sign", [" ", "\t", " \t "])
def test_only_blanks_and_tabs_separate_fields(tmp_path: Path, blank: str, sign: str) -> None:
    path, number = tmp_path / "t.conll", f"10{blank}000"
    lines = [[number, "CD", "O"], ["Ann", "NNP", "B-PER"]]
    path.write_bytes("\n".join(map(sign.join, lines)).encode())
    for label in (3, -1):
        table = read(path, text=[1], label=label)
        assert (table.words, table.labels.tolist()) == ([[number, "Ann"]], [0, 1])
    path.write_bytes(f"Ann{sign}O\n{blank}{sign}O\n".encode())
    with pytest.raises(InputError, match=r"an empty word: column '1'"):
        read(path, text=[1], label=-1)


def test_reasons_are_counted_whatever_the_words_are(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    rows = "".join(f"[{word}]\tO\n" for word in ("null", "[]", "{}", "[1]"))
    path.write_text(f"tokens\ttags\n{rows}a\tO\n")
    table = read(path, on_bad_row="skip")
    assert table.bad_rows == {"a list with neither text nor numbers": 4}


def test_labels_of_several_as_lists_and_as_columns(tmp_path: Path) -> None:
    rows = [["fun", "long"], [], ["dull"]]
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    classes = ("fun", "dull", "long")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": "a film", "label": row}) + "\n" for row in rows)
    )
    (tmp_path / "t.csv").write_text('text,label\na film,"fun, long"\na film,[]\na film,dull\n')
    (tmp_path / "c.csv").write_text("text,fun,dull,long\na,1,0,true\nb,0,0,0\nc,0,1.0,False\n")
    parquet.write_table(pa.table({"text": ["a"] * 3, "label": rows}), tmp_path / "t.parquet")
    several = {"kind": "multi_label_classification", "text": ["text"]}
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        table = read(tmp_path / name, **several, label="label", classes=classes)
        assert table.labels.tolist() == expected
        assert table.strata.tolist() == [2, 0, 1]
    table = read(tmp_path / "c.csv", **several, label=classes, classes=())
    assert table.labels.tolist() == expected


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "empty label list: write [] for an example without a label"),
        ("fun;dul", "label is not among the classes: 'dul'"),
        ('"[{}]"', "a list with neither text nor numbers: {}"),
        ("fun;", "label is not among the classes: ''"),
    ],
)
def test_bad_lists_of_labels(tmp_path: Path, cell: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"text,label\na film,{cell}\n")
    fields = {"kind": "multi_label_classification", "text": ["text"], "label": "label"}
    with pytest.raises(InputError) as error:
        read(path, **fields, classes=("fun", "dull"), label_separator=";")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": ("a", "b")}, "label: token_classification has one column of labels"),
        ({"scheme": "BIO", "classes": ("O", "X")}, "scheme: 'X' is no tag of BIO"),
        ({"label_separator": ";"}, "label_separator: has no effect on token_classification"),
        ({"text": ("a", "b")}, "token_classification needs 1 column"),
        ({"kind": "multi_label_classification", "scheme": "BIO"}, "scheme: has no effect"),
        ({"kind": "multi_label_classification", "label": ("a", "b")}, "classes: the columns"),
        (
            {"kind": "multi_label_classification", "label": ("a",), "classes": ()},
            "label: expected the columns of two labels or more",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_of("t.jsonl", **fields)


# Words of one token, of several, of none (a control character is nothing to WordPiece), unknown.
UGLY = [["the", "unbelievable", "\u200e", "Zürich", "\u4e2d\u6587", "a" * 150], ["\u200e"], ["x"]]


def test_words_are_split_as_transformers_splits_them(real_encoder: Path) -> None:
    ours, theirs = Tokenizer.load(real_encoder), AutoTokenizer.from_pretrained(real_encoder)
    for limit in (512, 9, 6, 3):
        encoded, sizes = ours.encode_words(UGLY, limit)
        for text, words in enumerate(UGLY):
            expected = theirs(words, is_split_into_words=True, truncation=True, max_length=limit)
            own = encoded.tokens[encoded.offsets[text] : encoded.offsets[text + 1]]
            assert own.tolist() == expected.input_ids
            begin = sum(map(len, UGLY[:text]))
            numbers = [number for number in expected.word_ids() if number is not None]
            counts = [numbers.count(number) for number in range(len(words))]
            assert sizes[begin : begin + len(words)].tolist() == counts
        assert encoded.truncated == sum(
            len(theirs(words, is_split_into_words=True).input_ids) > limit for words in UGLY
        )


def test_byte_level_words_are_split_as_in_running_text() -> None:
    backend = Backend(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the film was fine , the film was long"] * 3, trainer)
    tokenizer = Tokenizer(backend)
    encoded, sizes = tokenizer.encode_words([["the", "film", "was"], ["film"]], 64)
    whole = tokenizer.encode(["the film was", "film"], 64)
    np.testing.assert_array_equal(encoded.tokens, whole.tokens)
    assert sizes.sum() == len(whole.tokens) - 4


@pytest.fixture
def words(tokenizer: Tokenizer) -> TokenizedSplit:
    """Texts of several words: cut off, without a token, and usual ones."""
    texts = [["the", "unbelievable", "film"], ["\u200e"], ["a"] * 12, ["it", "\u200e", "was"]]
    tags = np.arange(sum(map(len, texts)), dtype=np.float32) % 5
    joined = ([" ".join(text) for text in texts],)
    table = Table(ids=list("abcd"), sentences=joined, labels=tags, words=texts)
    return tokenize("ner", table, tokenizer, 10)


@pytest.mark.parametrize("all_pieces", [False, True])
def test_positions_are_of_the_words_own_tokens(
    words: TokenizedSplit, tokenizer: Tokenizer, all_pieces: bool
) -> None:
    split = replace(words, all_pieces=all_pieces)
    for chosen in ([0, 1, 2, 3], [3, 0], [1], [2, 2]):
        batch = split.task_batch(np.array(chosen), 0)
        positions, targets = (x.numpy() for x in batch.labels)
        expected_positions, expected_targets, start = [], [], 0
        for example in chosen:
            begin, end = split.word_offsets[example : example + 2]
            place = start + 1
            for word in range(begin, end):
                size = int(split.word_sizes[word])
                own = range(place, place + size) if all_pieces else [place if size else -1]
                expected_positions += own
                expected_targets += [int(split.labels[word]) if size else -100] * len(own)
                place += size
            start += int(split.lengths[example])
        assert positions.tolist() == expected_positions
        assert targets.tolist() == expected_targets
        assert batch.terms == split.terms(np.array(chosen)) == sum(t >= 0 for t in targets)
    assert split.truncated >= 1
    assert split.unseen.sum() >= 4  # two without a token, and those behind the limit


def test_words_can_be_written_and_read_again() -> None:
    form = source_of("t.jsonl").format("ner")
    for numbers in ([0, 1, 2, 3], [0]):
        assert form.parse_labels([form.spell_labels(numbers)], len(numbers)) == numbers
    assert form.spell_labels([0, -1]) == "O _"
    odd = source_of("t.jsonl", classes=("a b", "c")).format("pos")
    assert odd.spell_labels([0, 1]) == '["a b", "c"]'
    assert odd.parse_labels([odd.spell_labels([0, 1])], 2) == [0, 1]
    fields = {"kind": "multi_label_classification", "classes": ("a,b", "c", "d")}
    several = source_of("t.jsonl", **fields).format("topics")
    for values in ([0, 0, 0], [0, 1, 1], [1, 0, 1]):
        assert several.parse_labels([several.spell_labels(values)]) == values
