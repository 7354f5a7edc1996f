"""Read and write weights in the Hugging Face layout.  safetensors only: no pickle is loaded.

The :class:`~engine.models.spec.ModelSpec` of a model type interprets a folder's config and tensors.
This module finds and reads the files of any type, and checks that every weight is there, has its
shape, and is a number.
"""

from collections.abc import Iterable, Iterator, Mapping
from os.path import expanduser, isdir, isfile  # unlike pathlib's they raise nothing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.errors import InputError, first_line
from ..utils.finite import all_finite
from ..utils.untrusted_io import parse_json, read_bytes
from .config import EncoderConfig
from .registry import DEFAULT, MODELS, find_spec, spec_of
from .spec import StoredWeights
from .stored_dtypes import check_floats, check_stored_dtypes

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 64 << 20
"""Bytes of a config or an index."""


def resolve(model: str) -> Path:
    """Return the folder of ``model``: a local folder, or a hub name, downloaded once.

    Raises:
        InputError: there is no such folder, and the hub does not give it either.
    """
    folder = Path(expanduser(model))
    if isdir(folder):
        return folder
    if isfile(folder):
        raise InputError(f"--init {model}: a file; unpack archives and give the model's folder")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"--init {model}: no such folder; give a model's folder or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=["config.json", "*.safetensors*", "vocab.txt", "tokenizer*.json"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"--init {model}: neither a folder nor a model that the hub gives ({reason}); "
            "give the folder of a model or a run, or a hub name"
        ) from None


def read_config(folder: Path) -> EncoderConfig:
    """Read ``config.json`` in ``folder``.

    Raises:
        InputError: it is missing, no JSON, or describes no encoder that is supported.
    """
    config = _read_config(folder)
    try:
        return find_spec(config).config.from_huggingface(config)
    except InputError as error:
        raise InputError(
            f"{folder / 'config.json'}: {error}; give a plain encoder of one of the types "
            f"{', '.join(MODELS)}"
        ) from None


def read_model_type(folder: Path) -> str:
    """Return the ``model_type`` that ``config.json`` in ``folder`` has, or stands for.

    Raises:
        InputError: there is no such file, or it is no JSON.
    """
    return read_entry(folder, "model_type") or DEFAULT


def read_entry(folder: Path, name: str) -> str:
    """Return a text of ``config.json`` in ``folder``; empty where it has none of that name.

    Raises:
        InputError: there is no such file, or it is no JSON.
    """
    value = _read_config(folder).get(name, "")
    return value if isinstance(value, str) else ""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not isfile(path) and isfile(folder / "adapter_config.json"):
        raise InputError(
            f"{folder}: holds low-rank updates without their model; merge them into it (PEFT's "
            "merge_and_unload), and give the folder of that"
        )
    if not isfile(path):
        raise InputError(
            f"{path}: not found; give a model folder, which holds it, or the folder of a run"
        )
    return _json_object(path)


