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
from .rank_exchange import Examples


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

    Started by torchrun or ``accelerate launch``, it trains on several processes as Trainer does,
    each with a copy of the model (DistributedDataParallel), and does the update of one process with
    the examples of all.  Trainer's FSDP, of either version, and DeepSpeed are refused.

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
        examples: how many examples each loss of this micro-batch is the mean of, as for
            :meth:`.BalancedOptimizer.backward`; ``compute_loss`` may set it where batches of
            several processes are not alike.  None: as many on all.

    Raises:
        ValueError: settings of the balancing that do not go together or with ``optimizers``; a
            process with several devices, DeepSpeed, FSDP or other sharding; an optimizer that steps
            in the backward pass.  In training: ``compute_loss`` gave a single loss, or one that is
            not a scalar.
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
        if isinstance(task_gradients, int):
            on_device: Any = self.model
            task_gradients = TaskGradients(on_device, task_gradients)
            self._given["task_gradients"] = task_gradients
        self.task_gradients = task_gradients
        self.examples: Examples | None = None
        self._counts_items = False  # of all processes, which this micro-batch's losses are over
        self._losses: dict[str, Loss] = {}  # of this micro-batch
        self._leaves: dict[str, Tensor] = {}  # the same, cut off from their graphs
        self._logged = _StepAverages()
        self._evaluated: list[tuple[tuple[str, ...], Tensor]] = []

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
        for what in self._shards():
            raise ValueError(
                f"{type(self).__name__} trains one copy of the model on one device of each process,"
                f" not with {what}; start a process for each device with torchrun or accelerate "
                "launch, or choose one with CUDA_VISIBLE_DEVICES"
            )
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"optim: {optim} steps within the backward pass, before the tasks' gradients can "
                "be balanced; take one that does not, such as adamw_torch"
            )
        if "task_gradients" in self._given and self.model_init is not None:
            raise ValueError("task_gradients belong to one model; give model, not model_init")

    def _shards(self) -> Iterator[str]:
        """Yield what would train a model in another way than a copy in each process."""
        known = (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED, ParallelMode.DISTRIBUTED)
        if self.is_deepspeed_enabled:
            yield "DeepSpeed"
        if self.is_fsdp_enabled:
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            version = getattr(plugin, "fsdp_version", 1)
            # Trainer's FSDP2 needs a GPU, so that no test shows it.
            yield f"FSDP{version} (a loop of your own may use torch's fully_shard)"
        if self.args.n_gpu > 1:
            yield f"{self.args.n_gpu} GPUs in DataParallel"
        if self.args.parallel_mode not in known:
            yield str(self.args.parallel_mode)
        if getattr(self.args, "parallelism_config", None) is not None:
            yield "a parallelism_config"
        if getattr(self, "is_distributed_loading_by_transformers", False):
            yield "a model that was sharded as it was loaded"

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
        self.examples, self._counts_items = None, False
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
        optimizer.backward(losses, examples=self._examples_of(losses, optimizer))
        return total

    def _examples_of(
        self, losses: Mapping[str, Loss], optimizer: BalancedOptimizer
    ) -> Examples | None:
        """Return the examples that this process' losses are counted by."""
        if self._counts_items and self.examples is None:
            # Each is a share of the sum over all processes, one without a loss has the share 0.
            return dict.fromkeys(optimizer.tasks or losses, 1)
        return self.examples

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
        if not self._leaves and self.args.world_size == 1:
            raise ValueError("compute_loss: no task has a loss, but each batch needs one at least")
        # Without any loss, where other processes have some, there is no graph either.
        zero = torch.zeros((), device=self.args.device, requires_grad=not self._leaves)
        return sum(self._leaves.values(), zero)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the losses as Trainer does.

        Args:
            model: as for Trainer.
            inputs: as for Trainer.
            return_outputs: as for Trainer.
            num_items_in_batch: as for Trainer.

        Returns:
            A loss for each task; with ``return_outputs`` the outputs, too.
        """
        # Where losses are divided by the items of all processes, Trainer multiplies by the number
        # of processes, which would fail with a mapping and repeat a list.
        wanted, asked = self.args.average_tokens_across_devices, _Refusal()
        self.args.average_tokens_across_devices = asked  # type: ignore[assignment]
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.args.average_tokens_across_devices = wanted
        takes_items = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not (wanted and asked.was_asked and takes_items and num_items_in_batch is not None):
            return result
        self._counts_items = True
        losses, *outputs = result if return_outputs else (result,)
        losses = _multiplied(losses, self.accelerator.num_processes)
        return (losses, *outputs) if return_outputs else losses

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
        """Log, with each task's loss beside the sum; all processes call it with a ``loss``.

        Args:
            logs: as for Trainer.
            start_time: as for Trainer.
        """
        if "loss" in logs:
            optimizer = _balanced(self.optimizer)
            tasks = () if optimizer is None else optimizer.tasks or ()
            averages = self._logged.take(tasks, self._sum_over_processes)
            logs = logs | {f"loss_{task}": value for task, value in averages.items()}
        super().log(logs, start_time)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        summed: Tensor = self.accelerator.reduce(values.to(self.args.device), "sum")
        return summed

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
        optimizer = _balanced(self.optimizer)
        tasks = (self._tasks if optimizer is None else optimizer.tasks) or ()
        names = (*tasks, *(task for task in scalars if task not in tasks))
        if names:
            # One row, of losses and of which there are, for each example that Trainer counts.
            absent = torch.zeros((), device=self.args.device)
            row = [scalars.get(name, absent) for name in names]
            row += [torch.full_like(absent, name in scalars) for name in names]
            rows = torch.stack(_in_one_dtype(row)).repeat(self.args.eval_batch_size, 1)
            self._evaluated.append((names, self.gather_function(rows)))
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
        self._evaluated = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = output.metrics
        assert metrics is not None  # Trainer's has some
        for task, parts in _by_task(self._evaluated).items():
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

    def take(
        self, tasks: Sequence[str], sum_over_processes: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return the averages over the steps of all processes, and begin anew.

        Args:
            tasks: all that any process may have, in one order on all.
            sum_over_processes: of a tensor on the CPU.
        """
        sums = [self._sums[task].item() if task in self._sums else 0.0 for task in tasks]
        steps = [len(self._steps.get(task, ())) for task in tasks]
        self._sums, self._steps = {}, {}
        totals = sum_over_processes(torch.tensor([sums, steps], dtype=torch.float64)).tolist()
        return {
            task: total / count
            for task, total, count in zip(tasks, *totals, strict=True)
            if count > 0
        }


