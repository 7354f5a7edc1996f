"""Keep renamed public names and arguments working, with a DeprecationWarning (docs/policy.md)."""

import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


def renamed_attribute(
    name: str, namespace: Mapping[str, object], renamed: Mapping[str, str]
) -> object:
    """Return what a module's old name stands for now; for ``__getattr__`` of the module.

    Args:
        name: the old name, a key of ``renamed``.
        namespace: the module's ``globals()``.
        renamed: new names by old ones.
    """
    module = str(namespace["__name__"]).rpartition(".")[2]
    new = renamed[name]
    _warn(f"{module}.{name} is {module}.{new} now")
    return namespace[new]


def renamed_argument(old: str, old_value: T, new: str, new_value: T, default: T) -> T:
    """Return the value of an argument that was given by its old name.

    Call it only where the old name was given, so that usual calls cost nothing.  Under
    `torch.compile`, where a warning would break the graph, it does not warn.

    Args:
        old: the old name of the argument.
        old_value: what was given by it.
        new: the name now.
        new_value: what was given by it.
        default: of the argument.

    Raises:
        TypeError: the argument was given by both names, and is not the default by the new one.
    """
    if type(new_value) is not type(default) or new_value != default:
        raise TypeError(f"{old}: the old name of {new}, which was given as well")
    _warn(f"the argument {old} is {new} now")
    return old_value


def _warn(message: str) -> None:
    """Warn whoever called the function that called a function of this module."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, DeprecationWarning, stacklevel=4)
