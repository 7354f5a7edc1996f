"""Settings without effect: the table covers every field, and says what training does.

Two steps of a tiny run are trained under each pair of settings.  Where the table says that a field
has an effect the weights or the losses change with it, where it says that it has none they are the
same to the bit.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from engine import evaluate
from engine.config import recipe as recipes
from engine.config.messages import keys_of
from engine.config.recipe import Recipe
from engine.distributed.ranks import Ranks
from engine.gradients.balancing import METHODS, BalanceSettings
from engine.lint.idle_settings import EFFECTS, effect_of, lines_on_idle_settings
from engine.lint.method_trials import settings_read, sums_what_is_separate
from engine.lint.phase_facts import PhaseFacts
from engine.runs.data_paths import data_folder
from engine.runs.run import Run, begin
from engine.train import main
from engine.training.build import build_trainer
from engine.utils.errors import InputError

from ..conftest import TINY

CPU = torch.device("cpu")
ROWS = 39
"""Examples of each training set."""
SMALL = [
    *TINY,
    "max_train_examples=16",
    "batch_size=8",
    "max_steps=2",
    "clip_norm=0",
    "schedule=constant",
]


@pytest.fixture(scope="module", autouse=True)
def few_examples(tmp_path_factory) -> None:
    """The demo corpus, cut to so few rows that nothing takes time, as the working folder's data."""
    folder = tmp_path_factory.mktemp("data")
    for path in data_folder(recipes.load("demo")).iterdir():
        lines = path.read_text().splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[: 1 + ROWS]))
    SMALL.append(f"data={folder}")


# The table itself


def test_every_field_is_in_the_table():
    for key in keys_of(Recipe):
        effect_of(key)
    own = {key for key in EFFECTS if not key.endswith(".*")} - {"objectives.NAME"}
    assert own <= set(keys_of(Recipe))


def test_a_field_that_is_in_no_table_is_an_error():
    with pytest.raises(KeyError):
        effect_of("nesterov")


@pytest.mark.parametrize("field", BalanceSettings.model_fields)
def test_the_methods_that_read_a_setting_are_those_that_it_names(field):
    tasks = ("sst", "quora", "sts")
    readers = {name for name in METHODS if field in settings_read(name, tasks, BalanceSettings())}
    assert readers
    text = BalanceSettings.model_fields[field].description
    named = {name.strip() for name in text.partition(":")[0].split(",")}
    assert readers == named


@pytest.mark.parametrize("name", recipes.names())
def test_no_built_in_recipe_has_an_idle_setting(name):
    demo = tiny_encoder()
    assert lines_on_idle_settings(demo._replace(recipe=recipes.load(name)), CPU) == []


@cache
def tiny_encoder() -> Run:
    return begin(recipes.load("demo", SMALL), Path("not-written"))


# What it says against what training does


class Trial(NamedTuple):
    """What a tiny run says, and what comes of it: its losses, cosines and weights."""

    lines: list[str]
    outcome: list[torch.Tensor]


def attempt(*settings: str) -> Trial:
    run = begin(recipes.load("demo", [*SMALL, *settings]), Path("not-written"))
    trainer = build_trainer(run, CPU)
    with trainer.loader(0) as loader:
        steps = enumerate(zip(*[iter(loader)] * trainer.recipe.micro_batches, strict=False))
        reports = [trainer.step(batch, step, trainer.lr_schedule(step)) for step, batch in steps]
    grams = [r.layer_grams for r in reports if r.layer_grams is not None and len(r.tasks) > 1]
    numbers = torch.tensor([len(reports), trainer.total_steps])
    losses = [report.losses for report in reports]
    weights = trainer.model.state_dict().values()
    lines = lines_on_idle_settings(run, CPU, facts={"": PhaseFacts.of(trainer)})
    return Trial(lines, [numbers, *losses, *grams, *weights])


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


before = cache(attempt)

