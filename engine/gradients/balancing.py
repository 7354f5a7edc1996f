"""Compute the weights of the task gradients from their Gram matrices.

Every method is a function of ``G = J J^T [K, K]`` (kernels/balancing); the update is always
``sum_k c_k g_k``.  This module gives the methods their other inputs: names and sizes of the tasks,
losses, the random order and seed of the step, and the state that the method returned on the step
before.  The matrices of all parameter groups are computed with at once, as ``[G, K, K]``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from .._kernels import kernels
from ..utils.errors import InputError
from ..utils.field_types import Count, NonNegativeReal, Positive, PositiveReal, Real, Settings

TORCHJD = "torchjd."
"""``torchjd.X`` names a weighting in ``torchjd.aggregation``."""


class BalanceSettings(Settings):
    """Settings of the methods that have any; each method reads its own."""

    fixed: dict[str, Real] = {}
    """fixed: the weight of each task; 1 for those left out."""
    main: str = ""
    """main_aux: the main task; empty: the first."""
    aux_weight: PositiveReal = 0.3
    """main_aux: lambda, by which the sum of the auxiliary gradients is multiplied."""
    gradvac_beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """gradvac: weight of the newest cosine in the running mean."""
    cagrad_c: NonNegativeReal = 0.5
    """cagrad: how far from the mean gradient the update may lie, relative to its length; from 1 on
    no task is worsened."""
    preferences: dict[str, Real] = {}
    """upgrad, dual_projection, config, aligned_mtl: how much each task counts; 1 for those left
    out."""
    aligned_mtl_scale_mode: Literal["min", "median", "rmse"] = "min"
    """aligned_mtl: which singular value of the gradients all are made equal to."""
    nash_mtl_max_norm: NonNegativeReal | None = None
    """nash_mtl: the combined gradient is limited to this norm, 0: no limit; it then has the length
    ``sqrt(K)`` before, as in the paper.  Left out: weights that do not depend on the gradients'
    scale."""
    fairgrad_alpha: NonNegativeReal = 1.0
    """fairgrad: 0 is the mean, 1 proportional fairness; larger ones care more for the worst-off
    task."""
    gradnorm_alpha: NonNegativeReal = 1.5
    """gradnorm: strength of the pull towards equal training rates."""
    gradnorm_lr: PositiveReal = 0.025
    """gradnorm: step of the weights."""
    uw_lr: PositiveReal = 0.025
    """uw: step of the logarithms of the variances."""
    dwa_temperature: PositiveReal = 2.0
    """dwa: the larger, the more alike the weights."""
    dwa_window: Positive = 100
    """dwa: steps over which losses are averaged; the weights are 1 until there are two averages."""
    imtl_lr: PositiveReal = 0.025
    """imtl, imtl_l: step of the logarithms of the losses' factors."""
    stch_mu: PositiveReal = 1.0
    """stch: smoothness; the smaller, the more the worst-off task alone counts."""
    stch_warmup: Positive = 100
    """stch: first steps, over whose mean losses later ones are measured."""
    famo_lr: PositiveReal = 0.025
    """famo: step of the logits."""
    famo_gamma: NonNegativeReal = 0.001
    """famo: decay of the logits."""
    krum_byzantine: Count = 0
    """krum: how many gradients may be arbitrary."""
    krum_selected: Positive = 1
    """krum: how many gradients are averaged."""


