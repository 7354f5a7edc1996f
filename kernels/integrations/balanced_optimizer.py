"""Any balancing method around any torch optimizer.

    optimizer = BalancedOptimizer(torch.optim.AdamW(model.parameters()), balancing.cagrad)
    optimizer.zero_grad()
    optimizer.backward([loss_a, loss_b, loss_c])
    optimizer.step()

:mod:`.balanced_gradients` computes and combines the gradients of the tasks; this module is the
interface of an optimizer.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..registration.deprecation import renamed_argument
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses
from .balanced_gradients import BalancedGradients, SeenGradient
from .global_step_hooks import spare_inner, stepping
from .parameter_rows import Granularity
from .rank_exchange import ChosenGroup, Examples, ProcessGroup

Method = Callable[[Tensor], Tensor]
"""``gram [K, K] -> weights [K]``, as in :mod:`.balancing` or TorchJD's weightings."""


class BalancedOptimizer(torch.optim.Optimizer):
    """A torch optimizer around another; ``backward(losses)`` replaces ``loss.backward()``.

    Parameter groups, state and defaults are those of the wrapped optimizer, and hooks,
    ``copy.deepcopy``, pickling, learning-rate schedulers and ``torch.amp.GradScaler`` work as with
    any other.  On several processes it works with DistributedDataParallel, with FSDP2
    (``fully_shard``), and with a process group and no wrapper; FSDP1 and DeepSpeed ZeRO-3 are
    refused.  A parameter that no task reaches keeps its ``grad``, usually None, so that weight
    decay does not change it.

    Args:
        optimizer: any torch optimizer.
        method: a function of the Gram matrix from :mod:`kernels.balancing`, or a TorchJD weighting
            of Gramians.
        granularity: the parameters that are balanced together: the whole ``"model"``, each
            parameter ``"group"`` of the optimizer (a layer, say), or each ``"tensor"``.
        task_gradients: ``TaskGradients(model, num_tasks)`` of the module whose parameters the
            optimizer trains; the losses then come from a forward pass within its
            ``batch([32, 32])``, and ``backward`` is one backward pass.  Hooks of parameters'
            gradients (``register_hook``) are not called with it.  Not with FSDP2.
        tasks: the tasks' names, for losses by name; those of the first losses when None.
        process_group: the ranks whose task gradients are averaged before they are balanced, so that
            all do the update of one process with the examples of all.  ``"auto"``: those of the
            parameters' DistributedDataParallel or FSDP2, or else the default process group, if it
            has several ranks.  None: this process alone.
        check_ranks_every: steps between two comparisons of all ranks' weights, bit by bit, the
            first before the first step; 0: never.
        extent: the old name of ``granularity``, deprecated.

    Attributes:
        optimizer: the wrapped one.

    Raises:
        TypeError: ``optimizer`` is none, ``method`` takes more than a Gram matrix,
            ``process_group`` is no group, or ``task_gradients`` are none.
        ValueError: an unknown ``granularity``, a name twice, or a negative ``check_ranks_every``.
    """

    _backward_name = "backward"
    # Of copies and pickles.
    _settings: tuple[str, ...] = ("optimizer", "_method", "_gradients", "_check_ranks_every")
    _check_ranks_every = 100  # of pickles before
    _steps = 0  # since this object was made

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        granularity: Granularity = "model",
        task_gradients: TaskGradients | None = None,
        tasks: Sequence[str] | None = None,
        process_group: ProcessGroup = "auto",
        check_ranks_every: int = 100,
        extent: Granularity | None = None,
    ) -> None:
        if extent is not None:
            granularity = renamed_argument("extent", extent, "granularity", granularity, "model")
        group = ChosenGroup(process_group)
        gradients = BalancedGradients(granularity, False, task_gradients, tasks, group)
        self._set_up(optimizer, gradients, check_ranks_every)
        self._method = _checked(method)

    def _set_up(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: BalancedGradients,
        check_ranks_every: int,
    ) -> None:
        if check_ranks_every < 0:
            raise ValueError(f"check_ranks_every: expected at least 0, got {check_ranks_every}")
        self._check_ranks_every = check_ranks_every
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer)}")
        self.optimizer, self._gradients = optimizer, gradients
        # Sets the hooks up; `Optimizer.__init__` would make groups and a state of its own.
        self.__setstate__({})

    @property
    def gram(self) -> Tensor | None:
        """``[K, K]`` Gram matrix of the task gradients, after ``backward``."""
        return self._gradients.gram

    @property
    def weights(self) -> Tensor | None:
        """``[G, K]`` weights that were applied, a row for each of the G groups or tensors."""
        return self._gradients.weights

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The tasks' names, or None while their losses are told apart by position."""
        return self._gradients.tasks

    # ---- the wrapped optimizer's ---------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's default settings."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the optimizer.

        Args:
            param_group: as torch's optimizers take it.
        """
        self.optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._settings}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state_dict: what :meth:`state_dict` returned, here or of the optimizer alone.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of the single tasks included.

        Args:
            set_to_none: of the parameters' ``grad``, instead of zeros.
        """
        self._gradients.clear()
        self.optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do a step of the optimizer.

        Gradients of another origin alone, which nothing has balanced, are warned about.

        Args:
            closure: computes the losses and calls ``backward``, as often as the optimizer asks for
                it.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: the closure made gradients without ``backward``; the ranks' weights
                differ, or the gradients were not exchanged with them.
        """
        if closure is None:
            self._check_ranks()
            if self._trains_unbalanced():
                warnings.warn(
                    f"step: no gradient is of {self._backward_name}(losses), so nothing balances "
                    "them; to train without, step the wrapped optimizer, `.optimizer`",
                    stacklevel=3,
                )
            arguments: tuple[Any, ...] = ()
        else:
            arguments = (functools.partial(self._run, closure),)
        with stepping(self.optimizer):
            loss: float | None = self.optimizer.step(*arguments)
        self._gradients.end_step()
        return loss

    def _run(self, closure: Callable[[], float]) -> float:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [SeenGradient.of(parameter) for parameter in parameters]
        loss = closure()
        self._check_ranks()
        spare_inner()  # hooks that it registered
        if self._gradients.are_foreign(self.param_groups) and not all(
            p.grad is None if seen is None else seen.is_untouched()
            for p, seen in zip(parameters, before, strict=True)
        ):
            raise RuntimeError(
                f"step: the closure made gradients without {self._backward_name}(losses), so "
                "nothing balances them; call that instead of loss.backward() (in Lightning, with "
                "automatic_optimization = False)"
            )
        return loss

    @torch.compiler.disable  # of torch 2.11, it would not trace the count
    def _check_ranks(self) -> None:
        """Compare the ranks' weights before a step, where it is due."""
        self._gradients.check_exchanged()
        every, number = self._check_ranks_every, self._steps
        if every and number % every == 0 and self._gradients.awaits_step:
            self._gradients.check_ranks(self.param_groups, self._state_of_order(), number)
        self._steps = number + 1

    def _state_of_order(self) -> list[int]:
        """Return the numbers that decide the weights beside the gradients."""
        return []

    @torch.compiler.disable
    def _trains_unbalanced(self) -> bool:
        # With all rates 0, torch.distributed.checkpoint steps to make the optimizer's state.
        trains = not all(_is_zero(group.get("lr")) for group in self.param_groups)
        return trains and self._gradients.are_foreign(self.param_groups)

    # ---- task gradients ------------------------------------------------------------------------

    def backward(self, losses: Losses, *, examples: Examples | None = None) -> None:
        """Add the weighted sum of the task gradients to every parameter's ``grad``, in place.

        Called again (gradient accumulation), it adds to the gradients of the single tasks and
        combines them anew, for as long as what it wrote is there untouched.  Once a gradient was
        cleared, by whichever ``zero_grad``, or changed, by clipping or another backward pass, the
        next call begins afresh and adds to what is there.  ``step`` changes none.

        A task that has no loss this time, None or a constant or missing by name, adds nothing to
        its gradient.  The graph of a loss is freed as soon as no later loss needs it.  Hooks of a
        parameter's gradient see that of each task; those registered by
        ``register_post_accumulate_grad_hook`` are called once, when ``grad`` is written.

        What else the losses depend on, such as heads with an optimizer of their own, gets the
        gradient of their sum, as in ``backward``.

        On several ranks (``process_group``) every rank calls this with its own losses.  A task's
        gradient is the mean over the ranks that have a loss of it, and ``grad`` and weights are the
        same on all.  Within ``no_sync`` of DistributedDataParallel no gradient is exchanged or
        balanced; ``grad`` is then the sum of this rank's gradients until the next call outside.

        Args:
            losses: one scalar loss for each task, any iterable in their order, or by name.
            examples: for each task, in order or by name, how many examples this rank's loss is the
                mean of; ranks count by it.  As many on all when None.  It changes nothing where
                there are no other ranks.

        Raises:
            ValueError: if no loss depends on a trained parameter, one is not a scalar, the tasks
                are others than before, a single loss without a name is added to another, a loss
                went through a reentrant activation checkpoint, or the losses or the optimizer's
                parameters are not those of ``task_gradients``; the ranks train different parameters
                or tasks; ``examples`` are not as above.
            TypeError: the method's weights are not a tensor ``[K]``.
            NotImplementedError: the parameters are wrapped by FSDP1 or DeepSpeed ZeRO-3, whose
                gradients of single tasks cannot be had.
        """
        self._gradients.backward(losses, self.param_groups, self._weigh, examples)

    def _weigh(self, grams: Tensor) -> Tensor:
        """Make weights ``[G, K]`` out of ``[G, K, K]``."""
        weights = [self._method(gram) for gram in grams]
        for own in weights:
            if not isinstance(own, Tensor) or own.shape != grams.shape[1:2]:
                what = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
                raise TypeError(
                    f"method: expected a tensor [{grams.shape[1]}] of weights from "
                    f"{_name(self._method)}, got {what}"
                )
        return torch.stack(weights)


def _is_zero(lr: Any) -> bool:
    on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
    return on_host and lr is not None and bool(lr == 0)


def _checked(method: Method) -> Method:
    """Return a method that can be called with a Gram matrix alone.

    Raises:
        TypeError: it cannot.
    """
    if not callable(method):
        raise TypeError(f"method: expected a function of the Gram matrix, got {method!r}")
    try:
        inspect.signature(method).bind(None)
    except TypeError as error:
        raise TypeError(
            f"method: {_name(method)} cannot be called with a Gram matrix alone ({error}); give it "
            "the rest, functools.partial(method, …), or a function that keeps it between steps"
        ) from None
    except ValueError:  # a function in C that tells of no arguments
        pass
    return method


def _name(method: Method) -> str:
    return getattr(method, "__name__", repr(method))