ALONE, TURNS = ("train=['sst']", "balance=sum"), ("task_schedule=cycle",)
FROZEN = ("freeze_encoder=true",)
BESIDE = (*FROZEN, "adapter_width=8", "lr=0.1")
MASKED = (
    "objectives.text.kind=masked_lm",
    "objectives.text.max_per_source=16",
    "train=['text','sst']",
)
TWICE = ("objectives.text.kind=simcse", "objectives.text.max_per_source=16", "train=['text','sst']")
TWICE_ALONE = (*TWICE, "train=['text']")
TEXT_ALONE = (*MASKED, "train=['text']")
ALL_TEXT = (*TEXT_ALONE, "objectives.text.max_per_source=0", "objectives.text.sentences_of=['sts']")
ALL = ("max_train_examples=0", "max_steps=5")  # a pass
STEPS = ("max_steps=0", "epochs=2")  # 4 of them
DRAWN = (
    "task_schedule=annealed",
    "max_train_examples=0",
    "tasks.sst.first_n=2",
    "max_steps=21",
    "epochs=2",
)
RETRIEVAL = ("tasks.replies.head=cosine", "train=['sst','replies']")
CONTRASTIVE = ("tasks.quora.head=cosine", "tasks.quora.loss=contrastive")
SHARED = (*FROZEN, "tasks.quora.head=shared", "tasks.sts.head=shared")
DWA = ("balance=sum", "balancing.dwa_window=1", "max_steps=3")