class TrainedTasks(NamedTuple):
    """The K trained tasks: their names and how many examples each has."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]


class BalancerInput(NamedTuple):
    """Inputs of a method.

    Attributes:
        gram: ``[K, K]`` fp32, or ``[G, K, K]`` of several groups.
        order: ``[K, K]`` int64, the order of projections of this step.
        losses: ``[K]`` fp32, whose gradients are balanced: times the tasks' weights.
        state: that the method returned on the step before; of several groups, ``[G, ...]``.
        seed: 0-dim int64, another one in every step, the same on all ranks.
    """

    gram: Tensor
    order: Tensor
    losses: Tensor
    state: Mapping[str, Tensor]
    seed: Tensor


class BalancerOutput(NamedTuple):
    """The weights ``[K]`` or ``[G, K]``, and the state for the next step."""

    weights: Tensor
    state: Mapping[str, Tensor] = MappingProxyType({})


class Method(NamedTuple):
    """A balancing method, and its initial state: tensors ``[..., K]`` or ``[1]`` by name."""

    decide: Callable[[BalancerInput], BalancerOutput]
    initial_state: Mapping[str, Tensor] = MappingProxyType({})


Builder = Callable[[TrainedTasks, BalanceSettings], Method]


def _of_gram(weigh: Callable[[Tensor], Tensor]) -> Method:
    return Method(lambda inputs: BalancerOutput(weigh(inputs.gram)))


def _gram_method(weigh: Callable[..., Tensor], **arguments: str) -> Builder:
    """Build a method of the Gram matrix alone; ``arguments`` names the settings that it takes."""

    def build(_tasks: TrainedTasks, settings: BalanceSettings) -> Method:
        return _of_gram(partial(weigh, **_taken(settings, arguments)))

    return build


def _with_preferences(
    weigh: Callable[..., Tensor], *, mean: bool = True, **arguments: str
) -> Builder:
    """Build a method that takes preferences; equal ones are ``1 / K`` each if ``mean``, or 1."""

    def build(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
        own = partial(weigh, **_taken(settings, arguments))
        if not settings.preferences:
            return _of_gram(own)
        for name in settings.preferences:
            _index(tasks, name, "preferences")
        share = 1 / len(tasks.names) if mean else 1.0
        given = [share * settings.preferences.get(name, 1.0) for name in tasks.names]
        return _of_gram(lambda gram: own(gram, _constant(gram.double(), given)))

    return build


def _taken(settings: BalanceSettings, arguments: Mapping[str, str]) -> dict[str, Any]:
    return {argument: getattr(settings, field) for argument, field in arguments.items()}


def _fixed(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    for name in settings.fixed:
        _index(tasks, name, "fixed")
    weights = [settings.fixed.get(name, 1.0) for name in tasks.names]
    return _of_gram(lambda gram: _constant(gram, weights).expand(gram.shape[:-1]))


def _proportional(tasks: TrainedTasks, _settings: BalanceSettings) -> Method:
    return _of_gram(lambda gram: kernels.balancing.proportional(gram, _constant(gram, tasks.sizes)))


def _constant(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """Put constants on the device without a copy from the host, which a graph could not replay."""
    return torch.stack([gram.new_full((), weight) for weight in weights])


def _pcgrad(_tasks: TrainedTasks, _settings: BalanceSettings) -> Method:
    """PCGrad, summed as in Algorithm 1 of Yu et al. (2020)."""
    return Method(
        lambda inputs: BalancerOutput(
            kernels.balancing.pcgrad(inputs.gram, inputs.order, reduction="sum")
        )
    )


def _main_aux(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    main = _index(tasks, settings.main, "main") if settings.main else 0
    return _of_gram(lambda gram: kernels.balancing.main_aux(gram, main, settings.aux_weight))


def _gradvac(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    def decide(inputs: BalancerInput) -> BalancerOutput:
        step = kernels.balancing.gradvac(
            inputs.gram, inputs.order, inputs.state["targets"], settings.gradvac_beta
        )
        return BalancerOutput(step.weights, {"targets": step.targets})

    count = len(tasks.names)
    return Method(decide, {"targets": torch.zeros(count, count)})


def _gradnorm(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    def decide(inputs: BalancerInput) -> BalancerOutput:
        first = inputs.state["first_losses"]
        first = torch.where(first == 0, inputs.losses, first)
        weights = kernels.balancing.gradnorm(
            inputs.gram,
            inputs.state["weights"],
            inputs.losses / first.clamp(min=torch.finfo(first.dtype).tiny),
            settings.gradnorm_alpha,
            settings.gradnorm_lr,
        )
        return BalancerOutput(weights, {"weights": weights, "first_losses": first})

    count = len(tasks.names)
    return Method(decide, {"weights": torch.ones(count), "first_losses": torch.zeros(count)})


def _of_losses(weigh: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    """Build a method of the Gram matrix and the losses."""
    method = Method(lambda inputs: BalancerOutput(weigh(inputs.gram, inputs.losses)))
    return lambda _tasks, _settings: method


def _with_state(method: Callable[..., Any], state: Any, **arguments: str) -> Builder:
    """Build a method of losses with a state of the kind ``state``, one of kernels' states."""

    def build(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
        own = partial(method, **_taken(settings, arguments))

        def decide(inputs: BalancerInput) -> BalancerOutput:
            step = own(inputs.gram, inputs.losses, state(**inputs.state))
            return BalancerOutput(step.weights, step.state._asdict())

        first = kernels.balancing.states.initial_state(state, len(tasks.names))
        return Method(decide, first._asdict())

    return build


def _rlw(_tasks: TrainedTasks, _settings: BalanceSettings) -> Method:
    return Method(lambda inputs: BalancerOutput(kernels.balancing.rlw(inputs.gram, inputs.seed)))


def _krum(tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    byzantine, selected = settings.krum_byzantine, settings.krum_selected
    if len(tasks.names) < byzantine + 3 or selected > len(tasks.names):
        raise InputError(
            f"balance krum: {len(tasks.names)} tasks are too few for krum_byzantine = {byzantine} "
            f"and krum_selected = {selected}; it needs krum_byzantine + 3 of them"
        )
    return _of_gram(lambda gram: kernels.balancing.krum(gram, byzantine, selected))


def _index(tasks: TrainedTasks, name: str, setting: str) -> int:
    if name not in tasks.names:
        known = ", ".join(tasks.names)
        raise InputError(f"balancing.{setting}: {name!r} is no trained task; those are {known}")
    return tasks.names.index(name)


METHODS: Mapping[str, Builder] = MappingProxyType(
    {
        "sum": _gram_method(kernels.balancing.sum),
        "mean": _gram_method(kernels.balancing.mean),
        "fixed": _fixed,
        "proportional": _proportional,
        "pcgrad": _pcgrad,
        "main_aux": _main_aux,
        "gradvac": _gradvac,
        "cagrad": _gram_method(kernels.balancing.cagrad, c="cagrad_c"),
        "mgda": _gram_method(kernels.balancing.mgda),
        "imtl_g": _gram_method(kernels.balancing.imtl_g),
        "nash_mtl": _gram_method(kernels.balancing.nash_mtl, max_norm="nash_mtl_max_norm"),
        "aligned_mtl": _with_preferences(
            kernels.balancing.aligned_mtl, scale_mode="aligned_mtl_scale_mode"
        ),
        "upgrad": _with_preferences(kernels.balancing.upgrad),
        "dual_projection": _with_preferences(kernels.balancing.dual_projection),
        "config": _with_preferences(kernels.balancing.config, mean=False),
        "fairgrad": _gram_method(kernels.balancing.fairgrad, alpha="fairgrad_alpha"),
        "gradnorm": _gradnorm,
        "uw": _with_state(kernels.balancing.uw, kernels.balancing.states.Learned, lr="uw_lr"),
        "dwa": _with_state(
            kernels.balancing.dwa,
            kernels.balancing.states.WindowAverages,
            temperature="dwa_temperature",
            window="dwa_window",
        ),
        "rlw": _rlw,
        "gls": _of_losses(kernels.balancing.gls),
        "imtl_l": _with_state(
            kernels.balancing.imtl_l, kernels.balancing.states.Learned, lr="imtl_lr"
        ),
        "imtl": _with_state(kernels.balancing.imtl, kernels.balancing.states.Learned, lr="imtl_lr"),
        "stch": _with_state(
            kernels.balancing.stch,
            kernels.balancing.states.Nadir,
            mu="stch_mu",
            warmup="stch_warmup",
        ),
        "famo": _with_state(
            kernels.balancing.famo,
            kernels.balancing.states.Famo,
            lr="famo_lr",
            gamma="famo_gamma",
        ),
        "db_mtl": _of_losses(kernels.balancing.db_mtl),
        "krum": _krum,
    }
)
"""By the name that a recipe's ``balance`` gives."""


def build_method(name: str, tasks: TrainedTasks, settings: BalanceSettings) -> Method:
    """Build the method that a recipe names.

    Args:
        name: a key of :data:`METHODS`, or ``torchjd.`` and the name of a TorchJD weighting that
            can be made without arguments and keeps no state between steps.
        tasks: the trained tasks.
        settings: of the methods.

    Raises:
        InputError: the method does not fit the tasks, or TorchJD has no such weighting, or the
            weighting cannot be used.
    """
    if name.startswith(TORCHJD):
        return _of_gram(partial(_of_each, _torchjd_weighting(name.removeprefix(TORCHJD))))
    return METHODS[name](tasks, settings)


def _of_each(weigh: Callable[[Tensor], Tensor], gram: Tensor) -> Tensor:
    """Call a weighting that takes one matrix on each of them."""
    return weigh(gram) if gram.dim() == 2 else torch.stack([weigh(one) for one in gram])


def _torchjd_weighting(name: str) -> Callable[[Tensor], Tensor]:
    try:
        aggregation = import_module("torchjd.aggregation")
    except ImportError:
        raise InputError(
            f"balance {TORCHJD}{name}: TorchJD is not installed (pip install torchjd)"
        ) from None
    made = {
        other: _made(value)
        for other, value in vars(aggregation).items()
        if isinstance(value, type) and issubclass(value, aggregation.Weighting)
    }
    weighting = made.get(name, "TorchJD has no such weighting")
    if isinstance(weighting, str):
        usable = ", ".join(other for other, one in made.items() if not isinstance(one, str))
        raise InputError(f"balance {TORCHJD}{name}: {weighting}; take one of {usable}")
    return weighting


def _made(weighting: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor] | str:
    """Return a TorchJD weighting, or the reason why it cannot be used.

    A weighting with a state cannot: no checkpoint would hold the state, and all parameter groups
    would share it.  Some of them need the gradients themselves, too.
    """
    try:
        made = weighting()
    except (TypeError, ImportError) as error:
        return str(error)
    stateful = isinstance(made, import_module("torchjd").Stateful)
    return "it keeps a state between steps" if stateful else made


class Balancer:
    """A method applied to each parameter group separately, in one call for all of them.

    Args:
        method: computes the weights of a group.
        sole_tasks: for each of the G groups the only task that uses it; its gradient is taken as it
            is, with nothing to balance.  None where all tasks use the group, as the whole model.
        device: of the Gram matrices.

    Attributes:
        state: of the method, ``[G, ...]`` each; saved with a checkpoint.
    """

    def __init__(
        self, method: Method, sole_tasks: Sequence[int | None], device: torch.device
    ) -> None:
        self._method = method
        shared = [group for group, task in enumerate(sole_tasks) if task is None]
        self._shared = None if len(shared) == len(sole_tasks) else torch.tensor(shared).to(device)
        # Of each group the place among those that tasks share; 0 for the others.
        places = [shared.index(group) if group in shared else 0 for group in range(len(sole_tasks))]
        self._places = torch.tensor(places).to(device)
        own = [-1 if task is None else task for task in sole_tasks]
        self._sole_tasks = torch.tensor(own).to(device)
        self.state = {
            name: first.to(device).expand(len(sole_tasks), *first.shape).clone()
            for name, first in method.initial_state.items()
        }

    def __call__(self, grams: Tensor, order: Tensor, losses: Tensor, seed: Tensor) -> Tensor:
        """Return the weights ``[G, K]`` of Gram matrices ``[G, K, K]``.

        The state does not change if a weight, a loss or a gradient of any group is not finite: such
        a step is skipped.
        """
        if self._shared is None:
            weights, state = self._decide(grams, order, losses, seed, self.state)
            self._keep(state, weights, grams, losses)
            return weights
        tasks = torch.arange(grams.shape[-1], device=grams.device)
        alone = (tasks == self._sole_tasks[:, None]).to(grams.dtype)
        if len(self._shared) == 0:
            return alone
        present = {name: tensor[self._shared] for name, tensor in self.state.items()}
        of_shared, state = self._decide(grams[self._shared], order, losses, seed, present)
        state = {name: self._merged(new, self.state[name]) for name, new in state.items()}
        self._keep(state, of_shared, grams, losses)
        return self._merged(of_shared, alone)

    def _keep(
        self, state: Mapping[str, Tensor], weights: Tensor, grams: Tensor, losses: Tensor
    ) -> None:
        """Take the state of the next step, unless this one is skipped."""
        if not state:
            return
        diagonals = grams.diagonal(dim1=-2, dim2=-1)
        parts = [tensor.isfinite().all() for tensor in (weights, diagonals, losses)]
        finite = parts[0] & parts[1] & parts[2]
        for name, new in state.items():
            self.state[name].copy_(torch.where(finite, new, self.state[name]))

    def _merged(self, of_shared: Tensor, others: Tensor) -> Tensor:
        """Return values ``[G, ...]``: of groups that tasks share, and those of all the others."""
        is_shared = (self._sole_tasks < 0).view(-1, *[1] * (others.dim() - 1))
        return torch.where(is_shared, of_shared[self._places], others)

    def _decide(
        self,
        grams: Tensor,
        order: Tensor,
        losses: Tensor,
        seed: Tensor,
        state: Mapping[str, Tensor],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the weights ``[G, K]`` of groups that tasks share, and their state."""
        new: Mapping[str, Tensor]
        if len(grams) == 1:  # a matrix alone takes fewer copies than a batch of one
            of_one = {name: tensor[0] for name, tensor in state.items()}
            output = self._method.decide(BalancerInput(grams[0], order, losses, of_one, seed))
            weights, new = output.weights[None], {n: t[None] for n, t in output.state.items()}
        else:
            weights, new = self._method.decide(BalancerInput(grams, order, losses, state, seed))
        return weights.contiguous(), new
