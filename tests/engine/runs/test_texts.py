"""The cached vocabulary, and the texts of objectives: what makes them anew."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import recipe as recipes
from engine.config.recipe import Recipe
from engine.data import tokenizer
from engine.data.cache import Reading
from engine.runs import objectives, texts
from engine.runs.objectives import load_examples
from engine.runs.texts import learn_vocabulary
from engine.utils import fingerprint
from engine.utils.errors import InputError

ROWS = "".join(f"{number}\tthis is a fine film {number}\t{number % 2}\n" for number in range(200))
RECIPE = """
train = ["t", "words"]
batch_size = 4
[tasks.t]
head = "single"
[tasks.t.source]
kind = "classification"
text = ["text"]
classes = 2
files = { train = "rows.tsv", dev = "rows.tsv" }
[objectives.words]
kind = "masked_lm"
files = ["lines.txt"]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A recipe on a table and a text; and a cache of its own."""
    monkeypatch.setenv("SUPERBERT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.tsv").write_text("id\ttext\tlabel\n" + ROWS)
    (tmp_path / "lines.txt").write_text("".join(f"line {n} of a text\n" for n in range(200)))
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def read(*settings: str) -> Recipe:
        fields = [f"data={tmp_path}", "encoder.vocab_size=80", *settings]
        return recipes.load(str(tmp_path / "recipe.toml"), fields)

    return read


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each vocabulary was to have that was learnt, not read from the cache."""
    sizes, train = list[int](), tokenizer.Tokenizer.train.__func__

    def learn(cls, found, vocab_size):
        sizes.append(vocab_size)
        return train(cls, found, vocab_size)

    monkeypatch.setattr(tokenizer.Tokenizer, "train", classmethod(learn))
    return sizes