EFFECTIVE = [
    ((), "tasks.sts.head=distance"),
    ((), "tasks.sts.weight=3"),
    ((), "tasks.sts.first_n=9"),
    (("tasks.sts.head=distance",), "tasks.sts.loss=cross_entropy"),
    ((), "tasks.sst.class_weights=[1,2,3,4,5]"),
    ((), "tasks.quora.class_weights=[1,3]"),
    ((), "tasks.sst.label_smoothing=0.1"),
    ((), "tasks.quora.label_smoothing=0.1"),
    ((), "tasks.sst.focal_gamma=2"),
    ((), "tasks.quora.focal_gamma=2"),
    (("tasks.quora.head=cosine",), "tasks.quora.loss=contrastive"),
    (CONTRASTIVE, "tasks.quora.margin=0.9"),
    (RETRIEVAL, "tasks.replies.temperature=0.2"),
    (RETRIEVAL, "tasks.replies.symmetric=true"),
    ((), "train=['sst','sts']"),
    ((), "pooling=cls"),
    (("tasks.quora.head=cross", "train=['quora']"), "pooling=cls"),
    (("tasks.sst.head=bilstm", "train=['sst']"), "pooling=cls"),
    ((), "dropout=0.5"),
    (FROZEN, "dropout=0.5"),
    ((), "adapter_width=8"),
    ((), "freeze_encoder=true"),
    ((), "encoder.model_type=modernbert"),
    ((), "encoder.vocab_size=128"),
    ((), "encoder.hidden_size=16"),
    ((), "encoder.num_hidden_layers=2"),
    ((), "encoder.num_attention_heads=4"),
    ((), "encoder.intermediate_size=32"),
    ((), "encoder.max_position_embeddings=32"),
    ((), "encoder.initializer_range=0.1"),
    ((), "encoder.hidden_dropout_prob=0.5"),
    ((), "encoder.attention_probs_dropout_prob=0.5"),
    (BESIDE, "encoder.hidden_dropout_prob=0.5"),
    (BESIDE, "encoder.attention_probs_dropout_prob=0.5"),
    ((), "max_length=5"),
    ((), "batch_size=4"),
    ((), "micro_batches=2"),
    ((), "task_schedule=cycle"),
    ((), "tasks.sst.batch_size=4"),
    (MASKED, "objectives.text.batch_size=4"),
    (MASKED, "objectives.text.tokens_per_batch=200"),
    (MASKED, "objectives.text.whole_words=true"),
    ((*MASKED, "max_length=8"), "objectives.text.divide=true"),
    (("max_train_examples=0", "tasks.sst.first_n=9"), "sampling_alpha=1"),
    (("task_schedule=sampled", "max_steps=9", "tasks.sst.first_n=2"), "sampling_alpha=1"),
    (("max_steps=0", "epochs=1"), "epochs=2"),
    ((), "max_steps=1"),
    ((), "max_train_examples=8"),
    ((), "balance=mgda"),
    ((), "balance_granularity=tensor"),
    (("balance=mean",), "balance_granularity=layer"),  # what belongs to one task is not averaged
    ((), "optimizer=lamb"),
    ((), "lr=1e-2"),
    ((), "layer_lr_decay=0.5"),
    (("optimizer=lamb",), "layer_lr_decay=0.5"),
    ((), "head_lr=1e-2"),
    (FROZEN, "head_lr=1e-2"),
    ((), "schedule=linear"),
    ((), "schedule=cosine"),
    ((), "schedule=polynomial"),
    (("schedule=polynomial",), "schedule_power=3"),
    ((), "warmup=0.5"),
    ((), "betas=[0.5, 0.9]"),
    ((), "eps=1e-3"),
    (("optimizer=lamb",), "eps=1e-3"),
    (("optimizer=sgd",), "momentum=0.5"),
    (("optimizer=torch.RMSprop",), "optimizer_options={alpha=0.5}"),
    ((), "weight_decay=0.5"),
    ((), "clip_norm=1e-4"),
    ((), "precision=bf16"),
    ((), "seed=1"),
    ((), "log_layer_cosines_every=1"),
    ((), "phases.one.lr=1e-2"),
    (MASKED, "objectives.text.kind=simcse"),
    (MASKED, "objectives.text.sentences_of=['sts']"),
    (MASKED, "objectives.text.max_per_source=8"),
    (MASKED, "objectives.text.max_texts=5"),
    (MASKED, "objectives.text.join=3"),
    ((*MASKED, "objectives.text.join=3"), "objectives.text.short=1"),
    (MASKED, "objectives.text.mask_share=0.5"),
    (MASKED, "objectives.text.weight=3"),
    (TWICE, "objectives.text.temperature=0.5"),
    ((*MASKED, *FROZEN), "encoder.hidden_dropout_prob=0.5"),
    (ALL, f"tasks.sst.first_n={ROWS - 1}"),
    (ALL, f"max_train_examples={ROWS - 1}"),
    ((*ALL, "tasks.sst.first_n=8"), "max_train_examples=30"),  # the others have more
    (ALL_TEXT, f"objectives.text.max_per_source={ROWS - 1}"),
    (ALL_TEXT, f"objectives.text.max_texts={2 * ROWS - 1}"),
    ((*ALL_TEXT, "objectives.text.max_per_source=9"), "objectives.text.max_texts=17"),
    (STEPS, "max_steps=3"),
    (STEPS, "epochs=1"),
    ((*TURNS, "max_steps=2", "epochs=1"), "task_schedule=annealed"),
    (DRAWN, "epochs=3"),
    ((*STEPS, "max_steps=1"), "warmup=0.51"),
    ((*STEPS, "max_steps=3"), "warmup=0.17"),
    ((*STEPS, "warmup=0"), "schedule=linear"),
    ((*STEPS, "warmup=0.5"), "schedule=linear"),
    (("max_steps=2", "warmup=0.1"), "schedule=linear"),
    (FROZEN, "balance=mgda"),
    (FROZEN, "balance=mean"),
    ((*FROZEN, "balance=mgda"), "balance_granularity=layer"),  # it becomes the sum
    ((*FROZEN, "train=['sst','quora']", "balance=cagrad"), "balancing.cagrad_c=0.9"),
    (SHARED, "balance=mgda"),
    ((*SHARED, "balance_granularity=layer"), "balance=mgda"),
    (BESIDE, "balance=mgda"),
    (("balance=fixed",), "balancing.fixed={sst=3.0}"),
    (("balance=main_aux",), "balancing.main=sts"),
    (("balance=main_aux",), "balancing.aux_weight=0.9"),
    (("balance=cagrad",), "balancing.cagrad_c=0.9"),
    (("balance=fairgrad",), "balancing.fairgrad_alpha=2"),
    (("balance=gradnorm",), "balancing.gradnorm_lr=0.5"),
    (("balance=krum",), "balancing.krum_selected=2"),
    *((("balance=sum",), f"balance={name}") for name in ("uw", "rlw", "gls", "imtl_l", "imtl")),
    *((("balance=sum",), f"balance={name}") for name in ("stch", "famo", "db_mtl")),
    (("balance=uw",), "balancing.uw_lr=0.5"),
    (("balance=imtl",), "balancing.imtl_lr=0.5"),
    (("balance=famo",), "balancing.famo_lr=0.5"),
    (("balance=famo", "max_steps=3"), "balancing.famo_gamma=9"),
    (DWA, "balance=dwa"),
    ((*DWA, "balance=dwa"), "balancing.dwa_temperature=0.5"),
    (("balance=dwa", "max_steps=3"), "balancing.dwa_window=1"),
    (("balance=stch", "balancing.stch_warmup=1"), "balancing.stch_mu=0.1"),
    (("balance=stch", "balancing.stch_mu=0.1"), "balancing.stch_warmup=1"),
]

