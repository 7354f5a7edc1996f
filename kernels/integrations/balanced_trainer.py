"""Balance the losses of several tasks inside transformers' Trainer.

    class Trainer(PCGradTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ...
            return {"sst": loss_a, "sts": loss_b}

    Trainer(model, settings, train_dataset=rows).train()

Trainer sees the sum of the losses, cut off from their graphs: its own backward pass ends there and
finds the factor of each loss, ``d sum / d loss_k`` (a micro-batch's share, the scale of fp16).  The
losses times their factors are then balanced.  So every setting that changes Trainer's loss or its
steps means what it says, and nothing of its code is repeated here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import ParallelMode

from ..balancing.pcgrad import Reduction
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Loss, Losses
from .balanced_optimizer import BalancedOptimizer, Method
from .parameter_rows import Granularity
from .pcgrad import PCGrad


class PCGradTrainer(Trainer):
    """A transformers Trainer whose ``compute_loss`` returns one loss for each task.

    The losses are a mapping by name or a list, of ``compute_loss``, ``compute_loss_func`` or the
    model's output ``loss``; a task without a loss in a batch has None or is left out.  The loss
    that is returned and logged is their sum; each task's own is logged as ``loss_NAME``, averaged
    over the steps in which it had one, and evaluation adds ``eval_loss_NAME``.

    The optimizer is the one that Trainer makes or ``optimizers`` gives, wrapped in :class:`.PCGrad`
    or, with a ``method``, :class:`.BalancedOptimizer`; one that is wrapped already is taken as it
    is.  Checkpoints, accumulation, clipping, schedules and mixed precision are Trainer's.  A run
    that resumes has the bits of one that was not interrupted; name the ``tasks`` if a batch may
    lack some.  A model whose labels Trainer does not find needs ``label_names`` of the training
    arguments for metrics; its losses are evaluated without.

    For other trainers derive from both: ``class Mine(PCGradTrainer, OtherTrainer)``.

    Args:
        arguments: as for Trainer.
        method: a function of the Gram matrix from :mod:`kernels.balancing`; PCGrad when None.
        granularity: the parameters that are balanced together, as for :class:`.PCGrad`.
        reduction: as for :class:`.PCGrad`, whose default is ``"mean"``.
        seed: of PCGrad's random orders; that of the training arguments when None.
        tasks: the tasks' names; those of the first losses when None.
        task_gradients: for one backward pass for all tasks: those of the model, which is on its
            device, or the number of tasks, to make them here.  ``compute_loss`` computes the losses
            within ``self.task_gradients.batch``, also where it evaluates.
        settings: as for Trainer.

    Attributes:
        task_gradients: as given or made, or None.

    Raises:
        ValueError: settings of the balancing that do not go together or with ``optimizers``; more
            than one process or device, DeepSpeed or FSDP; an optimizer that steps in the backward
            pass.  In training: ``compute_loss`` gave a single loss, or one that is not a scalar.
    """

    def __init__(
        self,
        *arguments: Any,
        method: Method | None = None,
        granularity: Granularity | None = None,
        reduction: Reduction | None = None,
        seed: int | None = None,
        tasks: Sequence[str] | None = None,
        task_gradients: TaskGradients | int | None = None,
        **settings: Any,
    ) -> None:
        of_pcgrad = {"reduction": reduction, "seed": seed}
        given: dict[str, Any] = {
            **of_pcgrad,
            "granularity": granularity,
            "task_gradients": task_gradients,
        }
        self._given = {name: value for name, value in given.items() if value is not None}
        self._method, self._tasks = method, None if tasks is None else tuple(tasks)
        unused = [name for name in of_pcgrad if method is not None and name in self._given]
        if unused:
            raise ValueError(f"{unused[0]}: is PCGrad's, and method is another")
        super().__init__(*arguments, **settings)
        self._check_setting()
        if not self.label_names:
            self.can_return_loss = True  # or Trainer would not compute losses to evaluate
        # Trainer would multiply a mapping by the number of processes, which is 1.
        self.args.average_tokens_across_devices = False
        if isinstance(task_gradients, int):
            on_device: Any = self.model
            task_gradients = TaskGradients(on_device, task_gradients)
            self._given["task_gradients"] = task_gradients
        self.task_gradients = task_gradients
        self._losses: dict[str, Loss] = {}  # of this micro-batch
        self._leaves: dict[str, Tensor] = {}  # the same, cut off from their graphs
        self._logged = _StepAverages()
        self._evaluated: dict[str, list[Tensor]] = {}

    def _check_setting(self) -> None:
        """Refuse what cannot be balanced.

        Raises:
            ValueError: as the class says.
        """
        wrapped = _balanced(self.optimizer)
        given = {**self._given, "method": self._method, "tasks": self._tasks}
        for name in (name for name, value in given.items() if value is not None and wrapped):
            raise ValueError(
                f"{name}: the optimizer in optimizers is a {type(wrapped).__name__} with settings "
                "of its own; give them there, or a plain optimizer here"
            )
        many = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            f"{self.args.n_gpu} GPUs in DataParallel": self.args.n_gpu > 1,
            "several processes": self.args.parallel_mode != ParallelMode.NOT_PARALLEL,
        }
        for what in (name for name, found in many.items() if found):
            raise ValueError(
                f"{type(self).__name__} trains in one process on one device, not with {what}; "
                "choose a device with CUDA_VISIBLE_DEVICES and start one process"
            )
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"optim: {optim} steps within the backward pass, before the tasks' gradients can "
                "be balanced; take one that does not, such as adamw_torch"
            )
        if "task_gradients" in self._given and self.model_init is not None:
            raise ValueError("task_gradients belong to one model; give model, not model_init")

    # ---- the optimizer -------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimizer and wrap it.

        Args:
            model: as for Trainer.

        Returns:
            The wrapped optimizer.
        """
        optimizer = super().create_optimizer(model)
        if _balanced(optimizer) is None:
            given = {"tasks": self._tasks, **self._given}
            if self._method is None:
                optimizer = PCGrad(optimizer, **{"seed": self.args.seed, **given})
            else:
                optimizer = BalancedOptimizer(optimizer, self._method, **given)
        self.optimizer = optimizer
        return optimizer

    # ---- training ------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the losses of a micro-batch and balance their gradients.

        Args:
            model: as for Trainer.
            inputs: as for Trainer.
            num_items_in_batch: as for Trainer.

        Returns:
            The sum of the losses, as Trainer divides it among micro-batches.
        """
        self._losses, self._leaves = {}, {}  # of a step that failed half way
        with self._loss_computed_by(self._cut_off):
            total: Tensor = super().training_step(model, inputs, num_items_in_batch)
        losses, leaves = self._losses, self._leaves
        self._losses, self._leaves = {}, {}  # so that no graph outlives its step
        scaler = self.accelerator.scaler
        for task, leaf in leaves.items():
            loss, factor = losses[task], leaf.grad
            assert loss is not None  # leaves are made of losses,
            assert factor is not None  # and each is a term of the sum
            losses[task] = loss * factor
            if scaler is not None:
                factor = factor / scaler.scale(torch.ones_like(factor))
            filtered = self.args.logging_nan_inf_filter
            self._logged.add(task, leaf.detach() * factor, self.state.global_step, filtered)
        optimizer = _balanced(self.optimizer)
        assert optimizer is not None  # create_optimizer wraps it
        optimizer.backward(losses)
        return total

    def _cut_off(self, losses: Any) -> Tensor:
        """Keep the losses; return their sum, on which Trainer's backward pass ends."""
        if isinstance(losses, Tensor) or not isinstance(losses, Mapping | list | tuple):
            _refuse_single(losses)
        if self._leaves:
            raise ValueError(
                "compute_loss: called twice in a training step, of which one call's losses are "
                "balanced; return all losses from one"
            )
        self._losses = self._named(losses)
        self._leaves = _scalars(self._losses, torch.Tensor.requires_grad_)
        if not self._leaves:
            raise ValueError("compute_loss: no task has a loss, but each batch needs one at least")
        return sum(self._leaves.values(), torch.zeros((), device=self.args.device))

    def _named(self, losses: Losses) -> dict[str, Loss]:
        if isinstance(losses, Mapping):
            return dict(losses)
        in_order = list(losses)
        optimizer = _balanced(self.optimizer)
        names = (self._tasks if optimizer is None else optimizer.tasks) or ()
        if len(names) != len(in_order):
            names = tuple(map(str, range(len(in_order))))
        return dict(zip(names, in_order, strict=True))

    @contextmanager
    def _loss_computed_by(self, adapt: Callable[[Any], Any]) -> Iterator[None]:
        """Give Trainer what ``adapt`` makes of the losses, from whichever class they are."""
        own = vars(self)  # of this trainer alone, before its class
        before = own.copy()
        own["compute_loss"] = partial(_adapted, self.compute_loss, adapt)
        try:
            yield
        finally:
            del own["compute_loss"]
            if "compute_loss" in before:
                own["compute_loss"] = before["compute_loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each task's loss beside the sum.

        Args:
            logs: as for Trainer.
            start_time: as for Trainer.
        """
        if "loss" in logs:
            logs = logs | {f"loss_{task}": value for task, value in self._logged.take().items()}
        super().log(logs, start_time)

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(self, *arguments: Any, **settings: Any) -> tuple[Any, Any, Any]:
        """Predict as Trainer does; the loss is the sum of the tasks' losses.

        Args:
            arguments: as for Trainer.
            settings: as for Trainer.

        Returns:
            The loss, logits and labels.
        """
        with self._loss_computed_by(self._summed):
            return super().prediction_step(*arguments, **settings)

    def _summed(self, losses: Any) -> Any:
        """Note each task's loss, as often as Trainer counts the sum; return the sum."""
        if isinstance(losses, Tensor) or not isinstance(losses, Mapping | list | tuple):
            return losses
        scalars = _scalars(self._named(losses), torch.Tensor.detach)
        for task, loss in scalars.items():
            repeated = self.gather_function(loss.repeat(self.args.eval_batch_size))
            self._evaluated.setdefault(task, []).append(repeated)
        return sum(scalars.values(), torch.zeros((), device=self.args.device))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with each task's loss among the metrics.

        Args:
            dataloader: as for Trainer.
            description: as for Trainer.
            prediction_loss_only: as for Trainer.
            ignore_keys: as for Trainer.
            metric_key_prefix: as for Trainer.

        Returns:
            Trainer's output; ``metrics`` has ``PREFIX_loss_NAME``, too.
        """
        self._evaluated = {}
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = output.metrics
        assert metrics is not None  # Trainer's has some
        for task, parts in self._evaluated.items():
            losses = torch.cat(parts)
            finite = losses[losses.isfinite()]
            if self.args.logging_nan_inf_filter and len(finite):
                losses = finite
            metrics[f"{metric_key_prefix}_loss_{task}"] = losses.mean().item()
        return output


class _StepAverages:
    """Each task's loss since the last log: sums on the device, and the steps that had one."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, set[int]] = {}

    def add(self, task: str, loss: Tensor, step: int, filtered: bool) -> None:
        """Add a micro-batch's share; as Trainer, with the average so far where it is not finite."""
        before = self._sums.get(task, torch.zeros_like(loss))
        steps = self._steps.setdefault(task, set())
        if filtered:
            loss = torch.where(loss.isfinite(), loss, before / max(len(steps), 1))
        self._sums[task] = before + loss
        steps.add(step)

    def take(self) -> dict[str, float]:
        """Return the averages and begin anew."""
        averages = {
            task: total.item() / len(self._steps[task]) for task, total in self._sums.items()
        }
        self._sums, self._steps = {}, {}
        return averages


def _adapted(
    compute_loss: Callable[..., Any],
    adapt: Callable[[Any], Any],
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    **settings: Any,
) -> Any:
    """Compute losses by a trainer's ``compute_loss``; return them adapted, with its outputs.

    Raises:
        ValueError: it did not return the outputs that it was asked for.
    """
    if not return_outputs:
        return adapt(compute_loss(model, inputs, **settings))
    result = compute_loss(model, inputs, return_outputs=True, **settings)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            "compute_loss: expected (losses, outputs) where return_outputs=True, which evaluation "
            f"passes, got a {type(result).__name__}; without outputs, return (losses, {{}})"
        )
    losses, outputs = result
    return adapt(losses), outputs


def _scalars(losses: Mapping[str, Loss], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Detached losses, changed; without those that are None or constants of Python.

    Raises:
        ValueError: one is not a scalar.
    """
    found = {}
    for task, loss in losses.items():
        if loss is None or isinstance(loss, int | float):
            continue
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = list(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"compute_loss: expected a scalar for each task, {task!r} is {what}")
        found[task] = change(loss.detach().reshape(()))
    return found


def _refuse_single(losses: Any) -> NoReturn:
    what = "a single loss" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    raise ValueError(
        f"compute_loss: expected one loss for each task, such as {{'a': loss_a, 'b': loss_b}}, got "
        f"{what}; return them from compute_loss, compute_loss_func or the model's output 'loss' "
        "(label_smoothing_factor makes one loss: smooth each task's own)"
    )


def _balanced(optimizer: Any) -> BalancedOptimizer | None:
    """The balanced one among an optimizer and those that it wraps."""
    while optimizer is not None and not isinstance(optimizer, BalancedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
