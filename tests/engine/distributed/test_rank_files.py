"""Runs whose files are dealt to ranks: on one disk, on several, resumed, and with bad files."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.recipe import load
from engine.data.tokenizer import Tokenizer
from engine.models.hf_weights import to_huggingface_state
from engine.runs.run import begin, open_run
from engine.training.rank_sets import shares
from engine.utils.errors import InputError

from ..conftest import TINY
from ..launch import start

pytestmark = pytest.mark.long

ROWS = (40, 25, 31, 10, 17)
WORDS = [*"abcdefghijklmn"]
SOURCE = """
[tasks.mood]
head = "single"
[tasks.mood.source]
kind = "classification"
text = ["text"]
classes = 2
split_by_rank = true
files = { train = "part-*.csv", dev = "dev.csv" }
"""
KINDS = """
train = ["mood", "find", "tags"]
[tasks.find]
head = "cosine"
[tasks.find.source]
kind = "retrieval"
text = ["text", "answer"]
split_by_rank = true
files = { train = "find-*.csv", dev = "find-0.csv" }
[tasks.tags]
head = "tokens"
class_weights = "balanced"
[tasks.tags.source]
kind = "token_classification"
text = ["text"]
classes = ["a", "b"]
split_by_rank = true
files = { train = "tags-*.csv", dev = "tags-0.csv" }
"""
TEXTS = """
train = ["text", "same", "mood"]
[objectives.text]
kind = "masked_lm"
split_by_rank = true
files = ["text-0.txt", "text-1.txt", "text-2.txt"]
[objectives.same]
kind = "simcse"
split_by_rank = true
files = ["text-0.txt", "text-1.txt"]
"""
EXACT = ("precision=fp32", "schedule=constant", "warmup=0")
DRAW = random.Random(1)


def sentence() -> str:
    return " ".join(DRAW.choices(WORDS, k=DRAW.randint(4, 12)))


def write(file: Path, rows: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{sentence()},{DRAW.randint(0, 1)}\n" for _ in range(rows)]
    file.write_text("text,label\n" + "".join(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five shards, of which ranks get some each, and a recipe next to it."""
    folder = tmp_path_factory.mktemp("dealt") / "data"
    for number, rows in enumerate(ROWS):
        write(folder / f"part-{number}.csv", rows)
    write(folder / "dev.csv", 12)
    same = [f"{sentence()},{sentence()}\n" for _ in range(8)]
    for number in range(2):
        (folder / f"find-{number}.csv").write_text("text,answer\n" + "".join(same))
        texts = [sentence() for _ in range(9 + 5 * number)]
        tags = [" ".join(DRAW.choice("aab") for _ in text.split()) for text in texts]
        rows = [f"{text},{own}\n" for text, own in zip(texts, tags, strict=True)]
        (folder / f"tags-{number}.csv").write_text("text,label\n" + "".join(rows))
    folder.with_name("mood.toml").write_text('train = ["mood"]\n' + SOURCE)
    for number in range(3):
        lines = [f"{sentence()}\n" for _ in range(9 + 10 * number)]
        (folder / f"text-{number}.txt").write_text("".join(lines))
    folder.with_name("texts.toml").write_text(TEXTS + SOURCE)
    folder.with_name("kinds.toml").write_text(KINDS + SOURCE)
    return folder


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    """A model folder to begin from."""
    folder = data.with_name("model")
    recipe = load(str(data.with_name("mood.toml")), [*TINY, *EXACT])
    recipe = recipe.model_copy(update={"data": str(data)})
    run = begin(recipe, folder / "run")
    folder.mkdir()
    run.tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(run.config.to_huggingface()))
    state = to_huggingface_state(run.new_model().encoder.state_dict(), run.config)
    save_file(state, folder / "model.safetensors")
    return folder