WITHOUT = [
    (ALONE, "balance=mgda"),
    (TURNS, "balance=mgda"),
    (ALONE, "balance_granularity=layer"),
    (TURNS, "balance_granularity=tensor"),
    (("balance=sum",), "balance_granularity=layer"),
    (ALONE, "task_schedule=round_robin"),
    (ALONE, "sampling_alpha=1"),
    (TURNS, "sampling_alpha=1"),
    (ALONE, "tasks.sts.batch_size=4"),
    (ALONE, "task_schedule=annealed"),
    (ALONE, "log_layer_cosines_every=1"),
    (TURNS, "log_layer_cosines_every=1"),
    (ALONE, "tasks.sts.weight=3"),
    (ALONE, "tasks.sts.first_n=9"),
    (ALONE, "tasks.quora.loss=cross_entropy"),
    (ALONE, "tasks.quora.class_weights=balanced"),
    (ALONE, "tasks.quora.label_smoothing=0.1"),
    (ALONE, "tasks.quora.focal_gamma=2"),
    ((), "tasks.quora.class_weights=[2,2]"),
    ((), "balancing.cagrad_c=0.9"),
    ((), "balancing.krum_selected=2"),
    (("balance=gradnorm",), "balancing.gradvac_beta=0.9"),
    (("balance=main_aux", *ALONE[:1]), "balancing.aux_weight=0.9"),
    (("balance=sum",), "balance=dwa"),
    (("balance=sum", "balancing.dwa_window=1"), "balance=dwa"),  # two steps
    (("balance=dwa",), "balancing.dwa_window=1"),
    (("balance=dwa", "balancing.dwa_window=1"), "balancing.dwa_temperature=0.5"),
    (("balance=stch",), "balancing.stch_mu=0.1"),
    (("balance=stch", "balancing.stch_warmup=2"), "balancing.stch_mu=0.1"),
    (("balance=stch",), "balancing.stch_warmup=2"),
    (("balance=imtl_g",), "balancing.imtl_lr=0.5"),
    (("balance=rlw",), "balancing.uw_lr=0.5"),
    (FROZEN, "encoder.hidden_dropout_prob=0.5"),
    (FROZEN, "encoder.attention_probs_dropout_prob=0.5"),
    (FROZEN, "checkpoint_layers=true"),
    (FROZEN, "layer_lr_decay=0.5"),
    (("lr=1e-3",), "head_lr=1e-3"),
    (TWICE_ALONE, "head_lr=1e-2"),
    (("optimizer=adafactor",), "betas=[0.5, 0.9]"),
    (("optimizer=sgd",), "eps=1e-3"),
    ((), "momentum=0.5"),
    ((), "optimizer_options={alpha=0.5}"),
    ((), "max_length=100"),
    ((), "max_graphs=2"),
    ((), "timeout=5"),
    ((), "check_ranks_every=5"),
    ((), "distribute=replicated"),
    (("encoder.hidden_dropout_prob=0.2",), "objectives.text.kind=simcse"),
    (TEXT_ALONE, "dropout=0.5"),
    (TEXT_ALONE, "ema_decay=0.9"),
    (TEXT_ALONE, "max_train_examples=8"),
    (MASKED, "objectives.text.temperature=0.5"),
    (MASKED, "objectives.text.short=1"),
    (TWICE, "objectives.text.mask_share=0.5"),
    (TWICE, "objectives.text.join=3"),
    (("phases.one.lr=1e-2",), "lr=1e-5"),
    (ALL, f"tasks.sst.first_n={ROWS}"),
    (ALL, "tasks.sts.first_n=1000"),
    (ALL, f"max_train_examples={ROWS}"),
    (
        (*ALL, *(f"tasks.{task}.first_n=8" for task in ("sst", "quora", "sts"))),
        "max_train_examples=8",
    ),
    (ALL_TEXT, f"objectives.text.max_per_source={ROWS}"),
    (ALL_TEXT, f"objectives.text.max_texts={2 * ROWS}"),
    ((*ALL_TEXT, "objectives.text.max_per_source=9"), "objectives.text.max_texts=18"),
    (STEPS, "max_steps=4"),
    (STEPS, "max_steps=1000"),
    ((), "epochs=2"),
    ((*TURNS, "max_steps=3"), "epochs=2"),
    ((*STEPS, "max_steps=1"), "warmup=0.5"),
    ((*STEPS, "warmup=0"), "warmup=0.12"),
    (("max_steps=1", "warmup=0"), "schedule=linear"),
    (("warmup=0.5",), "schedule=linear"),
    (("warmup=0.5",), "schedule=cosine"),
    ((), "schedule_power=3"),
    (("schedule=cosine",), "schedule_power=3"),
    (("schedule=polynomial", "max_steps=1", "warmup=0"), "schedule_power=3"),
    ((), "log_every=3"),
    ((), "checkpoint_every=3"),
    ((), "eval_every=2"),
    (STEPS, "eval_every=2"),
    (STEPS, "eval_every=4"),
    (TEXT_ALONE, "eval_every=1"),
    (STEPS, "patience=1"),
    (("eval_every=1",), "patience=1"),
    ((*STEPS, "eval_every=1"), "patience=3"),
    (TEXT_ALONE, "patience=1"),
    ((*STEPS, "eval_every=1"), "average_best=1"),
    (TEXT_ALONE, "average_best=2"),
    (TEXT_ALONE, "best_of=sts"),
    (TEXT_ALONE, "tasks.quora.threshold=dev"),
    (FROZEN, "balance=gradvac"),
    (FROZEN, "balance_granularity=layer"),
    (FROZEN, "balance_granularity=tensor"),
    ((*FROZEN, "balance_granularity=layer"), "balance=mgda"),
    ((*FROZEN, "balance_granularity=tensor", "balance=cagrad"), "balancing.cagrad_c=0.9"),
    ((*FROZEN, "balance=gradvac"), "balancing.gradvac_beta=0.9"),
    ((*BESIDE, "balance_granularity=layer"), "balance=mgda"),
    (BESIDE, "balance_granularity=tensor"),
    ((*MASKED, "train=['sst','quora']", *FROZEN, "balance_granularity=layer"), "balance=mean"),
]

