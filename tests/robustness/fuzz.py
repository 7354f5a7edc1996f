"""Damaged and hostile input: an error line or a right result, never another exception or a hang.

Each kind of input starts from a good one and is corrupted at random (tests/robustness/corrupt.py).
Most are given to what reads them; some go through a whole command
(tests/robustness/fuzz_commands.py).  What is read all the same is held against what its kind
promises.
"""

import bz2
import contextlib
import faulthandler
import gzip
import io
import json
import logging
import lzma
import random
import resource
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from huggingface_hub import constants
from pyarrow import parquet
from pydantic import ValidationError
from safetensors.torch import save_file

from engine.checkpoints.manifest import read_manifest, seal, verify
from engine.checkpoints.store import Checkpoints, load_weights
from engine.config import recipe as recipes
from engine.config.messages import first_problem
from engine.data.source import TaskSource
from engine.data.table import Table, parse_table
from engine.data.task_schema import FORMATS, TaskSchema
from engine.data.tokenizer import Tokenizer
from engine.models.bert import BertConfig
from engine.models.hf_weights import load_encoder_state, read_config, to_huggingface_state
from engine.runs.data_paths import data_folder
from engine.runs.run import Run, begin, open_run
from engine.train import main
from engine.utils.errors import InputError

from .corrupt import corrupt_bytes, corrupt_json, corrupt_safetensors, corrupt_toml
from .progress import say

_SLOW, _HANGS = 20.0, 120.0
_ROOM = 4 << 30
"""Bytes that a corrupted input may ask for beyond what is there, before it is out of memory."""

TINY = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *(
        "encoder.intermediate_size=48",
        "encoder.vocab_size=256",
        "max_train_examples=32",
        "precision=fp32",
    ),
]
_SOURCE = TaskSource(
    kind="pair_classification",
    text=("first", "second"),
    label="intent",
    id="name",
    classes=("weather", "music"),
    files={"train": "rows"},
)
_INTENTS = _SOURCE.format("intent")
_PLAIN_ROWS = b'a\t"fine film\tdull\tmusic\nb\train, soon\tso "on"\tweather\n'
_NUMBERED = {"text": ("2", "3"), "label": "4", "id": "1", "header": False}