class Runs:
    """Makes runs of several ranks, one after the other, and keeps what came of each."""

    def __init__(self, data: Path, model: Path, root: Path) -> None:
        self._data, self._model, self.root = data, model, root

    def arguments(
        self, name: str, *settings: str, recipe: str = "mood", data: str = "", options: Any = ()
    ) -> list[str]:
        """Return those of a run."""
        toml = str(self._data.with_name(f"{recipe}.toml"))
        folders = ["--out", str(self.root / name), "--data", data or str(self._data)]
        folders += ["--init", str(self._model), "--device", "cpu", *options]
        return [toml, *folders, "--set", *EXACT, *settings]

    def make(self, ranks: int, runs: Sequence[Sequence[str]]) -> str:
        """Make some; return what they printed."""
        log = self.root / f"log-{ranks}"
        program = "tests.engine.distributed.dealing_rank"
        processes = start(
            ranks, runs, log, program, SUPERBERT_CACHE=str(self.root / "cache"), COLUMNS="300"
        )
        statuses = [process.wait(timeout=300) for process in processes]
        assert statuses == [0] * ranks, log.read_text()
        return log.read_text()

    def said(self, name: str, rank: int) -> dict[str, Any]:
        """Return what a rank says of a run."""
        return json.loads((self.root / f"{name}-{rank}.json").read_text())


def without_model(arguments: list[str]) -> list[str]:
    place = arguments.index("--init")
    return arguments[:place] + arguments[place + 2 :]


