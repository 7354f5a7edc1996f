"""Describe each parameter of a model, so that no other module depends on parameter names."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from .encoder import Stage
from .layers import GradientWrite, TaskLayer


class ParameterSpec(NamedTuple):
    """One parameter of a multitask model.

    Attributes:
        name: in the model's state dict.
        parameter: itself.
        stage: that it belongs to.
        tasks: the trained tasks whose losses reach it, in their order; none for a parameter that is
            not trained.
        write: how a backward pass writes its task gradients.
        layer: the layer that writes them; None for one task's own parameter, whose gradient
            autograd adds up.
        name_in_layer: its name in ``layer``.
    """

    name: str
    parameter: nn.Parameter
    stage: Stage
    tasks: tuple[str, ...]
    write: GradientWrite
    layer: TaskLayer | None
    name_in_layer: str

    @property
    def owner(self) -> str | None:
        """The one task that it belongs to, or None for a shared parameter."""
        return self.stage.task

    @property
    def bucket(self) -> str:
        """Bucket that its gradients are sent in."""
        return self.stage.bucket or self.stage.name


def describe_stage(
    stage: Stage,
    tasks: tuple[str, ...],
    used_by_heads: Collection[nn.Module],
    trained: Collection[nn.Module] | None = None,
) -> Iterator[ParameterSpec]:
    """Yield the description of each parameter of a stage, in their order.

    Args:
        stage: of the model.
        tasks: whose losses reach it.
        used_by_heads: shared layers that heads call, each for its own task alone, so that the
            gradients of several tasks are added one after the other.
        trained: the layers whose parameters are trained; None for all.

    Raises:
        TypeError: a parameter that tasks share is not in a :class:`~.layers.TaskLayer`.
    """
    for path, module in stage.module.named_modules(prefix=stage.name):
        own_tasks = tasks if trained is None or module in trained else ()
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            layer, write = None, GradientWrite.ADDED
            if stage.task is None:
                if not isinstance(module, TaskLayer):
                    raise TypeError(
                        f"{full}: a parameter that tasks share, of a {type(module).__name__}, "
                        "which writes no task gradients; make it one of engine.models.layers"
                    )
                layer = module
                if module not in used_by_heads:
                    write = module.gradient_write
            yield ParameterSpec(full, parameter, stage, own_tasks, write, layer, name)
