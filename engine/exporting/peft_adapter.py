"""Write the low-rank updates of a run as an adapter that the library PEFT loads.

    base = transformers.AutoModel.from_pretrained(INIT)
    model = peft.PeftModel.from_pretrained(base, FOLDER)

The adapter is that of the model that the run began from (``init``), by whose own names PEFT finds
the matrices.  It lies in a folder of its own: libraries that know PEFT would take a model folder
with an adapter_config.json for an adapter, and load the model that it names instead.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..config.local_names import local_name
from ..models.lora import LoraSettings, StoredUpdate
from ..models.registry import MODELS, spec_of
from ..runs.run import Run
from ..utils.errors import InputError
from ..utils.json_text import dump_json


def write_peft_adapter(
    folder: Path, run: Run, updates: Iterable[StoredUpdate], settings: LoraSettings
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: new.
        run: what was trained.
        updates: of the encoder, on any device.
        settings: of these updates.

    Raises:
        InputError: the run's ``config.json`` does not say which type of model it began from.
    """
    spec = spec_of(run.config)
    if MODELS.get(run.init_type) is not spec:
        raise InputError(
            f"{run.folder / 'config.json'}: init_model_type = {run.init_type!r}: expected one of "
            f"{', '.join(spec.model_types)}; put the file back as the training wrote it"
        )
    named = [update._replace(name=spec.name_in(run.init_type, update.name)) for update in updates]
    tensors: dict[str, Tensor] = {}
    for update in named:
        for matrix, weight in (("lora_A", update.down), ("lora_B", update.up)):
            name = f"base_model.model.{update.name}.{matrix}.weight"
            tensors[name] = weight.float().cpu().contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = dump_json(_config(local_name(run.recipe.init), named, settings), indent=2)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")


def _config(base: str, updates: list[StoredUpdate], settings: LoraSettings) -> dict[str, Any]:
    """Return the adapter's ``adapter_config.json``.

    PEFT multiplies an update by alpha / rank, both of its own matrix: where n updates are joined,
    both are n times those of one.
    """
    joined = {update.name: update.updates for update in updates if update.updates > 1}
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": _number(settings.alpha),
        "lora_dropout": settings.dropout_p,
        "peft_type": "LORA",
        "r": settings.rank,
        "alpha_pattern": {name: _number(n * settings.alpha) for name, n in joined.items()},
        "rank_pattern": {name: n * settings.rank for name, n in joined.items()},
        "target_modules": [update.name for update in updates],
        "task_type": "FEATURE_EXTRACTION",
    }


def _number(alpha: float) -> float:
    """Return a number as PEFT writes it, without a fraction where it has none."""
    return int(alpha) if alpha == int(alpha) else alpha