Corrupt = Callable[[bytes, random.Random], bytes]


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        name: of the kind.
        share: how often it is tried, out of all shares.
        good: what it is when nothing is wrong with it.
        read: what reads it; an AssertionError says that the result is wrong.
        corrupt: the ways to corrupt it.
    """

    name: str
    share: int
    good: bytes
    read: Callable[[bytes], object]
    corrupt: Sequence[Corrupt] = (corrupt_bytes,)


def fuzz(folder: Path, inputs: int, seed: int) -> dict[str, object]:
    """Try ``inputs`` corrupted inputs of all kinds.

    Returns:
        Counts by kind (``refused``, ``read``), and ``unhandled``: a traceback each.
    """
    from .fuzz_commands import command_kinds

    draw = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    unhandled: list[str] = []
    run = _small_run(folder)
    kinds = [*_text_kinds(run, folder), *_weight_kinds(run, folder), *command_kinds(run, folder)]
    chosen = draw.choices(kinds, [kind.share for kind in kinds], k=inputs)
    with _confined():
        for number, kind in enumerate(chosen):
            if number % 500 == 0:
                say(f"fuzz: {number:,} of {inputs:,} inputs, {len(unhandled)} unhandled")
            content = draw.choice(kind.corrupt)(kind.good, draw)
            faulthandler.dump_traceback_later(_HANGS, exit=True)
            outcome, problem = _try(kind, content)
            faulthandler.cancel_dump_traceback_later()
            counts.setdefault(kind.name, Counter())[outcome] += 1
            if problem:
                unhandled.append(f"{kind.name}, input {number}: {content[:300]!r}\n{problem}")
                say(f"fuzz: {unhandled[-1]}")
    return {
        "inputs": inputs,
        "by_kind": {name: dict(counter) for name, counter in sorted(counts.items())},
        "unhandled": unhandled,
    }


def _try(kind: Kind, content: bytes) -> tuple[str, str]:
    """Return how an input was taken, and what is wrong about that."""
    begun = time.monotonic()
    try:
        kind.read(content)
    except InputError as error:
        lines = str(error).splitlines()
        outcome, problem = "refused", "" if len(lines) == 1 else f"not one line: {error!r}"
    except BaseException:  # a panic of the library that tokenizes is no Exception
        outcome, problem = "unhandled", traceback.format_exc()
    else:
        outcome, problem = "read", ""
    seconds = time.monotonic() - begun
    return outcome, problem or (f"took {seconds:.0f} s" if seconds > _SLOW else "")


@contextlib.contextmanager
def _confined() -> Iterator[None]:
    """Ask no hub, warn of no damage; let allocations out of all proportion fail."""
    online, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    logging.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, limits[1]))
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logging.disable(disabled)
        constants.HF_HUB_OFFLINE = online
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _small_run(folder: Path) -> Run:
    arguments = ["demo", "--out", str(folder / "run"), "--device", "cpu", "--max-steps", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*arguments, "--set", *TINY, "checkpoint_every=1"]) == 0
    return open_run(folder / "run")


def _text_kinds(run: Run, folder: Path) -> list[Kind]:
    model = folder / "model"
    model.mkdir()
    run.tokenizer.save(model)
    shutil.copy(run.folder / "config.json", model)
    record = {"name": "a", "first": "fine film", "second": "dull", "intent": "music"}
    rows = [record, record | {"name": "b", "intent": "weather", "first": "rain, soon"}]
    table = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), table)
    commas = b'name,first,second,intent\na,"fine, film",dull,music\nb,rain,"so\non",weather\n'
    json_lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    vocabulary = (model / "vocab.txt").read_bytes()
    toml = recipes.load("cgs").to_toml().encode()
    structured = (corrupt_bytes, corrupt_json)
    return [
        Kind("tab-separated", 20, _lines_of("quora"), _table("quora", "csv")),
        Kind("tab-separated scores", 10, _lines_of("sts"), _table("sts", "tsv")),
        Kind("comma-separated", 5, commas, _table("intent", "csv")),
        *_dialect_kinds(commas, json_lines),
        *_kinds_of_labels(),
        Kind("JSON lines", 5, json_lines, _table("intent", "jsonl")),
        Kind("JSON line", 5, json_lines.splitlines()[0], _table("intent", "jsonl"), structured),
        Kind("Parquet", 4, table.read_bytes(), _table("intent", "parquet")),
        Kind(
            "recipe of all kinds",
            5,
            recipes.load("demo-kinds").to_toml().encode(),
            _recipe(folder / "corrupted.toml"),
            (corrupt_bytes, corrupt_toml),
        ),
        Kind("recipe", 15, toml, _recipe(folder / "corrupted.toml"), (corrupt_bytes, corrupt_toml)),
        Kind("override", 8, b"tasks.sts.head=cosine", _override),
        Kind("model config", 12, (model / "config.json").read_bytes(), _config(model), structured),
        Kind("tokenizer", 4, run.tokenizer.to_json().encode(), _tokenizer(model), structured),
        Kind("vocabulary", 2, vocabulary, _vocabulary(folder / "words")),
        Kind("weights index", 4, json.dumps(index).encode(), _index(run, folder), structured),
        Kind("out", 3, b"runs/one", _out(model)),
    ]


def _dialect_kinds(commas: bytes, json_lines: bytes) -> list[Kind]:
    """Return files that a source describes by its fields, or that say how they are written."""
    found_out, text = _source(), commas.decode()
    array = b"[" + b",".join(json_lines.splitlines()) + b"]"
    tabs = b"".join(line.replace(b",", b"\t") + b"\n" for line in commas.splitlines()[:1])
    plain = _source(quoting="none", **_NUMBERED)
    wide, latin = text.encode("utf-16"), text.replace("so", "só").encode("latin-1")
    unmarked = _source(encoding="utf-16-be")
    return [
        Kind("no quoting, no header", 3, _PLAIN_ROWS, _as(plain, "tsv")),
        Kind("tabs in .csv", 3, tabs + _PLAIN_ROWS.replace(b'"', b""), _as(found_out, "csv")),
        Kind("semicolons", 3, commas.replace(b",", b";"), _as(_source(delimiter=";"), "txt")),
        Kind("semicolons, unsaid", 1, commas.replace(b",", b";"), _as(found_out, "csv")),
        Kind("JSON array", 3, array, _as(found_out, "json"), (corrupt_bytes, corrupt_json)),
        Kind("UTF-16 with a mark", 3, wide, _as(found_out, "csv")),
        Kind("UTF-16 without", 2, text.encode("utf-16-be"), _as(unmarked, "csv")),
        Kind("Latin-1", 2, latin, _as(_source(encoding="latin-1"), "csv")),
        Kind("Shift JIS", 2, commas, _as(_source(encoding="shift_jis"), "csv")),
        Kind("gzip", 3, gzip.compress(commas), _as(found_out, "csv.gz")),
        Kind("bz2", 2, bz2.compress(commas), _as(found_out, "csv.bz2")),
        Kind("xz", 2, lzma.compress(commas), _as(found_out, "csv.xz")),
        Kind("zstd", 2, pa.Codec("zstd").compress(commas, asbytes=True), _as(found_out, "csv.zst")),
        Kind(
            "source",
            4,
            json.dumps(_SOURCE.model_dump()).encode(),
            _described(commas),
            (corrupt_json,),
        ),
    ]


_CONLLU = b"""# text = small dogs hide .
1\tsmall\tB-WHO
2-3\tdogshide\t_
2\tdogs\tI-WHO
3\thide\tO

