"""Report each setting without effect in the run at hand, in one line as training begins.

Each field that a recipe or ``--set`` gives is looked up in the table below, which says for every
field of a recipe when it has an effect.  A field of a phase must have one in that phase, a field of
the whole recipe in any phase that has no other value for it.  An effect that depends on the data of
a later phase is assumed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..config.recipe import Recipe
from ..data.rows import shorten
from ..distributed.ranks import Ranks
from ..gradients.balancing import BalanceSettings
from ..optim.torch_optimizer import is_torch
from ..runs.data_paths import reads_data_folder
from ..runs.run import Run
from ..runtime.execution import RECORDED
from ..training.build import has_one_gradient, runs_encoder
from ..utils.field_types import Settings
from .cases import Case
from .given_fields import given_fields
from .method_trials import settings_read, sums_what_is_separate
from .phase_facts import PhaseFacts


class Effect(NamedTuple):
    """When a field has an effect.

    Attributes:
        holds: whether it has in a case.
        reason: why it has none elsewhere; ``{case}`` is that case.
        off: the value that asks for no effect, so that it gets what it asks for.
        also: what it needs besides.
    """

    holds: Callable[[Case], bool]
    reason: str
    off: object = None
    also: "Effect | None" = None

    def reason_against(self, case: Case) -> str:
        """Return why there is no effect in a case; empty where there is one."""
        if not self.holds(case):
            return self.reason.format(case=case)
        return self.also.reason_against(case) if self.also is not None else ""


def _of_data(holds: Callable[[Case], bool], reason: str, off: object = None) -> Effect:
    """Return an effect that depends on the data, and is assumed before they are read."""
    return Effect(lambda case: case.known is None or holds(case), reason, off)


def _cuts_objective(holds: Callable[[Case], bool], reason: str) -> Effect:
    """Return the effect of a cut of an objective's texts, in which there have to be more."""
    return Effect(_is_trained, "train does not name it", off=0, also=_of_data(holds, reason))


def _of_run_steps(off: int) -> Effect:
    """Return the effect of a number of steps, in which the run has to come that far."""
    return Effect(
        lambda case: case.run_steps is None or getattr(case.recipe, case.field) <= case.run_steps,
        "the run has {case.run_steps} steps",
        off,
    )


def _balances(case: Case) -> bool:
    return not has_one_gradient(case.recipe)


def _is_trained(case: Case) -> bool:
    return case.owner in case.recipe.train


def _trains_lora(case: Case) -> bool:
    return case.recipe.lora_rank > 0 and not case.recipe.freeze_encoder


def _trains_tasks(case: Case) -> bool:
    return case.recipe.scored


def _streams_alone(case: Case) -> bool:
    """Return whether all that is trained is streamed, so that an epoch is as long as is said."""
    return set(case.recipe.streamed) == set(case.recipe.train)


def _reads_loss(case: Case) -> bool:
    return _is_trained(case) or case.recipe.formats[case.owner].kind == "score"


def _differs(case: Case) -> bool:
    """Return whether a split has a field otherwise than its source."""
    own = case.source.of_split[case.split]
    return bool(getattr(own, case.field) != getattr(case.source, case.field))


def _differentiates_encoder(case: Case) -> bool:
    recipe = case.recipe
    return not recipe.freeze_encoder or (recipe.adapter_width > 0 and recipe.scored)


def _draws_weights(case: Case) -> bool:
    """Return whether weights are drawn that are as wide as the encoder's initial ones."""
    recipe = case.recipe
    heads = any(objective.kind != "simcse" for objective in recipe.objectives.values())
    return not recipe.init or recipe.adapter_width > 0 or heads


def _joins_texts(case: Case) -> bool:
    return case.objective.kind == "masked_lm" and case.objective.join > 1


def _falls(case: Case) -> bool:
    """Return whether the rate of the last step is lower than a constant one."""
    schedule, last = case.facts.schedule, case.facts.steps - 1
    return schedule(last) != replace(schedule, kind="constant")(last)


def _decides_epochs(case: Case) -> bool:
    """Return whether the epochs decide when training ends, or what is drawn."""
    recipe = case.recipe
    return not 0 < recipe.max_steps < case.facts.epoch_steps or recipe.task_schedule == "annealed"


def _sums(case: Case) -> bool:
    """Return whether the task gradients share no parameter, and the method then sums them."""
    recipe = case.recipe
    return case.facts.separate and sums_what_is_separate(
        recipe.balance, recipe.train, recipe.balancing
    )