class _Refusal:
    """Says no, and notes that it was asked."""

    was_asked = False

    def __bool__(self) -> bool:
        self.was_asked = True
        return False


def _multiplied(losses: Any, factor: int) -> Any:
    """Return each loss times a factor; what is no loss stays."""
    if isinstance(losses, Mapping):
        return {task: _multiplied(loss, factor) for task, loss in losses.items()}
    if isinstance(losses, list | tuple):
        return [_multiplied(loss, factor) for loss in losses]
    return losses * factor if isinstance(losses, Tensor) else losses


def _in_one_dtype(scalars: Sequence[Tensor]) -> list[Tensor]:
    """Return them in float64 if one is, else in float32."""
    is_double = any(scalar.dtype == torch.float64 for scalar in scalars)
    return [scalar.to(torch.float64 if is_double else torch.float32) for scalar in scalars]


def _by_task(evaluated: Sequence[tuple[tuple[str, ...], Tensor]]) -> dict[str, list[Tensor]]:
    """Return the losses of each task out of batches' names and rows."""
    found: dict[str, list[Tensor]] = {}
    for names, rows in evaluated:
        losses, are_there = rows.split(len(names), 1)
        for name, loss, is_there in zip(names, losses.T, are_there.T, strict=True):
            if is_there.any():
                found.setdefault(name, []).append(loss[is_there > 0])
    return found


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