@pytest.fixture(scope="module")
def runs(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of two ranks."""
    made = Runs(data, model, tmp_path_factory.mktemp("runs"))
    disks = made.root / "data-disks"
    for number, rows in enumerate(ROWS):  # each machine has some; one name is there twice
        write(disks / f"machine-{number % 2}" / f"part-{number // 2 * 2}.csv", rows)
    for machine in range(2):
        shutil.copy(data / "dev.csv", disks / f"machine-{machine}/dev.csv")
        shutil.copy(data / "part-0.csv", disks / f"machine-{machine}/part-copy.csv")
        same_size = f"text,label\n{'xy'[machine] * 9},{machine}\n"
        (disks / f"machine-{machine}/part-size.csv").write_text(same_size)
    bad, single = made.root / "data-bad", made.root / "data-single"
    shutil.copytree(data, bad)
    rows = (data / "part-1.csv").read_text()  # of rank 1
    (bad / "part-1.csv").write_text(rows.replace("\n", "\nfine,7\n", 1))
    single.mkdir()
    for name in ("part-0.csv", "dev.csv"):
        shutil.copy(data / name, single / name)
    batch = ("batch_size=6",)
    made.printed = made.make(
        2,
        [
            made.arguments("whole", *batch, "max_steps=24", "checkpoint_every=12"),
            made.arguments("cut", *batch, "max_steps=10"),
            made.arguments("cut", *batch, "max_steps=24", options=["--resume"]),
            made.arguments("disks", *batch, "epochs=1", data=str(disks / "machine-RANK")),
            made.arguments("limited", *batch, "max_train_examples=40", "epochs=1"),
            made.arguments("kinds", "batch_size=4", "max_steps=4", recipe="kinds"),
            made.arguments("frozen", "max_steps=2", "freeze_encoder=true", recipe="mood"),
            made.arguments("texts", "max_steps=3", "batch_size=4", recipe="texts"),
            made.arguments(
                "addresses",
                "max_steps=3",
                f"objectives.text.files=['text-0.txt','file://{data}/text-[12].txt']",
                f"objectives.same.files=['file://{data}/text-0.txt','file://{data}/text-1.txt']",
                recipe="texts",
            ),
            made.arguments(
                "list",
                *batch,
                "max_steps=1",
                "tasks.mood.source.files.train=['part-0.csv','part-4.csv']",
                data=str(disks / "machine-RANK"),
            ),
            without_model(
                made.arguments("words", *TINY, data=str(disks / "machine-RANK"), recipe="mood")
            ),
            without_model(made.arguments("scratch", *TINY, "max_steps=1")),
            made.arguments("dry", options=["--dry-run"]),
            made.arguments("bad", data=str(bad)),
            made.arguments("skipped", "on_bad_row=skip", "max_steps=1", data=str(bad)),
            made.arguments("single", data=str(single)),
            made.arguments("small", "batch_size=1", "distribute=replicated"),
            made.arguments("missing", "tasks.mood.source.files.train=['part-0.csv','part-9.csv']"),
        ],
    )
    return made


def texts_of(data: Path, model: Path, files: Sequence[str]) -> Counter:
    """Return the texts of files, as their tokens."""
    words = Tokenizer.load(model)
    found: Counter = Counter()
    for file in files:
        rows = (data / file).read_text().splitlines()[1:]
        encoded = words.encode([row.rpartition(",")[0] for row in rows], 128)
        for a, b in pairwise(encoded.offsets):
            found[" ".join(map(str, encoded.tokens[a:b].tolist()))] += 1
    return found


OWN = (["part-0.csv", "part-4.csv"], ["part-1.csv", "part-2.csv", "part-3.csv"])
"""The shards of two ranks, by their bytes."""


def test_each_rank_opens_its_own_files_and_draws_them_once_an_epoch(runs, data, model):
    for rank, own in enumerate(OWN):
        said = runs.said("whole", rank)
        assert said["ended"] == "status 0"
        assert [name for name in said["opened"] if name.startswith("part-")] == own
        drawn, texts = Counter(), texts_of(data, model, own)
        for step in said["trained"]:
            assert sum(step.values()) == 3
            drawn.update(step)
            if sum(drawn.values()) + 3 > sum(texts.values()):
                break
        assert drawn <= texts
        assert sum((texts - drawn).values()) < 3


def test_what_the_main_rank_prints(runs):
    line = "mood: 5 files dealt to 2 ranks, 123 examples, of which this one reads"
    assert f"{line} 57; runs with another number of ranks see other batches\n" in runs.printed
    assert runs.said("dry", 0)["ended"] == "status 0"
    assert not (runs.root / "dry").exists()


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    newest = open_run(folder).checkpoints.all("step")[0]
    assert newest.name == "step-00000024"
    return [load_file(file) for file in sorted(newest.glob("*.safetensors"))]


def test_resumed_it_has_the_same_bits(runs):
    for own, again in zip(weights(runs.root / "whole"), weights(runs.root / "cut"), strict=True):
        assert own.keys() == again.keys()
        assert [name for name in own if not torch.equal(own[name], again[name])] == []
    for rank in range(2):
        begun, resumed = runs.said("cut", rank), runs.said("cut-again", rank)
        assert begun["trained"] + resumed["trained"] == runs.said("whole", rank)["trained"]


def test_machines_without_a_common_disk(runs, data, model):
    """A name with other content is another file; a copy is the same, and one rank has it."""
    disks = runs.root / "data-disks"
    seen = [sorted(path.name for path in disks.glob(f"machine-{n}/part-*")) for n in range(2)]
    opened = [runs.said("disks", rank)["opened"] for rank in range(2)]
    assert [runs.said("disks", rank)["ended"] for rank in range(2)] == ["status 0"] * 2
    assert f"mood: {sum(map(len, seen)) - 1} files dealt to 2 ranks" in runs.printed
    # Both look into what may be one file or two, and read all else of their own alone.
    assert [[name for name in own if name.startswith("part-")] for own in opened] == seen
    texts = [Counter(), Counter()]
    for rank, found in enumerate(texts):
        for step in runs.said("disks", rank)["trained"]:
            found.update(step)
    copied = texts_of(data, model, ["part-0.csv"])
    assert [bool(copied <= found) for found in texts].count(True) == 1


def test_a_list_of_files_that_not_every_machine_has(runs):
    assert [runs.said("list", rank)["ended"] for rank in range(2)] == ["status 0"] * 2
    assert "mood: 3 files dealt to 2 ranks, 82 examples" in runs.printed


def test_a_vocabulary_is_of_the_same_files_on_all_machines(runs):
    line = "InputError: split_by_rank: the ranks have learnt different vocabularies, since their"
    assert [runs.said("words", rank)["ended"].startswith(line) for rank in range(2)] == [True] * 2
    assert runs.said("scratch", 0)["ended"] == "status 0"


def test_a_limit_is_shared(runs):
    for rank, most in enumerate(shares([57, 66], 40, "mood")):
        drawn = runs.said("limited", rank)["trained"]
        assert len(drawn) == 7  # of 40 examples, 6 a step
        assert 1 < len(set().union(*drawn)) <= most


def test_texts_of_objectives(runs):
    assert [runs.said("texts", rank)["ended"] for rank in range(2)] == ["status 0"] * 2
    for rank, own in enumerate(([1, 2], [0, 1])):  # of three files, and of two
        opened = [name for name in runs.said("texts", rank)["opened"] if name.endswith(".txt")]
        assert opened == [f"text-{number}.txt" for number in own]


@pytest.mark.parametrize("name", ["texts", "addresses"])
def test_all_texts_of_objectives_are_read(runs, name):
    """Those at addresses, too."""
    assert [runs.said(name, rank)["ended"] for rank in range(2)] == ["status 0"] * 2
    # Both runs say so.
    assert runs.printed.count("text: 3 files dealt to 2 ranks, 57 examples") == 2
    assert runs.printed.count("same: 2 files dealt to 2 ranks, 28 examples") == 2


@pytest.mark.parametrize("name", ["kinds", "frozen"])
def test_other_kinds_and_frozen_encoders(runs, name):
    assert [runs.said(name, rank)["ended"] for rank in range(2)] == ["status 0"] * 2
    lines = (runs.root / name / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == {"kinds": 4, "frozen": 2}[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bad", "InputError: rank 1 of 2: label is outside 0 to 1: '7' in column 'label', "),
        (
            "single",
            "InputError: tasks.mood.source.files.train: 1 file for 2 ranks; give at least one file "
            "a rank, or leave split_by_rank out",
        ),
        (
            "missing",
            "InputError: cannot read a file: no such file",
        ),
    ],
)
def test_errors_end_all_ranks_with_one_line(runs, name, expected):
    ended = [runs.said(name, rank)["ended"] for rank in range(2)]
    assert ended[0] == ended[1]
    assert ended[0].startswith(expected)
    assert not (runs.root / name / "recipe.toml").exists()


def test_a_batch_without_an_example_for_each_rank(runs):
    ended = runs.said("small", 0)["ended"]
    assert "a batch of 1 examples has none for some of 2 ranks" in ended


def test_bad_rows_of_other_ranks_are_counted(runs):
    assert runs.printed.count("mood: 1 rows skipped (") == 1


def test_three_ranks_and_another_number_later(runs, data, model):
    made = Runs(data, model, runs.root)
    shutil.copytree(runs.root / "cut", runs.root / "later")
    again = ["--resume"]
    printed = made.make(
        3,
        [
            made.arguments("three", "batch_size=7", "epochs=1"),
            made.arguments("later", "batch_size=6", "max_steps=26", options=again),
        ],
    )
    opened = [runs.said("three", rank)["opened"] for rank in range(3)]
    own = [[name for name in names if name.startswith("part-")] for names in opened]
    assert sorted(name for names in own for name in names) == [f"part-{n}.csv" for n in range(5)]
    sizes = {len(step) for step in runs.said("three", 0)["trained"]}
    assert max(sizes) == 3
    assert "warning: trained by 2 ranks so far, now by 3, which read other examples each" in printed
    assert runs.said("later-again", 2)["ended"] == "status 0"


def test_checkpoints_of_dealt_files_note_their_ranks(data):
    """Of one rank too, which reads all files: two would go on with other batches."""
    recipe = str(data.with_name("mood.toml"))
    assert load(recipe).divided == ("mood",)
    assert load(recipe, ["tasks.mood.source.split_by_rank=false"]).divided == ()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["tasks.mood.first_n=3"], "tasks.mood.first_n: source.split_by_rank deals the files"),
        (
            ["objectives.text.kind=masked_lm"],
            "objectives.text.sentences_of: no rank reads all sentences of mood",
        ),
        (
            [
                "objectives.text={kind='masked_lm',split_by_rank=true,files=['a'],max_texts=4}",
            ],
            "objectives.text.max_texts: split_by_rank deals files to ranks; give max_per_source",
        ),
        (
            ["objectives.text={kind='simcse',split_by_rank=true,sentences_of=['sst']}"],
            "objectives.text.split_by_rank: has no effect without files",
        ),
        (["tasks.mood.source.files={dev='dev.csv'}"], "split_by_rank: has no effect on files"),
    ],
)
def test_settings_that_contradict_it(data, settings, expected):
    with pytest.raises(InputError, match=expected):
        load(str(data.with_name("mood.toml")), settings)
