"""Model folders and checkpoints corrupted: tokenizers, weights in other dtypes, configs."""

import json
import random
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from engine.checkpoints.manifest import read_manifest, seal

from .base import Base
from .corrupt import corrupt_json
from .given import Given, use_run, with_model
from .tokenizers_of_all_kinds import graft, whole_tokenizers


def corrupt_tokenizer(base: Base, here: Path, draw: random.Random) -> Given:
    model = Path(shutil.copytree(base.model, here / "model"))
    for name in ("vocab.txt", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    name, document = draw.choice(whole_tokenizers(_vocab_size(base)))
    how = "whole"
    if draw.random() < 0.9:
        document, how = graft(document, draw)
    if draw.random() < 0.3:
        document = json.loads(corrupt_json(json.dumps(document).encode(), draw))
        how += " and values"
    (model / "tokenizer.json").write_text(json.dumps(document))
    return f"{name} {how}", "train", with_model(base, here, model)


def _vocab_size(base: Base) -> int:
    return int(json.loads((base.model / "config.json").read_text())["vocab_size"])


def corrupt_weights(base: Base, here: Path, draw: random.Random) -> Given:
    """Weights of a model, or of a checkpoint whose checksums are forged."""
    if draw.random() < 0.5:
        model = Path(shutil.copytree(base.model, here / "model"))
        what = _corrupt_weights(model / "model.safetensors", draw)
        return f"model weights {what}", "train", with_model(base, here, model)
    run = base.copy_run(here / "run")
    for folder in sorted((run / "checkpoints").iterdir()):
        manifest = read_manifest(folder)
        (folder / "manifest.json").unlink()
        state = draw.getstate()
        for path in sorted(folder.glob("*.safetensors")):
            draw.setstate(state)  # the same in each
            what = _corrupt_weights(path, draw)
        seal(folder, manifest)
    program, arguments = use_run(base, here, draw)
    return f"checkpoint {what}", program, arguments


_DTYPES = [
    *("F64", "F16", "BF16", "I64", "I32", "I8", "U8", "U16", "U32", "U64", "BOOL", "C64", "F4"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "X", "", 7),
]


def _corrupt_weights(path: Path, draw: random.Random) -> str:
    how = draw.choice(["not finite", "too large", "dtype", "same size", "gap", "header"])
    if how in ("not finite", "too large"):
        state = load_file(path)
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        name = draw.choice(floating)
        corrupted = state[name].double() if how == "too large" else state[name].clone()
        value = 1e300 if how == "too large" else draw.choice([float("nan"), float("inf")])
        corrupted.view(-1)[draw.randrange(max(1, corrupted.numel()))] = value
        save_file(state | {name: corrupted}, path)
        return f"{how}: {name}"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    match how:
        case "dtype":
            entry["dtype"] = draw.choice(_DTYPES)
        case "same size":
            entry["dtype"] = draw.choice(["I32", "U32"])
        case "gap":
            body = body + b"\0" * 64 if draw.random() < 0.5 else b"\xff" * 64 + body
            if body.startswith(b"\xff"):
                for each in header.values():
                    if "data_offsets" in each:
                        each["data_offsets"] = [end + 64 for end in each["data_offsets"]]
        case "header":
            key = draw.choice(["shape", "data_offsets"])
            entry[key] = draw.choice(
                [[], [0], [-1, 4], [2**62, 2], [2**31, 2**33], [0, 0], [4, 0], "x", [1.5, 2]]
            )
    corrupted = json.dumps(header).encode()
    path.write_bytes(len(corrupted).to_bytes(8, "little") + corrupted + body)
    return f"{how}: {name}"


def corrupt_config(base: Base, here: Path, draw: random.Random) -> Given:
    """A model's config with huge numbers, beside weights that have others."""
    model = Path(shutil.copytree(base.model, here / "model"))
    config = json.loads((model / "config.json").read_text())
    for _ in range(draw.randint(1, 2)):
        key = draw.choice([key for key, value in config.items() if type(value) in (int, float)])
        numbers = [
            0,
            1,
            2,
            10**6,
            2**31 - 1,
            2**31,
            2**63,
            -1,
            0.5,
            1e300,
            float("nan"),
            "12",
            None,
        ]
        config[key] = draw.choice([*numbers, 10**6, 2**31 - 1])
    (model / "config.json").write_text(json.dumps(config))
    if draw.random() < 0.3:
        shutil.rmtree(here / "model")
        model = base.copy_run(here / "run")
        (model / "config.json").write_text(json.dumps(config))
        program, arguments = use_run(base, here, draw)
        return f"a run's {key} = {config[key]}", program, arguments
    return f"{key} = {config[key]}", "train", with_model(base, here, model)