def _has_shared(case: Case) -> bool:
    """Return whether balancing differs from the sum, as it does for parameters of several tasks."""
    return not (case.facts.separate if case.recipe.balance_granularity != "model" else _sums(case))


def _method_reads(case: Case) -> bool:
    recipe = case.recipe
    return _balances(case) and case.field in settings_read(
        recipe.balance, recipe.train, recipe.balancing
    )


def _first_steps(field: str, settings: BalanceSettings) -> int:
    """Return the steps in which a method of losses has no weights of its own yet."""
    if field.startswith("dwa_"):
        return 2 * settings.dwa_window  # of which it compares the means
    return settings.stch_warmup


def _outlasts_first_steps(case: Case) -> bool:
    """Return whether a setting, or the default in its place, leaves such steps behind."""
    given, steps = case.recipe.balancing, case.facts.steps
    default = BalanceSettings.model_fields[case.field].default
    without = given.model_copy(update={case.field: default})
    return any(steps > _first_steps(case.field, settings) for settings in (given, without))


def _is_within_epoch(case: Case) -> bool:
    """Return whether the dev sets are scored elsewhere than at the ends of epochs."""
    every, of_epoch = case.recipe.eval_every, case.facts.epoch_steps // case.recipe.epochs
    return every < case.facts.steps and every % of_epoch != 0


ALWAYS = Effect(lambda _case: True, "")

_DROPS_OUT = Effect(
    lambda case: runs_encoder(case.recipe),
    "the frozen encoder's states are computed once, without dropout",
    off=0,
)
_NOT_SHARED = "no two tasks train the same parameter, so it gives the sum"
_SHARED = _of_data(_has_shared, _NOT_SHARED)
_NOT_DWA = _of_data(
    lambda case: (
        case.recipe.balance != "dwa" or case.facts.steps > 2 * case.recipe.balancing.dwa_window
    ),
    "in its first two windows it gives the sum, and there are {case.facts.steps} steps",
)
_OF_METHOD = Effect(
    _method_reads, "balance = {case.recipe.balance} does not read it here", also=_SHARED
)
_OF_LATER_STEPS = _OF_METHOD._replace(
    also=_SHARED._replace(
        also=_of_data(
            _outlasts_first_steps,
            "the {case.facts.steps} steps are over before the method has weights of its own",
        )
    )
)
_SEVERAL_RANKS = Effect(lambda case: case.ranks.size > 1, "one process trains")
_OF_FILES = Effect(lambda case: bool(case.source.files), "a data set by name has no files")
_OF_DATASET = Effect(lambda case: bool(case.source.dataset), "files are read, no data set by name")