ELSEWHERE = {
    # what runs say and keep, and how they compute the same: tests of their own
    *("description", "paper", "data", "init", "checkpoint_layers", "on_bad_row", "execution"),
    *("log_every", "log_mib", "keep_logs", "max_skipped", "loggers", "checkpoint_every"),
    *("eval_every", "patience", "best_of", "average_best"),
    *("keep_checkpoints", "max_graphs", "distribute", "timeout", "check_ranks_every"),
    *("threads", "ema_decay"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),  # of a pretrained encoder
    *("objectives.NAME.files", "objectives.NAME.split_by_rank"),
    *("tasks.NAME.metrics", "tasks.NAME.score_weight", "tasks.NAME.tag_pieces"),
    *("tasks.NAME.decided_by", "tasks.NAME.threshold"),
}


def as_listed(key: str) -> str:
    first, *rest = key.split(".")
    if first == "phases":
        return first
    return ".".join([first, "NAME", *rest[1:]]) if first in ("tasks", "objectives") else key


@pytest.mark.parametrize(("settings", "override"), EFFECTIVE)
def test_what_has_an_effect_changes_training(settings, override):
    after = attempt(*settings, override)
    assert not same(before(*settings).outcome, after.outcome)
    key = override.partition("=")[0]
    assert not any(line.startswith(f"{key} = ") for line in after.lines)