1\train\tB-WHAT
"""


def _kinds_of_labels() -> list[Kind]:
    """Return files of words with tags, of lists of labels, and of passages."""
    slots, structured = FORMATS["slots"], (corrupt_bytes, corrupt_json)
    lists = b"".join(
        json.dumps({"words": words, "tags": tags}).encode() + b"\n"
        for words, tags in ((["small", "dogs"], ["B-WHO", "I-WHO"]), (["rain"], ["O"]))
    )
    listed = replace(slots, sentences=("words",), label="tags")
    columns = replace(FORMATS["aspects"], label_columns=FORMATS["aspects"].classes, label="")
    header = ",".join(("id", "review", *columns.classes))
    of_columns = f"{header}\na,dull,0,1,0,0,0,0\nb,fine,1,0,true,0,0.0,0\n".encode()
    replies = _lines_of("replies", "jsonl")
    return [
        Kind("CoNLL", 5, _lines_of("slots", "conll"), _as(slots, "conll")),
        Kind("CoNLL-U", 3, _CONLLU, _as(replace(slots, sentences=("2",), label="3"), "conllu")),
        Kind("lists of words", 4, lists, _as(listed, "jsonl")),
        Kind("list of words", 3, lists.splitlines()[0], _as(listed, "jsonl"), structured),
        Kind("lists of labels", 4, _lines_of("aspects", "jsonl"), _table("aspects", "jsonl")),
        Kind("columns of labels", 3, of_columns, _as(columns, "csv")),
        Kind("passages", 4, replies, _table("replies", "jsonl")),
        Kind("passage", 3, replies.splitlines()[0], _table("replies", "jsonl"), structured),
    ]


def _source(**fields: object) -> TaskSchema:
    return TaskSource(**(_SOURCE.model_dump() | fields)).format("intent")


def _described(rows: bytes) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        try:
            source = TaskSource.model_validate(json.loads(content))
        except ValidationError as error:
            raise InputError(first_problem(error, TaskSource)) from None
        return _as(source.format("intent"), "csv")(rows)

    return read


def _lines_of(task: str, ending: str = "csv") -> bytes:
    demo = data_folder(recipes.load("demo")) / f"{task}-train.{ending}"
    return b"\n".join(demo.read_bytes().split(b"\n")[:12])


def _table(task: str, suffix: str) -> Callable[[bytes], object]:
    return _as(_INTENTS if task == "intent" else FORMATS[task], suffix)


def _as(form: TaskSchema, suffix: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        bad_row = "skip" if len(content) % 2 else "error"
        table = parse_table(content, Path(f"data.{suffix}"), form, on_bad_row=bad_row)
        assert_usable(table, form.low, form.high)
        return table

    return read


def assert_usable(table: Table, low: float, high: float) -> None:
    """Check what reading promises: equal columns, labels in their range, text in every sentence.

    Where words are tagged, a tag for each, and none is empty.
    """
    assert table.labels is not None
    words = None if table.words is None else [word for text in table.words for word in text]
    assert len(table.labels) == len(table.ids if words is None else words) > 0
    assert all(word.strip() and word.encode() for word in words or ())
    assert all(table.words or [True])
    assert all(len(column) == len(table.ids) for column in table.sentences)
    assert ((table.labels >= low) & (table.labels <= high)).all()
    for texts in (table.ids, *table.sentences):
        assert all(text.strip() and text.encode() for text in texts)


def _recipe(path: Path) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        path.write_bytes(content)
        return _round_trip(recipes.load(str(path)), path)

    return read


def _round_trip(recipe: recipes.Recipe, path: Path) -> recipes.Recipe:
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert recipes.load(str(path)) == recipe
    return recipe


def _override(content: bytes) -> object:
    return recipes.load("cgs", [content.decode("utf-8", errors="replace")])


def _config(model: Path) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        (model / "config.json").write_bytes(content)
        config = read_config(model)
        assert BertConfig.from_huggingface(config.to_huggingface()) == config
        return config

    return read


def _tokenizer(model: Path) -> Callable[[bytes], object]:
    good = (model / "tokenizer.json").read_bytes()

    def read(content: bytes) -> object:
        (model / "tokenizer.json").write_bytes(content)
        try:
            return _encode(Tokenizer.load(model))
        finally:
            (model / "tokenizer.json").write_bytes(good)

    return read


def _vocabulary(folder: Path) -> Callable[[bytes], object]:
    folder.mkdir()

    def read(content: bytes) -> object:
        (folder / "vocab.txt").write_bytes(content)
        return _encode(Tokenizer.load(folder))

    return read


def _encode(tokenizer: Tokenizer) -> object:
    encoded = tokenizer.encode(["a fine film", "zażółć \U0001f4a3", "x" * 300], 16)
    starts, ends = encoded.offsets[:-1], encoded.offsets[1:] - 1
    assert ((ends - starts > 0) & (ends - starts < 16)).all()
    assert (encoded.tokens[starts] == tokenizer.cls_id).all()
    assert (encoded.tokens[ends] == tokenizer.sep_id).all()
    assert ((encoded.tokens >= 0) & (encoded.tokens < tokenizer.vocab_size)).all()
    return encoded


def _index(run: Run, folder: Path) -> Callable[[bytes], object]:
    weights = folder / "in shards"
    weights.mkdir()
    save_file(_huggingface_state(run), weights / "model.safetensors")

    def read(content: bytes) -> object:
        (weights / "model.safetensors.index.json").write_bytes(content)
        return load_encoder_state(weights, run.config)

    return read


def _out(model: Path) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        name = content.decode("utf-8", errors="surrogateescape")
        return begin(recipes.load("demo", ["init=" + json.dumps(str(model))]), model / name)

    return read


def _huggingface_state(run: Run) -> dict:
    return to_huggingface_state(run.new_model().encoder.state_dict(), run.config)


def _weight_kinds(run: Run, folder: Path) -> list[Kind]:
    weights = folder / "weights"
    weights.mkdir()
    fresh = run.new_model()
    save_file(_huggingface_state(run), weights / "model.safetensors")
    corrupted = folder / "corrupted"
    step = run.checkpoints.all("step")[0]
    target = Checkpoints(corrupted).path("step", 1)
    (shard,) = step.glob("*.safetensors")
    good, manifest_ = shard.read_bytes(), (step / "manifest.json").read_bytes()

    def init(content: bytes) -> object:
        (weights / "model.safetensors").write_bytes(content)
        state = load_encoder_state(weights, run.config)
        assert all(tensor.isfinite().all() for tensor in state.values())
        return state

    def fresh_copy() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(step, target)

    def manifest(content: bytes) -> object:
        fresh_copy()
        (target / "manifest.json").write_bytes(content)
        found = Checkpoints(corrupted).find("step")
        assert read_manifest(target) == read_manifest(step), "another manifest under its checksum"
        return found

    def checkpoint(content: bytes) -> object:
        fresh_copy()
        (target / shard.name).write_bytes(content)
        verify(target)
        assert content == good, "other bits under the same checksum"
        return load_weights(target, fresh)

    def forged(content: bytes) -> object:
        """As if the checksums were forged too."""
        fresh_copy()
        known = read_manifest(target)
        (target / "manifest.json").unlink()
        (target / shard.name).write_bytes(content)
        seal(target, known)
        return load_weights(target, fresh)

    structured = (corrupt_bytes, corrupt_safetensors)
    return [
        Kind("model weights", 6, (weights / "model.safetensors").read_bytes(), init, structured),
        Kind("manifest", 3, manifest_, manifest, (corrupt_bytes, corrupt_json)),
        Kind("checkpoint", 2, good, checkpoint, structured),
        Kind("checkpoint, forged checksums", 4, good, forged, structured),
    ]
