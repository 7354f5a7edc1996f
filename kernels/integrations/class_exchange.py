"""Give a module another class, so that its forward pass is another, and back.

The new class is made of two: a subclass of :class:`Exchanged`, whose methods come first, and the
module's own class, so that `isinstance`, names and all else that other libraries look at stay.
Parameters, hooks and submodules are untouched.  Copies and pickles have the new class too; what the
new class itself makes, as in ``type(model).from_pretrained``, is of the module's own class.

An abstract class must come first, or Python refuses the exchange.  Methods for it call the
module's own by ``self.before`` instead of ``super()``, which does not lead there.
"""

import abc
import functools
import inspect
from typing import Any, ClassVar

from torch import nn


class Exchanged(nn.Module):
    """Base of the classes that stand in for others.

    Attributes:
        before: the module's own class.
        instead: the class that stands in for it.
        argument_names: of the module's own forward pass, those that have a place.
    """

    before: ClassVar[type[nn.Module]]
    instead: ClassVar[type["Exchanged"]]
    argument_names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.instead, self.before), *reduced[2:]


def exchange_class(module: nn.Module, instead: type[Exchanged]) -> None:
    """Let ``instead`` stand in for a module's class."""
    module.__class__ = _joined(instead, type(module))


def is_called_by_class(module: nn.Module) -> bool:
    """Whether a call runs the forward pass of the module's class, and not one set on the module."""
    return "forward" not in vars(module)


def is_wrapped(module: nn.Module) -> bool:
    """Whether somebody gave an exchanged module another class since, as FSDP2 does."""
    return isinstance(module, Exchanged) and type(module) is not _joined(
        module.instead, module.before
    )


def is_exchanged(module: nn.Module) -> bool:
    """Whether another class stands in for the module's own."""
    return isinstance(module, Exchanged)


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, Exchanged):
        exchanged: Any = module
        exchanged.__class__ = module.before


_classes: dict[tuple[type, type], type[Exchanged]] = {}


def _joined(instead: type[Exchanged], before: type[nn.Module]) -> type[Exchanged]:
    """Return a class, always the same one, that other libraries take for ``before``."""
    if (instead, before) not in _classes:
        _classes[instead, before] = _join(instead, before)
    return _classes[instead, before]


def _join(instead: type[Exchanged], before: type[nn.Module]) -> type[Exchanged]:
    @functools.wraps(before.forward)  # whose signature trainers look at
    def forward(self: Exchanged, *args: Any, **kwargs: Any) -> Any:
        return instead.forward(self, *args, **kwargs)

    @functools.wraps(before.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = before
        before.__init__(self, *args, **kwargs)

    parameters = inspect.signature(before.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    members = {
        **{name: getattr(before, name) for name in ("__module__", "__qualname__", "__doc__")},
        **{
            "__init__": init,
            "forward": forward,
            "before": before,
            "instead": instead,
            "argument_names": names[1:],
        },
    }
    if not isinstance(before, abc.ABCMeta):
        return type(before.__name__, (instead, before), members)
    methods = {name: value for name, value in vars(instead).items() if inspect.isfunction(value)}
    return type(before.__name__, (before, instead), {**methods, **members})


def _new(instead: type[Exchanged], before: type[nn.Module]) -> nn.Module:
    """Make an instance for the unpickler, which then sets its state."""
    joined = _joined(instead, before)
    return joined.__new__(joined)
