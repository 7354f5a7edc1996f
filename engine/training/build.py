"""Build a trainer from a recipe: data, model, flat parameters, optimizer, step."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch

from ..checkpoints.async_writer import AsyncWriter
from ..config.recipe import Recipe, torch_arguments_of
from ..data.masked_text import MaskedText
from ..data.rank_examples import RankExamples
from ..data.sampler import RankSampler, Sampler, TaskSampler, TokenSampler, stratified_subset
from ..data.split import TokenizedSplit
from ..data.streamed import StreamedExamples, StreamSampler
from ..data.task_batch import Examples
from ..data.task_schedule import TaskSchedule
from ..distributed.gradient_sync import build_gradient_sync
from ..distributed.rank_check import RankCheck
from ..distributed.ranks import Ranks
from ..gradients.balancing import TORCHJD, Balancer, TrainedTasks, build_method
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import ParamGroups
from ..metrics.loggers import check_loggers
from ..models.heads import Head, head_class
from ..models.multitask import MultitaskModel
from ..optim.apex import CLASSES as APEX
from ..optim.build import build_optimizer
from ..optim.loss_scale import LossScale
from ..optim.lr_factors import lr_factors
from ..optim.lr_schedule import Schedule
from ..optim.torch_optimizer import is_torch
from ..optim.weight_average import WeightAverage
from ..runs.rank_files import dealt_names
from ..runs.run import Run
from ..runtime.execution import COMPILED, RECORDED, Execution
from ..runtime.precision import pick_dtype, set_matmul_precision
from ..utils.arrays import Indices
from ..utils.errors import InputError
from .batch_sizes import check_batches_fit, check_division
from .precompute import precompute_hidden_states
from .step import MultitaskStep
from .trainer import Trainer, check_range

_NOT_KNOWN = "the shapes of a stream's later batches are not known"

NOTHING_DEALT: Mapping[str, RankExamples] = MappingProxyType({})
"""The examples that are dealt to ranks where none are."""


def build_trainer(
    run: Run,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    phase: int = 0,
    side_stream: bool = True,
    dealt: Mapping[str, RankExamples] = NOTHING_DEALT,
) -> Trainer:
    """Build the trainer of one phase of the recipe: read the data, build model, optimizer and step.

    ``side_stream`` is that of :class:`~engine.runtime.execution.Execution`, for benchmarks;
    ``dealt`` has the examples of the tasks whose files are dealt to ranks
    (:func:`~engine.training.rank_sets.read_dealt`).

    Raises:
        InputError: data or weights cannot be used.
    """
    recipe, ranks = list(run.recipe.in_phases.values())[phase], ranks or Ranks()
    check_loggers(recipe.loggers if ranks.is_main else ())
    sharded = ranks.size > 1 and recipe.distribute == "sharded"
    if sharded and recipe.optimizer != "adamw":
        raise InputError(
            f"optimizer = {recipe.optimizer}: needs whole tensors; set distribute=replicated"
        )
    assert dealt.keys() >= {*dealt_names(recipe, ranks.size)}, "read_dealt comes first"
    train_sets = [
        dealt[name] if name in dealt else _examples(run, recipe, name, device, ranks)
        for name in recipe.train
    ]
    subsets = [_subset(examples, recipe) for examples in train_sets]
    sizes = tuple(
        len(examples) if subset is None else len(subset)
        for examples, subset in zip(train_sets, subsets, strict=True)
    )
    batch_sizes = recipe.batch_sizes(sizes)
    samplers = _samplers(recipe, train_sets, batch_sizes, subsets, ranks)
    task_schedule = TaskSchedule(
        recipe.task_schedule,
        sizes,
        [sampler.batches for sampler in samplers],
        recipe.epochs,
        recipe.seed,
        recipe.sampling_alpha,
    )
    check_division(recipe, samplers, task_schedule.tasks_a_step, ranks.size)
    take_turns = task_schedule.tasks_a_step < len(recipe.train)
    tasks = TrainedTasks(recipe.train, sizes)
    balance = "sum" if has_one_gradient(recipe) else recipe.balance
    method = build_method(balance, tasks, recipe.balancing)
    total_steps = min(task_schedule.total_steps, recipe.max_steps or sys.maxsize)
    model = run.model_to_train().train()
    for later in list(run.recipe.in_phases)[phase:]:
        _check_trainable(run.recipe, later, model)
    for examples, subset in zip(train_sets, subsets, strict=True):
        _weigh_classes(model, examples, subset)
    check_batches_fit(
        recipe,
        samplers,
        task_schedule.tasks_a_step,
        width=run.config.hidden_size,
        device=device,
        ranks=ranks.size,
    )
    model.encoder.checkpoint_layers = recipe.checkpoint_layers
    set_matmul_precision(recipe.precision, device)
    dtype = pick_dtype(recipe.precision, device)
    parameters = FlatParameters(
        model,
        recipe.train,
        device=device,
        compute_dtype=dtype,
        freeze_encoder=recipe.freeze_encoder,
        take_turns=take_turns,
        shard=ranks.shard if sharded else (0, 1),
    )
    check_range(parameters)
    sync = build_gradient_sync(recipe.distribute, ranks.size, model, parameters)
    dev_sets = {task: run.split(task, "dev") for task in recipe.tasks if recipe.scored}
    if not runs_encoder(recipe):
        train_sets = [_frozen(model, examples) for examples in train_sets]
        dev_sets = {
            task: precompute_hidden_states(model, split) for task, split in dev_sets.items()
        }
    optimizer = build_optimizer(
        recipe.optimizer,
        parameters,
        lr_factors(
            model, lr=recipe.lr, head_lr=recipe.head_lr, layer_lr_decay=recipe.layer_lr_decay
        ),
        torch_arguments_of(recipe),
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    groups = ParamGroups(
        parameters, recipe.train, "model" if take_turns else recipe.balance_granularity
    )
    watch = recipe.log_layer_cosines_every > 0 and not take_turns
    step = MultitaskStep(
        model,
        recipe.train,
        parameters,
        optimizer,
        groups,
        Balancer(method, groups.sole_tasks, device),
        watched=ParamGroups(parameters, recipe.train, "layer") if watch else None,
        loss_weights=[recipe.loss_weight(name) for name in recipe.train],
        loss_scale=LossScale(device) if dtype == torch.float16 else None,
        clip_norm=recipe.clip_norm or None,
        seed=recipe.seed,
        average=WeightAverage(parameters.master, recipe.ema_decay) if recipe.ema_decay else None,
        execution=Execution(
            execution_kind(recipe, device, ranks),
            device,
            recipe.max_graphs,
            ranks.agree,
            side_stream,
        ),
        sync=sync,
    )
    return Trainer(
        run=run,
        phase=phase,
        recipe=recipe,
        device=device,
        train_sets=train_sets,
        dev_sets=dev_sets,
        samplers=samplers,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        step=step,
        sync=sync,
        ranks=ranks,
        rank_check=RankCheck(ranks, recipe.check_ranks_every, step.shared_state),
        checkpoint_writer=AsyncWriter(run.checkpoints, recipe.keep_checkpoints, ranks),
        lr_schedule=Schedule(
            peak=recipe.lr,
            kind=recipe.schedule,
            power=recipe.schedule_power,
            warmup_steps=round(recipe.warmup * total_steps),
            total_steps=total_steps,
        ),
        task_schedule=task_schedule,
        total_steps=total_steps,
    )


def _examples(run: Run, recipe: Recipe, name: str, device: torch.device, ranks: Ranks) -> Examples:
    """Return the training examples of a task or an objective.

    Raises:
        InputError: they cannot be read, or tagged words are streamed on several ranks.
    """
    if name in run.recipe.objectives:
        return run.objective(name)
    if name in recipe.streamed:
        if ranks.size > 1 and run.recipe.formats[name].labels == "words":
            raise InputError(
                f"tasks.{name}.source.streaming: ranks would have to know how many words each "
                "other's batches have; train it on one rank, or without streaming"
            )
        examples = run.stream(name, ranks.shard)
        if device.type == "cuda" and recipe.execution == "auto":
            examples.notes.append(f"steps run eagerly, since {_NOT_KNOWN}")
        return examples
    return labelled(run, name, run.split(name, "train"))


def labelled(run: Run, name: str, split: TokenizedSplit) -> TokenizedSplit:
    """Return the training split of a task with the labels that the task is trained on."""
    return replace(split, all_pieces=run.recipe.tasks[name].tag_pieces == "all")


def _samplers(
    recipe: Recipe,
    train_sets: Sequence[Examples],
    batch_sizes: Sequence[int],
    subsets: Sequence[Indices | None],
    ranks: Ranks,
) -> list[Sampler]:
    """Return what draws the batches of each task or objective.

    An epoch is the largest set that has an end; of streams alone, the steps of the phase.
    """
    found = {
        examples.task: _sampler(recipe, examples, batch_size, subset)
        for examples, batch_size, subset in zip(train_sets, batch_sizes, subsets, strict=True)
        if not isinstance(examples, StreamedExamples)
    }
    turns = 1 if recipe.task_schedule == "together" else len(recipe.train)
    alone = -(-recipe.max_steps // turns)
    batches = max((sampler.batches for sampler in found.values()), default=alone)
    return [
        found.get(name) or StreamSampler(name, batch_size, batches, ranks.size)
        for name, batch_size in zip(recipe.train, batch_sizes, strict=True)
    ]


def _sampler(
    recipe: Recipe, examples: Examples, batch_size: int, subset: Indices | None
) -> Sampler:
    """Return what draws the batches of a task or an objective.

    Raises:
        InputError: batches of so many tokens do not hold the longest sequence, or batches have no
            example for each of the ranks that have their own.
    """
    if isinstance(examples, RankExamples):
        if batch_size < len(examples.sizes):
            is_task = examples.task in recipe.tasks
            table = f"tasks.{examples.task}.source" if is_task else f"objectives.{examples.task}"
            raise InputError(
                f"{table}.split_by_rank: a batch of {batch_size} examples has "
                f"none for some of {len(examples.sizes)} ranks; raise batch_size, or leave it out"
            )
        return RankSampler(examples.task, examples.sizes, batch_size, recipe.seed)
    objective = recipe.objectives.get(examples.task)
    if objective is None or not objective.tokens_per_batch:
        return TaskSampler(examples.task, len(examples), batch_size, recipe.seed, subset)
    assert isinstance(examples, MaskedText)
    longest = int(examples.sizes.max(initial=0))
    if objective.tokens_per_batch < longest:
        raise InputError(
            f"objectives.{examples.task}.tokens_per_batch = {objective.tokens_per_batch}: a "
            f"sequence has {longest} tokens; raise it, or lower max_length"
        )
    return TokenSampler(examples.task, examples.sizes, objective.tokens_per_batch, recipe.seed)


def _check_trainable(recipe: Recipe, phase: str, model: MultitaskModel) -> None:
    """Refuse a phase with nothing to train, before earlier phases are trained for nothing.

    A task without trained parameters has a row of zeros beside other tasks, and no gradient at all
    in a step of its own.

    Raises:
        InputError: the message names the tasks, and the phase if there are several.
    """
    settings = recipe.in_phases[phase]
    specs = model.parameter_specs(settings.train, freeze_encoder=settings.freeze_encoder)
    untrainable = [task for task in settings.train if not any(task in spec.tasks for spec in specs)]
    is_alone = settings.task_schedule != "together"
    if len(untrainable) == len(settings.train) or (is_alone and untrainable):
        where = f"phases.{phase}: " if phase else ""
        raise InputError(
            f"{where}nothing is left to train by {', '.join(untrainable)}, since freeze_encoder is "
            "true; take it out of train, or set freeze_encoder=false"
        )


def runs_encoder(recipe: Recipe) -> bool:
    """Return whether steps run the encoder: it is trained, or has adapters or objectives.

    Otherwise its hidden states are computed once, without dropout.
    """
    objectives = any(name in recipe.objectives for name in recipe.train)
    return objectives or not recipe.freeze_encoder or recipe.adapter_width > 0


def _frozen(model: MultitaskModel, examples: Examples) -> Examples:
    """Return examples with precomputed hidden states."""
    if isinstance(examples, RankExamples):
        assert isinstance(examples.own, TokenizedSplit)
        return examples.precomputed(precompute_hidden_states(model, examples.own))
    assert isinstance(examples, TokenizedSplit)
    return precompute_hidden_states(model, examples)


def _subset(examples: Examples, recipe: Recipe) -> Indices | None:
    """Return the examples of a task that the recipe trains on; None for all."""
    if not isinstance(examples, TokenizedSplit):
        return None
    first, limit = recipe.tasks[examples.task].first_n, recipe.max_train_examples
    if min(first or len(examples), limit or len(examples)) >= len(examples):
        return None
    labels = examples.strata[: first or None]
    return stratified_subset(labels, limit or len(labels), examples.task, recipe.seed)


def _weigh_classes(model: MultitaskModel, examples: Examples, subset: Indices | None) -> None:
    """Let a head weigh classes by their shares of the examples that are trained on."""
    loss = model.head(examples.task).class_loss
    if loss is not None and isinstance(examples, RankExamples):
        assert examples.class_counts is not None, "counted where classes are weighed"
        loss.weigh(examples.class_counts)
    if loss is not None and isinstance(examples, TokenizedSplit):
        chosen = np.arange(len(examples)) if subset is None else subset
        loss.weigh(examples.label_counts(chosen, int(loss.task.high) + 1))


def check_balance(recipe: Recipe) -> None:
    """Check that each phase's balancing method fits its tasks, before any data are read.

    Raises:
        InputError: it does not, or TorchJD has no such method.
    """
    for phase in recipe.in_phases.values():
        if not has_one_gradient(phase):
            tasks = TrainedTasks(phase.train, (1,) * len(phase.train))
            build_method(phase.balance, tasks, phase.balancing)


def has_one_gradient(recipe: Recipe) -> bool:
    """Return whether a step has the gradient of one task alone, so that nothing is balanced."""
    return recipe.task_schedule != "together" or len(recipe.train) == 1


def _heads(recipe: Recipe) -> dict[str, type[Head]]:
    """Return the kinds of heads of the tasks that are trained."""
    forms = recipe.formats
    return {name: head_class(forms[name].kind) for name in recipe.train if name in forms}


def _varies(recipe: Recipe) -> bool:
    """Return whether a head's scores differ in number between batches."""
    return any(head.varies_in_size for head in _heads(recipe).values())


