"""Damaged and hostile input: an error line or a result, never another exception, never a hang.

Each kind of input starts from a good one and is spoilt at random: bits turned, bytes cut out,
doubled or put in, numbers and words exchanged for ugly ones.
"""

import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from engine import recipe as recipes
from engine.data.formats import FORMATS
from engine.data.read import parse_table
from engine.data.tokenizer import Tokenizer
from engine.errors import InputError
from engine.model.huggingface import load_encoder_state, read_config, to_huggingface_state
from engine.run import Run, begin, data_folder, open_run
from engine.runtime.checkpoint import Checkpoints, load_weights
from engine.runtime.manifest import read_manifest, seal
from engine.train import main

_UGLY = [
    *(b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n\n", b'"', b"\t\t\t", b"{", b"]]", b"="),
    *(b"-1", b"1e400", b"nan", b"null", b"true", b"9" * 40, b"[[[[" * 300, b"../../../etc/passwd"),
    *(b"__import__('os')", b"cos\nsystem\n", b"\x80\x04\x95", "\U0001f4a3".encode(), b"A" * 5000),
]
_SLOW = 10.0


class Kind(NamedTuple):
    """A kind of input: how often it is tried out of a hundred, and what reads spoilt bytes."""

    name: str
    share: int
    good: bytes
    read: Callable[[bytes], object]


def fuzz(folder: Path, inputs: int, seed: int) -> dict[str, object]:
    """Try ``inputs`` spoilt inputs of all kinds.

    Returns:
        Counts by kind (``refused``, ``read``), and ``unhandled``: a traceback each.
    """
    draw = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    unhandled: list[str] = []
    kinds = _kinds(folder)
    for kind in draw.choices(kinds, [kind.share for kind in kinds], k=inputs):
        content = spoil(kind.good, draw)
        begun = time.monotonic()
        try:
            kind.read(content)
            outcome = "read"
        except InputError as error:
            outcome = "refused" if len(str(error).splitlines()) == 1 else "more than one line"
            if outcome != "refused":
                unhandled.append(f"{kind.name}: {error!r}")
        except Exception:
            outcome = "unhandled"
            unhandled.append(f"{kind.name}: {content[:300]!r}\n{traceback.format_exc()}")
        if time.monotonic() - begun > _SLOW:
            unhandled.append(f"{kind.name}: took more than {_SLOW} s: {content[:300]!r}")
        counts.setdefault(kind.name, Counter())[outcome] += 1
    return {
        "inputs": inputs,
        "by_kind": {name: dict(counter) for name, counter in sorted(counts.items())},
        "unhandled": unhandled,
    }


def spoil(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one to four faults."""
    spoilt = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(spoilt) + 1)
        length = min(draw.choice([1, 2, 8, 64, 1000]), len(spoilt) - at)
        match draw.randrange(6):
            case 0 if at < len(spoilt):
                spoilt[at] ^= 1 << draw.randrange(8)
            case 1:
                del spoilt[at : at + length]
            case 2:
                spoilt[at:at] = spoilt[at : at + length]
            case 3:
                spoilt[at:at] = draw.choice(_UGLY)
            case 4:
                del spoilt[at:]
            case _:
                spoilt[at : at + length] = draw.choice(_UGLY)
    return bytes(spoilt)


def _kinds(folder: Path) -> list[Kind]:
    tiny = [
        "encoder.hidden_size=32",
        "encoder.num_hidden_layers=1",
        "encoder.num_attention_heads=2",
        "encoder.intermediate_size=48",
        "encoder.vocab_size=256",
        "limit=32",
    ]
    arguments = ["demo", "--out", str(folder / "run"), "--device", "cpu", "--max-steps", "1"]
    assert main([*arguments, "--set", *tiny]) == 0
    run = open_run(folder / "run")
    model = folder / "model"
    model.mkdir()
    run.tokenizer.save(model)
    shutil.copy(run.folder / "config.json", model)
    return [
        *_text_kinds(run, model),
        *_weight_kinds(run, folder),
    ]


def _text_kinds(run: Run, model: Path) -> list[Kind]:
    demo = data_folder(recipes.load("demo"))

    def table(task: str, suffix: str) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            bad_row = "skip" if len(content) % 2 else "error"
            return parse_table(content, Path(f"data.{suffix}"), FORMATS[task], on_bad_row=bad_row)

        return read

    def recipe(content: bytes) -> object:
        path = model / "recipe.toml"
        path.write_bytes(content)
        return recipes.load(str(path))

    def override(content: bytes) -> object:
        return recipes.load("cgs", [content.decode("utf-8", errors="replace")])

    def config(content: bytes) -> object:
        (model / "config.json").write_bytes(content)
        return read_config(model)

    def tokenizer(content: bytes) -> object:
        (model / "tokenizer.json").write_bytes(content)
        return Tokenizer.load(model).encode(["a fine film"], 16)

    def out(content: bytes) -> object:
        name = content.decode("utf-8", errors="surrogateescape")
        return begin(recipes.load("demo", ["init=" + json.dumps(str(model))]), model / name)

    examples = {task: (demo / f"{task}-train.csv") for task in ("quora", "sts")}
    lines = {
        task: b"\n".join(path.read_bytes().split(b"\n")[:12]) for task, path in examples.items()
    }
    record = {"id": "1", "sentence1": "a", "sentence2": "b", "similarity": 2.5}
    toml = recipes.load("cgs").to_toml().encode()
    return [
        Kind("tab-separated", 30, lines["quora"], table("quora", "csv")),
        Kind("tab-separated scores", 10, lines["sts"], table("sts", "tsv")),
        Kind("recipe", 20, toml, recipe),
        Kind("override", 10, b"tasks.sts.features=cosine", override),
        Kind("model config", 15, (model / "config.json").read_bytes(), config),
        Kind("tokenizer", 3, run.tokenizer.to_json().encode(), tokenizer),
        Kind("out", 4, b"runs/one", out),
        Kind("JSON lines", 4, json.dumps(record).encode() + b"\n", table("sts", "jsonl")),
    ]


def _weight_kinds(run: Run, folder: Path) -> list[Kind]:
    weights = folder / "weights"
    weights.mkdir()
    fresh = run.new_model()
    state = to_huggingface_state(fresh.encoder.state_dict(), run.config)
    save_file(state, weights / "model.safetensors")
    spoilt = folder / "spoilt"
    step = run.checkpoints.all("step")[0]
    target = Checkpoints(spoilt).path("step", 1)
    (shard,) = step.glob("*.safetensors")

    def init(content: bytes) -> object:
        (weights / "model.safetensors").write_bytes(content)
        return load_encoder_state(weights, run.config)

    def fresh_copy() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(step, target)

    def manifest(content: bytes) -> object:
        fresh_copy()
        (target / "manifest.json").write_bytes(content)
        return Checkpoints(spoilt).find("step")

    def checkpoint(content: bytes) -> object:
        """As if the checksums were forged too."""
        fresh_copy()
        known = read_manifest(target)
        (target / "manifest.json").unlink()
        (target / shard.name).write_bytes(content)
        seal(target, known)
        return load_weights(target, fresh)

    return [
        Kind("model weights", 3, (weights / "model.safetensors").read_bytes(), init),
        Kind("manifest", 3, (step / "manifest.json").read_bytes(), manifest),
        Kind("checkpoint, forged checksums", 3, shard.read_bytes(), checkpoint),
    ]
