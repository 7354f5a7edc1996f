"""Settings that change nothing in the run at hand: each is said in one line as training begins.

A field that a recipe or ``--set`` gives is held against the table below, which says of every field
of a recipe when it has an effect.  A field of a phase needs it in that phase, one of the whole
recipe in any phase that has no other value for it.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch

from .data.rows import shorten
from .data.source import TaskSource
from .model.config import EncoderConfig
from .multitask.balance import BalanceSettings, Signals, TrainedTasks, build_method
from .objectives.recipe import ObjectiveRecipe
from .origins import reads_data_folder
from .recipe import Recipe
from .run import Run
from .runtime.distributed import Ranks
from .settings import Settings
from .training import execution_kind, has_one_gradient, runs_encoder
from .wording import ANY_NAME


class Case(NamedTuple):
    """A field within a phase of a run, and where that is trained.

    Attributes:
        recipe: of the phase.
        config: of the encoder.
        device: where it is trained.
        ranks: the processes that train together.
        field: the field, without its tables.
        owner: the task or objective that it belongs to, if any.
    """

    recipe: Recipe
    config: EncoderConfig
    device: torch.device
    ranks: Ranks
    field: str
    owner: str

    @property
    def execution(self) -> str:
        """How steps are run."""
        return execution_kind(self.recipe, self.device, self.ranks)

    @property
    def objective(self) -> ObjectiveRecipe:
        """The objective that the field belongs to."""
        return self.recipe.objectives[self.owner]

    @property
    def source(self) -> TaskSource:
        """The source that the field belongs to."""
        source = self.recipe.tasks[self.owner].source
        assert source is not None
        return source


class Effect(NamedTuple):
    """When a field has an effect.

    Attributes:
        holds: whether it has in a case.
        reason: why it has none elsewhere; ``{case}`` is that case.
        off: the value that asks for no effect, so that it gets what it asks for.
    """

    holds: Callable[[Case], bool]
    reason: str
    off: object = None


def _balances(case: Case) -> bool:
    return not has_one_gradient(case.recipe)


def _is_trained(case: Case) -> bool:
    return case.owner in case.recipe.train


def _trains_tasks(case: Case) -> bool:
    return case.recipe.scored


def _reads_loss(case: Case) -> bool:
    return _is_trained(case) or case.recipe.formats[case.owner].kind == "score"


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


def _method_reads(case: Case) -> bool:
    recipe = case.recipe
    return _balances(case) and case.field in settings_read(
        recipe.balance, recipe.train, recipe.balancing
    )


ALWAYS = Effect(lambda _case: True, "")

_DROPS_OUT = Effect(
    lambda case: runs_encoder(case.recipe),
    "the frozen encoder's states are computed once, without dropout",
    off=0,
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
        "tasks.NAME.features": ALWAYS,
        "tasks.NAME.loss": Effect(_reads_loss, "{case.owner} is not trained", off="default"),
        "tasks.NAME.weight": Effect(_is_trained, "{case.owner} is not trained", off=1),
        "tasks.NAME.first": Effect(_is_trained, "{case.owner} is not trained", off=0),
        **dict.fromkeys(
            (f"tasks.NAME.source.{name}" for name in ("kind", "text", "label", "id", "dataset")),
            ALWAYS,
        ),
        "tasks.NAME.source.classes": Effect(
            lambda case: not case.source.kind.endswith("regression"), "a regression has no classes"
        ),
        "tasks.NAME.source.range": Effect(
            lambda case: case.source.kind.endswith("regression"), "classes have no range"
        ),
        "tasks.NAME.source.subset": _OF_DATASET,
        "tasks.NAME.source.splits": _OF_DATASET,
        "tasks.NAME.source.*": _OF_FILES,
        "objectives.NAME": Effect(_is_trained, "train does not name it"),
        **dict.fromkeys(
            (
                f"objectives.NAME.{name}"
                for name in ("kind", "sentences_of", "files", "limit", "max_texts", "weight")
            ),
            ALWAYS,
        ),
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
        # With --init a shape is held against the model's: EncoderRecipe.of_model.
        **dict.fromkeys(
            (
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
        "order": Effect(
            lambda case: len(case.recipe.train) > 1,
            "{case.recipe.train[0]} is trained alone",
            off="together",
        ),
        **dict.fromkeys(("epochs", "max_steps", "on_bad_row"), ALWAYS),
        "limit": Effect(_trains_tasks, "no task is trained; objectives have their own", off=0),
        "balance": Effect(_balances, "a step has one gradient, nothing to balance", off="sum"),
        "balancing.*": Effect(
            _method_reads, "balance = {case.recipe.balance} does not read it here"
        ),
        "surgery": Effect(
            lambda case: _balances(case) and case.recipe.balance != "sum",
            "all weights of the sum are 1",
            off="model",
        ),
        **dict.fromkeys(("optimizer", "lr", "schedule", "warmup", "betas", "eps"), ALWAYS),
        **dict.fromkeys(("weight_decay", "clip_norm", "precision", "execution"), ALWAYS),
        "max_graphs": Effect(
            lambda case: case.execution == "graphs",
            "execution {case.execution} records no CUDA graphs",
        ),
        **dict.fromkeys(("seed", "log_every", "log_mib", "keep_logs"), ALWAYS),
        **dict.fromkeys(("max_skipped", "sinks"), ALWAYS),
        "watch_layers": Effect(_balances, "a step has one gradient, so no cosines", off=0),
        **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "phases"), ALWAYS),
        "distribute": _SEVERAL_RANKS,
        "timeout": _SEVERAL_RANKS,
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


def lines_on_idle_settings(run: Run, device: torch.device, ranks: Ranks | None = None) -> list[str]:
    """Return a line for each setting that the recipe gives and that changes nothing.

    Args:
        run: with the settings in force.
        device: where it is trained.
        ranks: the processes that train it together.
    """
    lines, idle = _line_on_shape(run), list[str]()
    for given, phases in _places(run.recipe):
        if any(given.key.startswith(f"{table}.") for table in idle):
            continue
        effect, field = effect_of(given.known_as), given.key.rpartition(".")[2]
        if effect.off is not None and given.value == effect.off:
            continue
        cases = [
            Case(phase, run.config, device, ranks or Ranks(), field, given.owner)
            for phase in phases
        ]
        if not any(map(effect.holds, cases)):
            idle.append(given.key)
            reason = effect.reason.format(case=cases[-1]) if cases else "every phase has its own"
            lines.append(f"{given.key}{_spelt(given.value)}: no effect, {reason}")
    return lines


def settings_read(balance: str, tasks: Sequence[str], settings: BalanceSettings) -> set[str]:
    """Return the fields of ``settings`` that a method reads, by trying it out.

    Args:
        balance: the method's name.
        tasks: the trained tasks.
        settings: of the methods.

    Raises:
        InputError: the method does not fit the tasks.
    """
    count, reads = len(tasks), _Reads(settings)
    known = TrainedTasks(tuple(tasks), (1,) * count)
    method = build_method(balance, known, cast(BalanceSettings, reads))
    order = torch.arange(count).expand(count, count).contiguous()
    method.decide(Signals(torch.eye(count), order, torch.ones(count), method.first_state))
    return reads.names


class _Reads:
    """Settings that note which of them are read."""

    def __init__(self, settings: BalanceSettings) -> None:
        self._settings = settings
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._settings, name)


class _Given(NamedTuple):
    """A field, or a table, that a recipe gives.

    Attributes:
        key: its name.
        known_as: its name among ``--fields``.
        owner: the task or objective that it belongs to, if any.
        value: what it is set to.
    """

    key: str
    known_as: str
    owner: str
    value: Any


def _places(recipe: Recipe) -> Iterator[tuple[_Given, list[Recipe]]]:
    """Yield what a recipe gives, and the phases that it counts in."""
    phases = recipe.in_phases
    fields, required = Recipe.model_fields, {"train"}
    # A run's own recipe.toml says everything; what it leaves as it is was not asked for.
    changed = recipe.model_fields_set >= fields.keys()
    for given in _given_in(recipe, recipe.model_fields_set - required, changed=changed):
        field = given.known_as.partition(".")[0]
        yield given, [p for name, p in phases.items() if field not in recipe.phases.get(name, ())]
    for name, own in recipe.phases.items():
        for given in _given_in(phases[name], own.keys()):
            yield given._replace(key=f"phases.{name}.{given.key}"), [phases[name]]


def _given_in(
    table: Settings,
    names: Collection[str],
    key: str = "",
    known_as: str = "",
    owner: str = "",
    *,
    changed: bool = False,
) -> Iterator[_Given]:
    """Yield fields of a table, those of tables in it by their own, all or what was changed."""
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if name not in names or (changed and value == info.get_default()):
            continue
        tables = {"": value} if isinstance(value, Settings) else value
        if not (isinstance(tables, dict) and all(isinstance(t, Settings) for t in tables.values())):
            yield _Given(key + name, known_as + name, owner, value)
            continue
        for own, inner in tables.items():
            its_key = f"{key}{name}.{own}".rstrip(".")
            its_name = f"{known_as}{name}.{ANY_NAME}" if own else f"{known_as}{name}"
            if its_name in EFFECTS:
                yield _Given(its_key, its_name, own or owner, inner)
            yield from _given_in(
                inner,
                inner.model_fields_set,
                f"{its_key}.",
                f"{its_name}.",
                own or owner,
                changed=changed,
            )


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
