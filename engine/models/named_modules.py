"""Modules by names that a recipe chooses."""

from torch import nn


class NamedModules(nn.ModuleDict):
    """A ModuleDict that takes any name without a dot, those of its own attributes too.

    torch refuses ``train``, ``keys`` and whatever else a module has as an attribute, which differs
    between its versions.  Here modules are reached by ``[name]`` alone, and attributes that are set
    are no modules, so that neither hides the other.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute."""
        object.__setattr__(self, name, value)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Register a module."""
        self._modules[key] = module