def has_weights(folder: Path) -> bool:
    """Return whether a folder has the weights of a model, whole or in shards."""
    return any(isfile(folder / name) for name in (_WEIGHTS, _INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, whole or in shards.

    Raises:
        InputError: there are none.
    """
    index = folder / _INDEX
    names = _indexed_files(index) if isfile(index) else [_WEIGHTS]
    files = [folder / name for name in names]
    for file in files:
        if not isfile(file):
            raise InputError(
                f"{file}: not found; weights are read from safetensors alone, which transformers' "
                "from_pretrained(MODEL).save_pretrained(FOLDER) makes of any other form"
            )
    return files


def _indexed_files(index: Path) -> list[str]:
    """Return the names of the weight files that an index spreads the weights over."""
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: not an index of weight files: no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not the name of a file in that folder")
    return sorted(set(weight_map.values()))


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file holds none.
    """
    try:
        content = parse_json(read_bytes(path, _LARGEST_JSON))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON object ({error}); replace it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object but a {type(content).__name__}; replace it")
    return content


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for archive, name in _entries(folder):
        yield name, archive.get_tensor(name)


def _shapes(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor without content in the place of each weight."""
    for archive, name in _entries(folder):
        yield name, torch.empty(archive.get_slice(name).get_shape(), device="meta")


def _entries(folder: Path) -> Iterator[tuple[Any, str]]:
    for file in weight_files(folder):
        check_stored_dtypes([file])
        try:
            with safe_open(file, framework="pt") as archive:
                for name in archive.keys():  # noqa: SIM118 (not a dict)
                    yield archive, name
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})") from None


def load_encoder_state(folder: Path, config: EncoderConfig) -> dict[str, Tensor]:
    """Read a model's weights under the names of its encoder (:class:`~engine.models.encoder`).

    Args:
        folder: holds ``model.safetensors`` or its shards, of a known model type, with heads or
            without.
        config: the shape that the weights must have.

    Returns:
        A state dict, fp32, complete.

    Raises:
        InputError: a weight is missing, unknown, of another shape or not finite.
    """
    found = _sorted_weights(folder, _tensors(folder)).encoder
    state: dict[str, Tensor] = {}
    for name, stored_names, shape in spec_of(config).weights(config):
        tensors = [_take(found, stored_name, shape, folder) for stored_name in stored_names]
        for stored_name, tensor in zip(stored_names, tensors, strict=True):
            check_floats(folder, stored_name, tensor)
        weights = (_in_fp32(folder, *named) for named in zip(stored_names, tensors, strict=True))
        state[name] = torch.cat(list(weights))
    _refuse_others(found, folder)
    return state


def check_weights(folder: Path, config: EncoderConfig) -> None:
    """Check the names and shapes of a model's weights against its config.

    Only the files' headers are read, so that a config that asks for a huge model is refused
    before anything of that size is built.

    Args:
        folder: as for :func:`load_encoder_state`.
        config: the shape that the weights must have.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    found = _sorted_weights(folder, _shapes(folder)).encoder
    for _, stored_names, shape in spec_of(config).weights(config):
        for stored_name in stored_names:
            _take(found, stored_name, shape, folder)
    _refuse_others(found, folder)


def _sorted_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> StoredWeights:
    """Return a folder's tensors as its model type sorts and names them."""
    config = _read_config(folder)
    return find_spec(config).sort_weights(config, tensors)


def _take(found: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """Remove a weight from those that were found, and return it."""
    if name not in found:
        raise InputError(f"{folder}: weight {name} is missing; give the whole model")
    tensor = found.pop(name)
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{folder}: weight {name} has shape {list(tensor.shape)}, "
            f"config.json asks for {list(shape)}"
        )
    return tensor


def _refuse_others(found: dict[str, Tensor], folder: Path) -> None:
    if found:
        raise InputError(
            f"{folder}: weight {sorted(found)[0]} is not part of an encoder of its "
            f"type; give a plain encoder of one of the types {', '.join(MODELS)}"
        )


def load_pretraining_heads(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the pretraining heads, under BERT's names; often none.

    Raises:
        InputError: a weight of masked LM's head is not finite, or the files cannot be read.
    """
    stored = _sorted_weights(folder, _tensors(folder))
    head = {name: _in_fp32(folder, name, t) for name, t in stored.pretrained_head.items()}
    return head | stored.others


def _in_fp32(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a weight as fp32.

    Raises:
        InputError: it is of no dtype for weights, or holds values that are not finite in fp32.
    """
    check_floats(folder, name, tensor)
    weight = tensor.float()
    if not all_finite([weight]):  # float64 may be beyond fp32
        raise InputError(
            f"{folder}: weight {name} holds values that are no finite numbers in fp32; "
            "give another copy of the model"
        )
    return weight


def to_huggingface_state(state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Rename an encoder's state dict back: the inverse of :func:`load_encoder_state`."""
    renamed: dict[str, Tensor] = {}
    for name, stored_names, _ in spec_of(config).weights(config):
        pieces = state[name].chunk(len(stored_names)) if len(stored_names) > 1 else (state[name],)
        renamed.update(
            (stored_name, piece.clone())
            for stored_name, piece in zip(stored_names, pieces, strict=True)
        )
    return renamed
