"""Weights stored as anything but floats are refused by name and dtype, wherever they are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import evaluate, export, train
from engine.checkpoints.manifest import read_manifest, seal
from engine.models.hf_weights import load_encoder_state, load_pretraining_heads, read_config
from engine.models.stored_dtypes import stored_dtypes
from engine.utils.errors import InputError
from tests.engine.conftest import TINY

INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
UNFAMILIAR = (
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"),
    *("C64", "F3", "", "f32", "F32 ", "X" * 999, "\x1b[2J"),
)
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I32": 32, "U32": 32, "F32": 32}


def store_as(file: Path, name: str, dtype: str) -> None:
    """Write a safetensors file again, one of its tensors as zeros of another dtype."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data, at = json.loads(content[8 : 8 + length]), b"", 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        own = content[8 + length + start : 8 + length + end]
        if key == name:
            numbers = torch.Size(entry["shape"]).numel()
            own, entry["dtype"] = bytes(numbers * BITS.get(dtype, 8) // 8), dtype
        data, entry["data_offsets"] = data + own, [at, at + len(own)]
        at += len(own)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dtypes") / "run"
    objective = ["objectives.lm.kind=masked_lm", "train=['sst','lm']", "tasks.sts.head=cosine"]
    arguments = ["demo", "--out", str(folder), "--max-steps", "1", "--set", *TINY, *objective]
    assert train.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def model(run) -> Path:
    folder = run.parent / "model"
    assert export.main([str(run), "--to", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


WEIGHT = "encoder.layer.0.attention.self.key.weight"


@pytest.mark.parametrize("dtype", [*INTEGERS, *UNFAMILIAR], ids=ascii)
@pytest.mark.parametrize("name", [WEIGHT, "embeddings.LayerNorm.bias"])
def test_an_encoder_is_refused_in_one_line(copy, dtype, name):
    store_as(copy / "model.safetensors", name, dtype)
    with pytest.raises(InputError) as refused:
        load_encoder_state(copy, read_config(copy))
    message = str(refused.value)
    assert f"weight {name} is stored as {ascii(dtype[:9])[1:-1]}" in message
    assert "expected F64, F32, F16, BF16" in message
    assert len(message) < 400


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_floats_are_read(copy, dtype):
    store_as(copy / "model.safetensors", WEIGHT, dtype)
    state = load_encoder_state(copy, read_config(copy))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "F3"])
def test_shards_are_checked_each(copy, dtype):
    weights = load_file(copy / "model.safetensors")
    second = {WEIGHT: weights.pop(WEIGHT)}
    save_file(weights, copy / "one.safetensors")
    save_file(second, copy / "two.safetensors")
    index = dict.fromkeys(weights, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    store_as(copy / "two.safetensors", WEIGHT, dtype)
    with pytest.raises(InputError, match=f"is stored as {dtype}, expected F64"):
        load_encoder_state(copy, read_config(copy))


def test_integers_beside_the_weights_are_no_weights(copy):
    weights = load_file(copy / "model.safetensors")
    positions = {"embeddings.position_ids": torch.arange(8)[None]}
    save_file(weights | positions, copy / "model.safetensors")
    load_encoder_state(copy, read_config(copy))


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F8_E5M2"])
def test_heads_of_pretraining_are_checked(copy, dtype):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"cls.predictions.bias": torch.zeros(4)}, copy / "model.safetensors")
    assert "cls.predictions.bias" in load_pretraining_heads(copy)
    store_as(copy / "model.safetensors", "cls.predictions.bias", dtype)
    with pytest.raises(InputError, match=f"cls.predictions.bias is stored as {dtype}"):
        load_pretraining_heads(copy)


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint that was changed the checksums of what it is now."""
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, manifest.model_copy(update={"files": {}}))


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "F8_E4M3", "C64", "F3"])
@pytest.mark.parametrize("kind", ["best", "step"])
def test_a_checkpoint_of_other_dtypes_is_refused(run, tmp_path, kind, dtype):
    folder = shutil.copytree(run, tmp_path / "run")
    if kind == "step":
        (best,) = folder.glob("checkpoints/best-*")
        shutil.rmtree(best)
    (file,) = folder.glob(f"checkpoints/{kind}-*/*.safetensors")
    name = next(key for key in stored_dtypes(file) if key.startswith(("encoder.", "master.")))
    store_as(file, name, dtype)
    reseal(file.parent)
    with pytest.raises(InputError, match=f"{name} is stored as {dtype}, expected F32"):
        evaluate.main([str(folder)])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("master.", dtype) for dtype in ("F16", "I64", "BOOL", "F8_E4M3", "F6_E2M3")),
        *((kind, "F3") for kind in ("master.", "exp_avg_sq.", "step.", "frozen.")),
        *((kind, "BOOL") for kind in ("exp_avg.", "step.", "frozen.")),
    ],
)
def test_a_run_does_not_go_on_from_other_dtypes(run, tmp_path, kind, dtype):
    folder = shutil.copytree(run, tmp_path / "run")
    (file,) = folder.glob("checkpoints/step-*/*.safetensors")
    stored = stored_dtypes(file)
    name = next(key for key in stored if key.startswith(kind))
    assert stored[name] != dtype
    store_as(file, name, dtype)
    reseal(file.parent)
    arguments = ["demo", "--resume", "--out", str(folder), "--max-steps", "2", "--set", *TINY]
    settings = ["objectives.lm.kind=masked_lm", "train=['sst','lm']", "tasks.sts.head=cosine"]
    # The weights are read before the rest, by what takes other types of numbers, too.
    message = f"{name} is stored as {dtype}, expected (F64, )?{stored[name]}"
    with pytest.raises(InputError, match=message):
        train.main([*arguments, *settings])


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{", b"\0" * 8]
)
def test_what_has_no_header_is_left_to_the_library(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    assert stored_dtypes(copy / "model.safetensors") == {}
    with pytest.raises(InputError):
        load_encoder_state(copy, read_config(copy))