def _compares(recipe: Recipe) -> bool:
    """Return whether a loss compares the examples of a step."""
    return any(
        head.compares_examples(recipe.tasks[name].loss) for name, head in _heads(recipe).items()
    )


def execution_kind(recipe: Recipe, device: torch.device, ranks: Ranks) -> str:
    """Return how steps run; ``auto`` takes CUDA graphs where they can be used.

    Steps of several ranks send each layer's gradients by a hook within the backward pass, which
    torch.compile makes one function of; a recording of eager code holds the hooks' work.  Graphs of
    several ranks need batches of one shape on all of them, and the masked tokens of an objective
    differ in number.  Steps in which other libraries wait for the device cannot be recorded.

    Returns:
        One of ``EXECUTIONS`` except ``auto``.

    Raises:
        InputError: the recipe asks for a way that this run cannot use.
    """
    refused: dict[str, str] = {}
    if recipe.streamed:
        refused = dict.fromkeys(RECORDED, _NOT_KNOWN)
    elif is_torch(recipe.optimizer):
        refused = dict.fromkeys(RECORDED, "torch's optimizers wait for the device")
    elif recipe.optimizer in APEX or recipe.balance.startswith(TORCHJD):
        waits = "apex's optimizers and TorchJD's weightings wait for the device"
        refused = dict.fromkeys(RECORDED, waits)
    elif ranks.size > 1 and any(name in recipe.objectives for name in recipe.train):
        refused = dict.fromkeys(RECORDED, "batches of objectives differ in shape between ranks")
    elif ranks.size > 1 and _compares(recipe):
        refused = dict.fromkeys(RECORDED, "ranks gather the texts that retrieval compares")
    elif (ranks.size > 1 or recipe.micro_batches > 1) and _varies(recipe):
        refused = dict.fromkeys(RECORDED, "ranks and micro-batches have other numbers of words")
    if ranks.size > 1:
        refused |= dict.fromkeys(COMPILED, "several ranks do not compile their steps")
    kind = recipe.execution
    if kind in refused:
        raise InputError(f"execution = {kind}: {refused[kind]}; set execution=eager")
    if kind == "auto":
        return "graphs" if device.type == "cuda" and "graphs" not in refused else "eager"
    return kind