@pytest.mark.parametrize(("settings", "override"), WITHOUT)
def test_what_has_no_effect_is_said_and_changes_nothing(settings, override):
    after = attempt(*settings, override)
    key = override.partition("=")[0]
    new = [line for line in after.lines if line not in before(*settings).lines]
    (line,) = (
        line for line in new if line.startswith((f"{key} = ", f"{key.rpartition('.')[0]}: "))
    )
    assert ": no effect, " in line
    assert same(before(*settings).outcome, after.outcome)


def test_every_field_is_tried():
    tried = {as_listed(override.partition("=")[0]) for _, override in EFFECTIVE}
    fields = {key for key in keys_of(Recipe) if ".source." not in key}
    fields -= {key for key in fields if key.startswith("balancing.")}  # tried by settings_read
    assert fields - tried - ELSEWHERE == set()


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_sum_what_is_separate(method):
    """By a Gram matrix of three orthogonal gradients, in their own kernels."""
    tasks = ("sst", "quora", "sts")
    found = sums_what_is_separate(method, tasks, BalanceSettings())
    assert found == (method in {"sum", "fixed", "pcgrad", "gradvac"})
    if method == "fixed":
        assert not sums_what_is_separate(method, tasks, BalanceSettings(fixed={"sst": 2.0}))


# What the data of a phase decide


@pytest.fixture
def told(tmp_path, capsys):
    """Train with settings; return the lines on those without effect, and all lines."""

    def run(*settings: str, options: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        arguments = ["--out", str(tmp_path / "run"), *options, "--set", *SMALL, *settings]
        assert main(["demo", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "no effect" in line], lines

    return run


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("warmup=0.2",), "warmup = 0.2: no effect, of 2 steps that rounds to none"),
        (
            ("max_steps=1", "schedule=linear"),
            'schedule = "linear": no effect, the rate would fall after the last step only',
        ),
        (
            ("max_train_examples=39",),
            "max_train_examples = 39: no effect, no training set has more than 39 examples",
        ),
        (("log_every=2", "checkpoint_every=2"), ""),
        (("max_steps=3", "eval_every=1", "patience=1", "best_of=sts"), ""),
        (
            ("eval_every=2",),
            "eval_every = 2: no effect, the dev sets are scored there anyway, as an epoch or the "
            "phase ends",
        ),
        (("eval_every=1", "average_best=2"), ""),
        (("eval_every=1", "average_best=3"), ""),
        (
            ("average_best=1",),
            "average_best = 1: no effect, the average of one evaluation's weights are these "
            "weights",
        ),
        (
            ("eval_every=1", "patience=1"),
            "patience = 1: no effect, the phase is over before, after 2 steps",
        ),
        (("log_every=3",), "log_every = 3: no effect, the run has 2 steps"),
        (("checkpoint_every=9",), "checkpoint_every = 9: no effect, the run has 2 steps"),
        (
            ("epochs=1", "max_steps=2"),
            "max_steps = 2: no effect, the epochs are over after 2 steps",
        ),
        (
            ("tasks.sst.first_n=50",),
            "tasks.sst.first_n = 50: no effect, the training set has 39 examples",
        ),
        (
            (MASKED[0], MASKED[2], "objectives.text.max_texts=500"),
            "objectives.text.max_texts = 500: no effect, 195 texts were found",
        ),
        (
            FROZEN,
            'balance = "pcgrad": no effect, no two tasks train the same parameter, so it gives the '
            "sum",
        ),
    ],
)
def test_the_line_says_why(told, settings, line):
    found, _ = told("warmup=0", "epochs=10", *settings)  # a default is not said
    assert found == ([line] if line else [])


def test_a_text_file_has_lines(told, tmp_path):
    (tmp_path / "text").write_text("one two\n\nthree four\nfive\n")
    files = f"objectives.text.files=['{tmp_path / 'text'}']"
    for limit, idle in ((2, False), (3, True)):
        settings = (*TEXT_ALONE, files, f"objectives.text.max_per_source={limit}", "batch_size=2")
        found, _ = told(*settings, options=("--dry-run",))
        said = (
            f"objectives.text.max_per_source = {limit}: no effect, no task or file has more than 3"
        )
        assert (said in found) == idle


PHASES = ("warmup=0", "max_steps=0", "epochs=1")
STEPS_EACH = ("epochs=10", "phases.a.max_steps=2", "phases.b.max_steps=2")


