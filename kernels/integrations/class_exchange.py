"""Give a module another class, so that its forward pass is another, and back.

The new class is made of two: a subclass of :class:`Exchanged`, whose methods come first, and the
module's own class, so that `isinstance`, names and all else that other libraries look at stay.
Parameters, hooks and submodules are untouched.  Copies and pickles have the new class too; what the
new class itself makes, as in ``type(model).from_pretrained``, is of the module's own class.

An abstract class must come first, or Python refuses the exchange.  Methods for it call the
module's own by ``self.original_class`` instead of ``super()``, which does not lead there.
"""

import abc
import functools
import inspect
from typing import Any, ClassVar

from torch import nn


class Exchanged(nn.Module):
    """Base of the classes that stand in for others.

    Attributes:
        original_class: the module's own class.
        replacement_class: the class that stands in for it.
        argument_names: of the module's own forward pass, those that have a place.
    """

    original_class: ClassVar[type[nn.Module]]
    replacement_class: ClassVar[type["Exchanged"]]
    argument_names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.replacement_class, self.original_class), *reduced[2:]


def exchange_class(module: nn.Module, replacement_class: type[Exchanged]) -> None:
    """Let ``replacement_class`` stand in for a module's class."""
    module.__class__ = _joined(replacement_class, type(module))


def is_called_by_class(module: nn.Module) -> bool:
    """Whether a call runs the forward pass of the module's class, and not one set on the module."""
    return "forward" not in vars(module)


def is_wrapped(module: nn.Module) -> bool:
    """Whether somebody gave an exchanged module another class since, as FSDP2 does."""
    return isinstance(module, Exchanged) and type(module) is not _joined(
        module.replacement_class, module.original_class
    )


def is_exchanged(module: nn.Module) -> bool:
    """Whether another class stands in for the module's own."""
    return isinstance(module, Exchanged)


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, Exchanged):
        exchanged: Any = module
        exchanged.__class__ = module.original_class


_classes: dict[tuple[type, type], type[Exchanged]] = {}


def _joined(replacement_class: type[Exchanged], original_class: type[nn.Module]) -> type[Exchanged]:
    """Return a class, always the same one, that other libraries take for ``original_class``."""
    if (replacement_class, original_class) not in _classes:
        _classes[replacement_class, original_class] = _join(replacement_class, original_class)
    return _classes[replacement_class, original_class]


def _join(replacement_class: type[Exchanged], original_class: type[nn.Module]) -> type[Exchanged]:
    is_original = replacement_class.forward is Exchanged.forward
    run = original_class.forward if is_original else replacement_class.forward

    @functools.wraps(original_class.forward)  # whose signature trainers look at
    def forward(self: Exchanged, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    @functools.wraps(original_class.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = original_class
        original_class.__init__(self, *args, **kwargs)

    parameters = inspect.signature(original_class.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    members = {
        **{
            name: getattr(original_class, name)
            for name in ("__module__", "__qualname__", "__doc__")
        },
        **{
            "__init__": init,
            "forward": forward,
            "original_class": original_class,
            "replacement_class": replacement_class,
            "argument_names": names[1:],
        },
    }
    if not isinstance(original_class, abc.ABCMeta):
        return type(original_class.__name__, (replacement_class, original_class), members)
    methods = {
        name: value for name, value in vars(replacement_class).items() if inspect.isfunction(value)
    }
    return type(
        original_class.__name__, (original_class, replacement_class), {**methods, **members}
    )


def _new(replacement_class: type[Exchanged], original_class: type[nn.Module]) -> nn.Module:
    """Make an instance for the unpickler, which then sets its state."""
    joined = _joined(replacement_class, original_class)
    return joined.__new__(joined)
