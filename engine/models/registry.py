"""The registry of encoders, a line each."""

from collections.abc import Mapping
from typing import Any

from ..utils.errors import InputError
from . import bert, modernbert
from .config import EncoderConfig
from .spec import ModelSpec

MODELS: dict[str, ModelSpec] = {
    model_type: spec for spec in (bert.SPEC, modernbert.SPEC) for model_type in spec.model_types
}
"""By the ``model_type`` of config.json."""

DEFAULT = bert.SPEC.config.model_type
"""The type of a model that is trained from scratch, and that of a ``config.json`` without one."""


def spec_of(config: EncoderConfig) -> ModelSpec:
    """Return the model type that a config belongs to."""
    return MODELS[config.model_type]


def find_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Return the model type that a ``config.json`` belongs to.

    Raises:
        InputError: its model type is unknown.
    """
    name = config.get("model_type", DEFAULT)
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(f"model_type = {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name]