EFFECTS: Mapping[str, Effect] = MappingProxyType(
    {
        **dict.fromkeys(("description", "paper", "init", "train", "pooling"), ALWAYS),
        "data": Effect(
            lambda case: reads_data_folder(case.recipe), "no file of a task is looked for there"
        ),
        "tasks.NAME.head": ALWAYS,
        "tasks.NAME.metrics": ALWAYS,
        "tasks.NAME.decided_by": Effect(
            lambda case: len(case.recipe.tasks[case.owner].metrics) > 1,
            "{case.owner} has one metric",
            off="first",
        ),
        "tasks.NAME.score_weight": Effect(
            lambda case: len(case.recipe.tasks) > 1, "one task alone is scored", off=1
        ),
        "tasks.NAME.tag_pieces": Effect(_is_trained, "{case.owner} is not trained", off="first"),
        # Of other kinds of tasks a recipe refuses them.
        "tasks.NAME.temperature": Effect(_is_trained, "{case.owner} is not trained", off=0),
        "tasks.NAME.symmetric": Effect(_is_trained, "{case.owner} is not trained", off=False),
        "tasks.NAME.margin": Effect(_is_trained, "{case.owner} is not trained", off=0.5),
        "tasks.NAME.loss": Effect(_reads_loss, "{case.owner} is not trained", off="default"),
        "tasks.NAME.weight": Effect(_is_trained, "{case.owner} is not trained", off=1),
        "tasks.NAME.class_weights": Effect(
            _is_trained,
            "{case.owner} is not trained",
            off=(),
            also=_of_data(
                lambda case: case.owner not in case.facts.equal_classes,
                "all classes weigh the same",
            ),
        ),
        "tasks.NAME.label_smoothing": Effect(_is_trained, "{case.owner} is not trained", off=0),
        "tasks.NAME.focal_gamma": Effect(_is_trained, "{case.owner} is not trained", off=0),
        "tasks.NAME.threshold": Effect(
            _trains_tasks, "no task is trained, so nothing is scored", off="half"
        ),
        "tasks.NAME.batch_size": Effect(_is_trained, "{case.owner} is not trained", off=0),
        "tasks.NAME.first_n": Effect(
            _is_trained,
            "{case.owner} is not trained",
            off=0,
            also=_of_data(
                lambda case: case.recipe.tasks[case.owner].first_n < case.examples,
                "the training set has {case.examples} examples",
            ),
        ),
        **dict.fromkeys(
            (
                f"tasks.NAME.source.{name}"
                for name in (
                    *("kind", "text", "label", "id", "dataset", "label_separator", "scheme"),
                    # Of other kinds of tasks a source refuses them.
                    *("unanswerable", "window_overlap", "max_answer_tokens"),
                )
            ),
            ALWAYS,
        ),
        "tasks.NAME.source.classes": Effect(
            lambda case: not case.source.has_range, "a regression has no classes"
        ),
        "tasks.NAME.source.range": Effect(
            lambda case: case.source.has_range, "classes have no range"
        ),
        # Of files, and of a buffer without a stream, a source refuses them.
        "tasks.NAME.source.streaming": Effect(lambda _case: True, "", off=False),
        "tasks.NAME.source.shuffle_buffer": Effect(_is_trained, "{case.owner} is not trained"),
        "tasks.NAME.source.split_by_rank": Effect(
            _is_trained, "{case.owner} is not trained", off=False, also=_SEVERAL_RANKS
        ),
        "tasks.NAME.source.subset": _OF_DATASET,
        "tasks.NAME.source.splits": _OF_DATASET,
        "tasks.NAME.source.*": _OF_FILES,
        "tasks.NAME.source.of_split.NAME.*": Effect(_differs, "the source says the same"),
        "objectives.NAME": Effect(_is_trained, "train does not name it"),
        **dict.fromkeys(
            (
                f"objectives.NAME.{name}"
                for name in (
                    *("kind", "sentences_of", "files", "weight", "batch_size"),
                    # Of other kinds a recipe refuses them.
                    *("tokens_per_batch", "whole_words"),
                )
            ),
            ALWAYS,
        ),
        "objectives.NAME.max_per_source": _cuts_objective(
            lambda case: case.objective.max_per_source < case.texts.largest,
            "no task or file has more than {case.texts.largest}",
        ),
        "objectives.NAME.max_texts": _cuts_objective(
            lambda case: case.objective.max_texts < case.texts.texts,
            "{case.texts.texts} texts were found",
        ),
        "objectives.NAME.split_by_rank": Effect(
            _is_trained, "train does not name it", off=False, also=_SEVERAL_RANKS
        ),
        "objectives.NAME.divide": Effect(_is_trained, "train does not name it", off=False),
        "objectives.NAME.join": Effect(
            lambda case: case.objective.kind == "masked_lm",
            "kind = {case.objective.kind} joins no texts",
            off=1,
        ),
        "objectives.NAME.short": Effect(_joins_texts, "no texts are joined"),
        "objectives.NAME.mask_share": Effect(
            lambda case: case.objective.kind != "simcse", "kind = simcse masks nothing"
        ),
        "objectives.NAME.temperature": Effect(
            lambda case: case.objective.kind == "simcse",
            "kind = {case.objective.kind} compares no sentences",
        ),
        "dropout": Effect(_trains_tasks, "no task is trained", off=0),
        "adapter_width": Effect(_trains_tasks, "no task is trained", off=0),
        "freeze_encoder": ALWAYS,
        "lora_rank": Effect(
            _trains_lora, "freeze_encoder leaves the updates at their beginning, zero", off=0
        ),
        **dict.fromkeys(
            ("lora_alpha", "lora_targets"), Effect(_trains_lora, "no low-rank update is trained")
        ),
        "lora_dropout": Effect(_trains_lora, "no low-rank update is trained", off=0),
        # With --init a shape is held against the model's: EncoderRecipe.of_model.
        **dict.fromkeys(
            (
                "encoder.model_type",
                "encoder.vocab_size",
                "encoder.hidden_size",
                "encoder.num_hidden_layers",
                "encoder.num_attention_heads",
                "encoder.intermediate_size",
                "encoder.max_position_embeddings",
            ),
            ALWAYS,
        ),
        "encoder.initializer_range": Effect(_draws_weights, "all weights are the model's own"),
        "encoder.hidden_dropout_prob": _DROPS_OUT,
        "encoder.attention_probs_dropout_prob": _DROPS_OUT,
        "max_length": Effect(
            lambda case: case.recipe.max_length <= case.config.max_position_embeddings,
            "the encoder's own limit of {case.config.max_position_embeddings} tokens is lower",
        ),
        **dict.fromkeys(("batch_size", "micro_batches"), ALWAYS),
        "checkpoint_layers": Effect(
            _differentiates_encoder, "nothing in the encoder is trained", off=False
        ),
        "sampling_alpha": Effect(
            lambda case: len(case.recipe.train) > 1,
            "{case.recipe.train[0]} is trained alone",
            off=0,
            also=Effect(
                lambda case: case.recipe.task_schedule in ("together", "sampled"),
                "task_schedule = {case.recipe.task_schedule} does not read it",
            ),
        ),
        "task_schedule": Effect(
            lambda case: len(case.recipe.train) > 1,
            "{case.recipe.train[0]} is trained alone",
            off="together",
        ),
        "on_bad_row": ALWAYS,
        "epochs": _of_data(
            _decides_epochs,
            "max_steps = {case.recipe.max_steps} ends training before",
            off=Recipe.model_fields["epochs"].default,
        ),
        "max_steps": _of_data(
            lambda case: case.recipe.max_steps < case.facts.epoch_steps or _streams_alone(case),
            "the epochs are over after {case.facts.epoch_steps} steps",
            off=0,
        ),
        "max_train_examples": Effect(
            _trains_tasks,
            "no task is trained; objectives have their own",
            off=0,
            also=_of_data(
                lambda case: case.recipe.max_train_examples < case.most_examples,
                "no training set has more than {case.most_examples} examples",
            ),
        ),
        "balance": Effect(
            _balances,
            "a step has one gradient, nothing to balance",
            off="sum",
            also=_SHARED._replace(also=_NOT_DWA),
        ),
        "balancing.*": _OF_METHOD,
        **dict.fromkeys(
            (
                f"balancing.{name}"
                for name in ("dwa_temperature", "dwa_window", "stch_mu", "stch_warmup")
            ),
            _OF_LATER_STEPS,
        ),
        "balance_granularity": Effect(
            lambda case: _balances(case) and case.recipe.balance != "sum",
            "all weights of the sum are 1",
            off="model",
            also=_of_data(lambda case: not _sums(case), _NOT_SHARED),
        ),
        **dict.fromkeys(("optimizer", "lr", "weight_decay"), ALWAYS),
        **dict.fromkeys(
            ("betas", "eps"),
            Effect(
                lambda case: not is_torch(case.recipe.optimizer),
                "{case.recipe.optimizer} takes its own from optimizer_options",
            ),
        ),
        "momentum": Effect(
            lambda case: case.recipe.optimizer == "sgd",
            "optimizer = {case.recipe.optimizer} does not read it",
        ),
        "optimizer_options": Effect(
            lambda case: is_torch(case.recipe.optimizer),
            "optimizer = {case.recipe.optimizer} is none of torch.optim",
            off={},
        ),
        "layer_lr_decay": Effect(
            lambda case: not case.recipe.freeze_encoder, "the encoder is not trained", off=1
        ),
        "head_lr": Effect(
            lambda case: case.recipe.head_lr != case.recipe.lr,
            "lr is the same",
            off=0,
            also=_of_data(
                lambda case: case.facts.trains_heads, "nothing outside the encoder is trained"
            ),
        ),
        "schedule": _of_data(
            _falls, "the rate would fall after the last step only", off="constant"
        ),
        "schedule_power": Effect(
            lambda case: case.recipe.schedule == "polynomial",
            "schedule = {case.recipe.schedule} has no power",
            off=1,
            also=_of_data(_falls, "the rate would fall after the last step only"),
        ),
        "warmup": _of_data(
            lambda case: case.facts.schedule.warmup_steps > 0,
            "of {case.facts.steps} steps that rounds to none",
            off=0,
        ),
        **dict.fromkeys(("clip_norm", "precision", "execution"), ALWAYS),
        "ema_decay": Effect(
            _trains_tasks, "no task is trained, and the average is there to be scored", off=0
        ),
        "max_graphs": Effect(
            lambda case: case.execution in RECORDED,
            "execution {case.execution} records no CUDA graphs",
        ),
        "log_every": _of_run_steps(off=Recipe.model_fields["log_every"].default),
        "checkpoint_every": _of_run_steps(off=0),
        "eval_every": Effect(
            _trains_tasks,
            "no task is trained, so nothing is scored",
            off=0,
            also=_of_data(
                _is_within_epoch,
                "the dev sets are scored there anyway, as an epoch or the phase ends",
            ),
        ),
        "best_of": Effect(
            lambda case: case.recipe.scored,
            "no task is trained, so nothing is scored",
            off="overall",
            also=Effect(
                lambda case: len(case.recipe.tasks) > 1, "overall is the score of the only task"
            ),
        ),
        "patience": Effect(
            _trains_tasks,
            "no task is trained, so nothing is scored",
            off=0,
            # The first is the best so far, and after the last one the phase is over anyway.
            also=_of_data(
                lambda case: case.recipe.patience + 1 < case.evaluations,
                "the phase is over before, after {case.facts.steps} steps",
            ),
        ),
        "average_best": Effect(
            lambda case: case.is_last and case.recipe.scored,
            "no task is trained, so nothing is scored",
            off=0,
            also=Effect(
                lambda case: case.recipe.average_best > 1,
                "the average of one evaluation's weights are these weights",
                also=_of_data(
                    lambda case: case.evaluations > 1, "the last phase has one evaluation alone"
                ),
            ),
        ),
        **dict.fromkeys(("seed", "log_mib", "keep_logs", "max_skipped", "loggers"), ALWAYS),
        "log_layer_cosines_every": Effect(
            _balances, "a step has one gradient, so no cosines", off=0
        ),
        **dict.fromkeys(("keep_checkpoints", "phases"), ALWAYS),
        "distribute": _SEVERAL_RANKS,
        "timeout": _SEVERAL_RANKS,
        "check_ranks_every": _SEVERAL_RANKS._replace(off=0),
        "threads": Effect(
            lambda case: case.device.type == "cpu", "it is trained on {case.device}", off=0
        ),
    }
)
"""Of every field, by its name among ``--fields``; ``*`` stands for all others of a table."""


