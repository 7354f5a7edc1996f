"""Find the wrappers that train an optimizer's parameters on several ranks.

torch tells nobody which module wraps a parameter, so the wrappers are looked up among all objects,
once for each set of parameters.  A wrapper's own gradient exchange is passed over while task
gradients are computed: it would average sums of tasks, or wait for gradients that do not come.
"""

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Wrappers:
    """The modules that wrap some parameters.

    Those of DistributedDataParallel are not kept alive: torch hangs now and then where such a
    module is the last to let go of its process group.

    Args:
        ddp: those of DistributedDataParallel.
        fsdp: those of FSDP2, ``fully_shard``.
    """

    def __init__(
        self, ddp: Sequence[DistributedDataParallel] = (), fsdp: Sequence[Any] = ()
    ) -> None:
        self._ddp = [weakref.ref(module) for module in ddp]
        self.fsdp = tuple(fsdp)

    @property
    def ddp(self) -> list[DistributedDataParallel]:
        """Those of DistributedDataParallel that are still there."""
        return [module for found in self._ddp if (module := found()) is not None]

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        """The group over which DistributedDataParallel averages; None without one.

        Raises:
            ValueError: there are several.
        """
        groups = {id(module.process_group): module.process_group for module in self.ddp}
        if len(groups) > 1:
            raise ValueError(
                "process_group: the optimizer's parameters are in DistributedDataParallel modules "
                "with different process groups; give the one to average task gradients over"
            )
        return next(iter(groups.values()), None)

    @property
    def synchronise(self) -> bool:
        """Whether gradients are exchanged now: outside of every ``no_sync``."""
        return all(module.require_backward_grad_sync for module in self.ddp)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and parameters that DistributedDataParallel averages by itself."""
        for module in self.ddp:
            for name, parameter in module.module.named_parameters():
                if parameter.requires_grad and name not in module.parameters_to_ignore:
                    yield name, parameter

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """Run backward passes of task gradients, which these wrappers do not exchange.

        FSDP2 exchanges each one, even where it was told to wait for another.
        """
        with ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(_without_reducer(module))
            for module in self.fsdp:
                stack.enter_context(_with_reduce_scatter(module))
            yield


def find_wrappers(parameters: Sequence[Tensor]) -> Wrappers:
    """Find the modules that wrap any of the parameters.

    Raises:
        NotImplementedError: one is FSDP1, DeepSpeed ZeRO-3 or DistributedDataParallel with
            ``mixed_precision``, or trains inside torch's ``Join``.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 partitions the parameters and computes their gradients by itself, so "
            "gradients of single tasks cannot be had; use FSDP2 (fully_shard) or "
            "DistributedDataParallel"
        )
    own = {id(parameter) for parameter in parameters}
    of_fsdp1 = _class_of("torch.distributed.fsdp", "FullyShardedDataParallel")
    of_fsdp2 = _class_of("torch.distributed.fsdp", "FSDPModule")
    found = [
        module
        for module in _modules((DistributedDataParallel, *of_fsdp1, *of_fsdp2))
        if any(id(parameter) in own for parameter in module.parameters())
    ]
    if any(isinstance(module, of_fsdp1) for module in found):
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) flattens the parameters of all tasks into one and "
            "reduces their summed gradient; use FSDP2, torch.distributed.fsdp.fully_shard"
        )
    ddp = [module for module in found if isinstance(module, DistributedDataParallel)]
    for module in ddp:
        _check_ddp(module)
    return Wrappers(ddp, [module for module in found if isinstance(module, of_fsdp2)])


def _check_ddp(module: DistributedDataParallel) -> None:
    if module.mixed_precision is not None:
        raise NotImplementedError(
            "DistributedDataParallel's mixed_precision casts gradients as they are exchanged, "
            "which task gradients are not; use torch.autocast"
        )
    if module._join_config.enable:
        raise NotImplementedError(
            "Join: a rank that has no batches left cannot stand in for task gradients; give every "
            "rank as many steps, with None for the losses of tasks without examples"
        )
    if module._comm_hooks:
        warnings.warn(
            "DistributedDataParallel: its communication hooks do not see task gradients, which are "
            "averaged as they are",
            stacklevel=7,
        )


def _class_of(module: str, name: str) -> tuple[type, ...]:
    """Return a class of a module that somebody has imported, so that it may have instances."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _modules(kinds: tuple[type, ...]) -> Iterator[nn.Module]:
    for candidate in gc.get_objects():
        if issubclass(type(candidate), kinds):
            yield candidate


@contextmanager
def _without_reducer(module: DistributedDataParallel) -> Iterator[None]:
    """Let a module's reducer, which its forward pass prepared, expect no gradient."""
    module.reducer._reset_state()
    if not module.static_graph:
        yield
        return
    # The first backward pass would end by reducing what the hooks have counted.
    before = module._static_graph_delay_allreduce_enqueued
    module._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        module._static_graph_delay_allreduce_enqueued = before


@contextmanager
def _with_reduce_scatter(module: Any) -> Iterator[None]:
    """Let FSDP2 exchange gradients in each backward pass."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # one, or none, before torch 2.12
    if groups is None:
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    before = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    was_last = state._state_ctx.is_last_backward
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = True
    state._state_ctx.is_last_backward = True
    try:
        yield
    finally:
        state._state_ctx.is_last_backward = was_last
        for group, reduce, all_reduce in before:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