@pytest.mark.parametrize(
    ("settings", "line", "phase"),
    [
        (
            ("max_train_examples=39", "phases.a.eps=1e-7", "phases.b.eps=1e-7"),
            "max_train_examples = 39",
            "b",
        ),
        (
            (
                "max_train_examples=9",
                "tasks.sst.first_n=5",
                "phases.a.train=['sst']",
                "phases.b.eps=1e-7",
            ),
            "",
            "",
        ),
        (
            (
                "max_train_examples=9",
                "tasks.sst.first_n=5",
                "phases.a.eps=1e-7",
                "phases.b.train=['sst']",
            ),
            "",
            "",
        ),
        (
            ("phases.a.max_train_examples=39", "phases.b.eps=1e-7"),
            "phases.a.max_train_examples = 39",
            "a",
        ),
        (
            ("phases.a.eps=1e-7", "phases.b.max_train_examples=39"),
            "phases.b.max_train_examples = 39",
            "b",
        ),
        (
            (
                "max_train_examples=39",
                *MASKED[:2],
                "phases.a.train=['text']",
                "phases.b.train=['sst']",
            ),
            "max_train_examples = 39: no effect, no training set has more than 39",
            "b",
        ),
        (
            ("checkpoint_every=5", *STEPS_EACH),
            "checkpoint_every = 5: no effect, the run has 4 steps",
            "b",
        ),
        (("checkpoint_every=4", *STEPS_EACH), "", ""),
        (
            ("average_best=2", "phases.a.eval_every=1", "phases.b.eps=1e-7"),
            "average_best = 2: no effect, the last phase has one evaluation alone",
            "b",
        ),
        (("average_best=2", "phases.a.eps=1e-7", "phases.b.eval_every=1"), "", ""),
        (
            (*STEPS_EACH, "phases.b.epochs=4"),
            "phases.b.epochs = 4: no effect, max_steps = 2",
            "b",
        ),
    ],
)
def test_a_phase_speaks_of_its_own_data_and_the_last_of_all(told, settings, line, phase):
    lines, shown = told(*PHASES, *settings)
    lines = [other for other in lines if not other.startswith("balance")]
    assert len(lines) == bool(line), lines
    if line:
        (place,) = (number for number, text in enumerate(shown) if text.startswith(line))
        begins = [number for number, text in enumerate(shown) if " parameters, " in text]
        before = [number for number in begins if number < place]
        assert "ab"[len(before)] == phase  # said just before the phase itself is described


# Where it is trained, and on which data


def lines_of(*settings: str, device: str = "cpu", ranks: Ranks | None = None) -> list[str]:
    recipe = recipes.load("cgs", settings)
    run = tiny_encoder()._replace(recipe=recipe)
    return lines_on_idle_settings(run, torch.device(device), ranks)


@pytest.mark.parametrize("field", ["threads=2", "max_graphs=2", "timeout=5", "distribute=sharded"])
def test_what_depends_on_where_it_is_trained(field):
    alone, gpu = lines_of(field), lines_of(field, device="cuda")
    two = lines_of(field, ranks=Ranks(rank=0, size=2))
    name = field.partition("=")[0]
    assert (alone == []) == (name == "threads")
    assert (gpu == []) == (name == "max_graphs")
    assert (two == []) == (name != "max_graphs")
    for line in (*alone, *gpu, *two):
        assert line.startswith(f"{name} = ")
    assert lines_of("max_graphs=2", "execution=eager", device="cuda") != []


def test_files_are_dealt_to_several_ranks():
    files = "files={train='/a.csv',dev='/b.csv'}"
    source = f"tasks.mood.source={{kind='regression',text=['t'],split_by_rank=true,{files}}}"
    text = "objectives.text={kind='simcse',split_by_rank=true,files=['/a.txt']}"
    given = ("train=['mood','text']", "tasks.mood.head=single", source, text)
    names = ("tasks.mood.source.split_by_rank", "objectives.text.split_by_rank")
    said = [line for line in lines_of(*given) if "split_by_rank" in line]
    assert said == [f"{name} = true: no effect, one process trains" for name in names]
    two = lines_of(*given, ranks=Ranks(rank=0, size=2))
    assert [line for line in two if "split_by_rank" in line] == []