def change(path: Path, *, keep_time: bool = False) -> None:
    """Change a word in the middle of a file."""
    before, content = path.stat(), path.read_bytes()
    at = content.index(b" a ", len(content) // 2) + 1
    path.write_bytes(content[:at] + b"q" + content[at + 1 :])
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_vocabulary_is_learnt_once(recipe, learnt) -> None:
    first = learn_vocabulary(recipe(), Reading())
    second = learn_vocabulary(recipe("lr=1e-3", "epochs=7"), Reading())
    assert learnt == [80]
    assert first.to_json() == second.to_json()
    assert first.special_tokens == second.special_tokens


@pytest.mark.parametrize("file", ["rows.tsv", "lines.txt"])
def test_a_changed_text_makes_it_anew(recipe, learnt, tmp_path: Path, file: str) -> None:
    learn_vocabulary(recipe(), Reading())
    change(tmp_path / file, keep_time=True)
    assert "q" in learn_vocabulary(recipe(), Reading()).to_json()
    assert len(learnt) == 2


@pytest.mark.parametrize(
    "setting",
    [
        "encoder.vocab_size=70",
        "on_bad_row=skip",
        "tasks.t.source.quoting=none",
        'tasks.t.source.text=["id"]',
        'train=["t"]',
        'train=["words"]',
    ],
)
def test_other_settings_make_another(recipe, learnt, setting: str) -> None:
    learn_vocabulary(recipe(), Reading())
    learn_vocabulary(recipe(setting), Reading())
    learn_vocabulary(recipe(), Reading())
    assert len(learnt) == 2


def damage_a_bit(entry: Path) -> None:
    content = bytearray((entry / "text").read_bytes())
    content[-5] ^= 1
    (entry / "text").write_bytes(content)


def damage_by_cutting(entry: Path) -> None:
    os.truncate(entry / "text", 10)


def damage_by_removal(entry: Path) -> None:
    (entry / "text").unlink()


@pytest.mark.parametrize("damage", [damage_a_bit, damage_by_cutting, damage_by_removal])
def test_a_damaged_one_is_made_again(recipe, learnt, tmp_path: Path, damage) -> None:
    first = learn_vocabulary(recipe(), Reading())
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    for _ in range(2):
        assert learn_vocabulary(recipe(), Reading()).to_json() == first.to_json()
    assert len(learnt) == 2
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_large_texts_are_known_by_samples_or_verified(
    recipe, learnt, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 512)
    monkeypatch.setattr(fingerprint, "_SAMPLE", 4)
    monkeypatch.setattr(fingerprint, "_SAMPLES", 4)
    first = recipe()
    words = learn_vocabulary(first, Reading())
    load_examples("words", first, words, 16, Reading())
    change(tmp_path / "lines.txt", keep_time=True)
    assert learn_vocabulary(first, Reading()).to_json() == words.to_json()  # missed
    assert len(learnt) == 1
    assert learn_vocabulary(first, Reading(verify=True)).to_json() != words.to_json()
    learn_vocabulary(first, Reading(verify=True))
    assert len(learnt) == 2
    written = []
    write = objectives.write_sequences

    def count(*given: object) -> None:
        written.append(given)
        write(*given)

    monkeypatch.setattr(objectives, "write_sequences", count)
    for verify, times in ((False, 0), (True, 1), (True, 1), (False, 1)):
        load_examples("words", first, words, 16, Reading(verify=verify))
        assert len(written) == times


def test_the_seed_makes_other_sequences_where_it_draws_texts(recipe, tmp_path: Path) -> None:
    words = learn_vocabulary(recipe(), Reading())
    for settings in ((), ("objectives.words.max_per_source=9",)):  # the first lines
        before = len(list((tmp_path / "cache").iterdir()))
        for seed in (1, 2):
            load_examples("words", recipe(f"seed={seed}", *settings), words, 16, Reading())
        assert len(list((tmp_path / "cache").iterdir())) == before + 1
    tasks = ("objectives.words.files=[]", "objectives.words.max_per_source=9")
    for seed in (1, 2):
        load_examples("words", recipe(f"seed={seed}", *tasks), words, 16, Reading())
    assert len(list((tmp_path / "cache").iterdir())) == before + 3


@pytest.mark.parametrize("file", ["rows.tsv", "lines.txt"])
def test_a_text_that_changes_while_a_vocabulary_is_learnt(
    recipe, tmp_path: Path, monkeypatch, file: str
) -> None:
    original = texts.VocabularyTexts._all

    def disturbed(self):
        for number, text in enumerate(original(self)):
            if number == 50:
                change(tmp_path / file)
            yield text

    monkeypatch.setattr(texts.VocabularyTexts, "_all", disturbed)
    with pytest.raises(InputError, match=f"changed while it was read, .*{file}"):
        learn_vocabulary(recipe(), Reading())
    assert not any((tmp_path / "cache").glob("*"))


def test_a_text_of_an_objective_that_changes_while_it_is_read(
    recipe, tmp_path: Path, monkeypatch
) -> None:
    words = learn_vocabulary(recipe(), Reading())
    before = list((tmp_path / "cache").iterdir())
    write = objectives.write_sequences

    def disturbed(found, *given: object) -> None:
        write(found, *given)
        change(tmp_path / "lines.txt")

    monkeypatch.setattr(objectives, "write_sequences", disturbed)
    with pytest.raises(InputError, match=r"changed while it was read, .*lines\.txt"):
        load_examples("words", recipe(), words, 16, Reading())
    assert list((tmp_path / "cache").iterdir()) == before


def test_what_is_shown_of_it(recipe, monkeypatch) -> None:
    monkeypatch.setattr(texts, "_SHOWN", 150)
    shown: list[object] = []

    class Watch:
        def __init__(self, name: str, counted: str) -> None:
            shown.append((name, counted))

        def __enter__(self) -> object:
            return lambda *found: shown.append(found)

        def __exit__(self, *_: object) -> None:
            pass

    learn_vocabulary(recipe(), Reading(watch=Watch))
    name, *found = shown
    assert name == ("t, lines.txt twice, for a vocabulary", "texts")
    # A share is known when a piece is read, and each of these small files is one.
    assert found == [(150, 0.0), (300, 0.25), (450, 0.5), (600, 0.5), (750, 0.75)]


def test_what_is_shown_of_an_objective(recipe, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "_SHOWN", 2000)
    lines = "".join(f"line {n} of a text, {'long ' * 20}\n" for n in range(20_000))
    (tmp_path / "lines.txt").write_text(lines)
    words, shown = learn_vocabulary(recipe(), Reading()), list[tuple[int, float]]()

    @contextmanager
    def watch(*_what: str) -> Iterator[object]:
        yield lambda *found: shown.append(found)

    load_examples("words", recipe(), words, 16, Reading(1, watch=watch))
    counts, shares = zip(*shown, strict=True)
    assert counts == tuple(range(2000, 20_001, 2000))
    assert list(shares) == sorted(shares)
    assert 0.3 < shares[4] < 0.7