def effect_of(known_as: str) -> Effect:
    """Return when a field has an effect, by its name among ``--fields``."""
    table = known_as.rpartition(".")[0]
    return EFFECTS.get(known_as) or EFFECTS[f"{table}.*"]


def lines_on_idle_settings(
    run: Run,
    device: torch.device,
    ranks: Ranks | None = None,
    facts: Mapping[str, PhaseFacts] | None = None,
) -> list[str]:
    """Return a line for each setting that the recipe gives and that changes nothing.

    Args:
        run: with the settings in force.
        device: where it is trained.
        ranks: the processes that train it together.
        facts: by phase, what its data decide, where they are read already.
    """
    lines, idle, recipes, facts = (
        _line_on_shape(run),
        list[str](),
        run.recipe.in_phases,
        facts or {},
    )
    all_known = facts.keys() >= recipes.keys()
    run_steps = sum(known.steps for known in facts.values()) if all_known else None
    for given, phases in given_fields(run.recipe):
        if isinstance(given.value, Settings) and given.known_as not in EFFECTS:
            continue
        if any(given.key.startswith(f"{table}.") for table in idle):
            continue
        effect, field = effect_of(given.known_as), given.key.rpartition(".")[2]
        if effect.off is not None and given.value == effect.off:
            continue
        place = (run.config, device, ranks or Ranks(), field, given.owner)
        last = list(recipes)[-1]
        cases = [
            Case(recipes[name], *place, facts.get(name), run_steps, given.split, name == last)
            for name in phases
        ]
        if all(map(effect.reason_against, cases)):
            idle.append(given.key)
            # Of a phase that lacks the data alone, if there is one.
            case = max(cases, key=effect.holds, default=None)
            reason = effect.reason_against(case) if case else "every phase has its own"
            lines.append(f"{given.key}{_spelt(given.value)}: no effect, {reason}")
    return lines


def _line_on_shape(run: Run) -> list[str]:
    """Return the line on the shape that a recipe's file gives, where ``--init`` has another."""
    aside = run.recipe.encoder.set_aside(run.config)
    if not aside:
        return []
    own = ", ".join(f"{name} {getattr(run.config, name)}, not {aside[name]}" for name in aside)
    return [f"[encoder]: no effect, it describes an encoder from scratch; the model has {own}"]


def _spelt(value: object) -> str:
    if isinstance(value, Settings):
        return ""
    return f" = {shorten(json.dumps(value, ensure_ascii=False), 60)}"