def test_a_mean_needs_two_metrics():
    mean, two = "tasks.quora.decided_by=mean", "tasks.quora.metrics=['f1','accuracy']"
    said = 'tasks.quora.decided_by = "mean": no effect, quora has one metric'
    assert lines_of(mean) == [said]
    assert lines_of(mean, "tasks.quora.metrics=['f1']") == [said]
    assert lines_of(mean, two) == []
    assert lines_of("tasks.quora.decided_by=first") == []


FILES = "files={train='/a.csv',dev='/b.csv'}"


@pytest.mark.parametrize(
    ("source", "idle"),
    [
        (f"kind='regression',range=[0,1],{FILES}", []),
        (f"kind='regression',classes=3,{FILES}", ["classes"]),
        (f"kind='classification',classes=3,range=[0,1],{FILES}", ["range"]),
        (f"kind='regression',subset='x',splits={{train='y'}},{FILES}", ["subset", "splits"]),
        ("kind='regression',dataset='x',subset='x',splits={train='y'},id='n',label='l'", []),
        (f"kind='regression',{FILES},of_split={{dev={{id='n',quoting='none'}}}}", []),
        (
            f"kind='regression',{FILES},quoting='none',of_split={{dev={{id='',quoting='none'}}}}",
            ["of_split.dev.id", "of_split.dev.quoting"],
        ),
    ],
)
def test_sources(source, idle):
    settings = ("train=['mood']", "tasks.mood.head=single", "max_train_examples=0")
    lines = lines_of(*settings, f"tasks.mood.source={{text=['t'],{source}}}")
    found = [line.partition(" = ")[0] for line in lines if line.startswith("tasks.")]
    assert found == [f"tasks.mood.source.{name}" for name in idle]


def test_a_buffer_of_a_stream_that_is_not_trained():
    buffer = "tasks.mood.source.shuffle_buffer"
    source = "{kind='regression',text=['t'],dataset='x',streaming=true,shuffle_buffer=5}"
    settings = ("tasks.mood.head=single", f"tasks.mood.source={source}", "max_train_examples=0")
    trained = lines_of("train=['mood']", "max_steps=5", "balance=sum", *settings)
    assert trained == []
    assert lines_of(*settings) == [f"{buffer} = 5: no effect, mood is not trained"]


def write(run: Run, folder: Path) -> Path:
    run._replace(folder=folder).write()
    return folder


def test_a_data_folder_that_nothing_is_read_from(tmp_path):
    file = tmp_path / "mine.toml"
    head = 'data = "somewhere"\ntrain = ["mood"]\n[tasks.mood]\nhead = "single"\n'
    source = '[tasks.mood.source]\nkind = "regression"\ntext = ["t"]\nfiles = {train = "%s"}\n'
    for name, idle in (("/a.csv", True), ("a.csv", False)):
        file.write_text(head + source % name)
        run = tiny_encoder()._replace(recipe=recipes.load(str(file)))
        lines = lines_on_idle_settings(run, CPU)
        assert (
            lines == ['data = "somewhere": no effect, no file of a task is looked for there'] * idle
        )

        if idle:  # nor when it is scored
            options = [str(write(run, tmp_path / "run")), "--data", str(tmp_path)]
            with pytest.raises(InputError, match=r"--data .*: no file .* leave it out"):
                evaluate.main(options)


def test_the_lines_come_once_as_training_begins_and_not_from_a_runs_own_recipe(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = [
        *SMALL,
        "warmup=0",
        "phases.one.max_steps=1",
        "phases.two.max_steps=1",
        "balancing.cagrad_c=0.3",
    ]
    assert main(["demo", "--out", str(folder), "--set", *settings]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "no effect" in x]
    said = "balancing.cagrad_c = 0.3: no effect, balance = pcgrad does not read it here"
    of_data = "epochs = 3: no effect, max_steps = 1 ends training before"
    assert lines == ["max_steps = 2: no effect, every phase has its own", said, of_data]
    again = ["--out", str(tmp_path / "again"), "--dry-run"]
    assert main([str(folder / "recipe.toml"), *again]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "no effect" in x]
    assert sorted(lines) == sorted([said, "max_steps = 2: no effect, every phase has its own"])
