"""Recipes: what they say, how they are overridden, that they survive being written."""

import pytest

from engine.config import recipe as recipes
from engine.train import main
from engine.utils.errors import InputError


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_survives_being_written(name, tmp_path):
    recipe = recipes.load(name)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert recipes.load(str(tmp_path / "again.toml")) == recipe


OF_PAPERS = {
    # batch size, rate, epochs, dropout before the heads, sentence vector
    ("sst-finetune", "qqp-finetune", "sts-finetune", "vgs"): (32, 1e-5, 10, 0.5, "cls"),
    ("cgs", "superbert"): (32, 1e-5, 10, 0.5, "mean"),
    ("mtl-even", "mtl-main-aux", "mtl-cosine-para"): (32, 1e-4, 8, 0.3, "cls"),
    ("mtl-cosine-sts", "mtl-sbert", "mtl-sbert-ce"): (32, 1e-4, 8, 0.3, "cls"),
    ("sst-linear", "cfimdb-linear"): (8, 1e-3, 10, 0.3, "cls"),
    ("sst-full", "cfimdb-full"): (8, 1e-5, 10, 0.3, "cls"),
    ("mtb-cls",): (8, 1e-5, 5, 0.1, "cls"),
    ("mtb-cosine", "mtb-cosine-pals"): (8, 1e-5, 10, 0.3, "cls"),
    ("mtb-cosine-simcse", "mtb-cosine-simcse-pals"): (8, 1e-5, 10, 0.3, "cls"),
    ("bert-frozen", "bert-cos-wl", "bert-cos-grad"): (32, 1e-5, 10, 0.3, "cls"),
    ("bert-pears-wl", "bert-pears-grad"): (32, 1e-5, 10, 0.3, "cls"),
    ("three-phase", "three-phase-pretrained", "three-phase-lstm"): (160, 1e-5, 48, 0.1, "cls"),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for names, settings in OF_PAPERS.items() for name in names],
)
def test_a_system_has_its_papers_settings(name, settings):
    recipe = recipes.load(name)
    found = (recipe.batch_size, recipe.lr, recipe.epochs, recipe.dropout, recipe.pooling)
    assert found == settings
    assert recipe.optimizer == "adamw"
    assert recipe.weight_decay == (0.01 if name.startswith("three") else 0)  # else Adam
    assert (recipe.schedule, recipe.warmup, recipe.clip_norm) == ("constant", 0, 0)


def test_no_system_of_a_paper_is_left_out():
    assert {name for names in OF_PAPERS for name in names} == set(recipes.of_papers())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vgs", {"max_train_examples": 6016, "balance": "pcgrad"}),
        ("cgs", {"max_train_examples": 6016, "balance": "pcgrad"}),
        ("superbert", {"max_train_examples": 6016, "balance": "pcgrad"}),
        ("mtl-sbert-ce", {"max_train_examples": 0, "balance": "pcgrad"}),
        ("mtl-main-aux", {"balance": "main_aux"}),
        ("mtb-cosine", {"task_schedule": "cycle", "adapter_width": 0, "freeze_encoder": False}),
        ("mtb-cosine-pals", {"task_schedule": "cycle", "adapter_width": 204}),
        ("sst-linear", {"freeze_encoder": True}),
        ("cfimdb-full", {"freeze_encoder": False}),
        ("bert-frozen", {"freeze_encoder": True}),
        ("bert-cos-wl", {"freeze_encoder": False, "balance": "proportional"}),
        ("bert-pears-wl", {"freeze_encoder": False, "balance": "proportional"}),
        ("bert-cos-grad", {"freeze_encoder": False, "balance": "pcgrad"}),
        ("bert-pears-grad", {"freeze_encoder": False, "balance": "pcgrad"}),
    ],
)
def test_what_tells_a_system_from_others(name, settings):
    recipe = recipes.load(name)
    assert {key: getattr(recipe, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("vgs", ("single", "mean", "mean")),
        ("cgs", ("single", "concat", "cosine")),
        ("superbert", ("single", "concat", "cosine")),
        ("mtl-even", ("single", "concat", "concat")),
        ("mtl-main-aux", ("single", "concat", "concat")),
        ("mtl-cosine-para", ("single", "cosine", "concat")),
        ("mtl-cosine-sts", ("single", "distance", "cosine")),
        ("mtl-sbert", ("single", "difference", "difference")),
        ("mtl-sbert-ce", ("single", "difference", "difference")),
        ("mtb-cls", ("single", "concat", "concat")),
        ("mtb-cosine", ("single", "concat", "cosine_shifted")),
        ("mtb-cosine-simcse-pals", ("single", "concat", "cosine_shifted")),
        ("bert-cos-grad", ("single", "concat", "cosine")),
        ("bert-pears-grad", ("single", "concat", "pearson")),
        ("three-phase", ("single", "shared", "shared")),
        ("three-phase-lstm", ("bilstm", "shared", "shared")),
    ],
)
def test_a_system_has_its_papers_heads(name, heads):
    tasks = recipes.load(name).tasks
    assert tuple(tasks[task].head for task in ("sst", "quora", "sts")) == heads
    assert tasks["sts"].loss == ("cross_entropy" if name == "mtl-sbert-ce" else "default")


def test_the_masked_lm_of_superbert():
    recipe = recipes.load("superbert")
    text, pretrain = recipe.objectives["masked_lm"], recipe.in_phases["pretrain"]
    assert text.sentences_of == ("sst", "quora", "sts", "cfimdb")
    assert (text.kind, text.mask_share, text.max_per_source, text.join) == (
        "masked_lm",
        0.15,
        6016,
        2,
    )
    assert (pretrain.batch_size, pretrain.lr) == (8, 1e-5)


def test_the_main_task_and_its_auxiliaries():
    balancing = recipes.load("mtl-main-aux").balancing
    assert (balancing.main, balancing.aux_weight) == ("sst", 0.3)


def test_the_contrastive_phase():
    for name in ("mtb-cosine-simcse", "mtb-cosine-simcse-pals"):
        recipe = recipes.load(name)
        assert list(recipe.in_phases) == ["contrast", "finetune"]
        text = recipe.objectives["simcse"]
        assert (text.kind, text.temperature) == ("simcse", 0.05)
        assert text.max_per_source == text.max_texts == 25_000


def test_the_first_quora_pairs_and_all_of_the_rest():
    for name in (name for name in recipes.names() if name.startswith("mtb-")):
        recipe = recipes.load(name)
        first = {task: settings.first_n for task, settings in recipe.tasks.items()}
        assert (recipe.max_train_examples, first) == (0, {"sst": 0, "quora": 10_000, "sts": 0})


def test_three_phases():
    for name in ("three-phase-pretrained", "three-phase-lstm"):
        pretrain, heads, together = recipes.load(name).in_phases.values()
        (text,) = recipes.load(name).objectives.values()
        assert (text.kind, text.mask_share, pretrain.max_length) == ("masked_lm_next", 0.15, 512)
        assert (pretrain.batch_size, pretrain.lr, pretrain.epochs) == (16, 2e-5, 5)
        assert heads.freeze_encoder
        assert (heads.batch_size, heads.lr, heads.epochs) == (2048, 1e-3, 48)
        assert not together.freeze_encoder
        assert (together.batch_size, together.lr, together.epochs) == (160, 1e-5, 48)
    assert list(recipes.load("three-phase").in_phases) == ["heads", "all"]


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("lr=3e-4", "lr", 3e-4),
        ("epochs = 3", "epochs", 3),
        ("batch_size=8", "batch_size", 8),
        ("dropout=0", "dropout", 0),
        ("precision=bf16", "precision", "bf16"),
        ("precision=fp16", "precision", "fp16"),
        ("balance=sum", "balance", "sum"),
        ("optimizer=adamw", "optimizer", "adamw"),
        ("optimizer=lamb", "optimizer", "lamb"),
        ("micro_batches=4", "micro_batches", 4),
        ("checkpoint_layers=true", "checkpoint_layers", True),
        ("checkpoint_every=50", "checkpoint_every", 50),
        ("log_every=1", "log_every", 1),
        ("betas=[0.8, 0.99]", "betas", (0.8, 0.99)),
        ('data="a b"', "data", "a b"),
        ("data=/some/where", "data", "/some/where"),
    ],
)
def test_any_field_can_be_set(override, field, value):
    assert getattr(recipes.load("cgs", [override]), field) == value


def test_nested_fields_can_be_set():
    recipe = recipes.load("cgs", ["tasks.quora.head=difference", "encoder.hidden_size=64"])
    assert recipe.tasks["quora"].head == "difference"
    assert recipe.tasks["sts"].head == "cosine"
    assert recipe.encoder.hidden_size == 64


def test_what_an_override_quotes_it_reads_back():
    for value in ("plain", 'with "quotes"', "back\\slash", "", "line\nbreak"):
        assert recipes.load("cgs", [recipes.override("description", value)]).description == value


def test_an_empty_text_is_set_by_its_quotes():
    assert recipes.load("cgs", ["init=some", 'init=""']).init == ""


def test_list_shows_every_recipe(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("tasks.sst.batch_size=4", "sst has a batch_size"),
        ("objectives.text={kind='masked_lm',tokens_per_batch=200}", "text has a tokens_per_batch"),
    ],
)
def test_a_power_of_the_sizes_decides_all_batches(setting, field):
    given = ["objectives.text.kind=masked_lm", "train=['text','sst']", setting]
    recipes.load("demo", given)
    message = f"sampling_alpha = 0.5: decides all batches of a step, and {field} of its own; leave"
    with pytest.raises(InputError, match=message):
        recipes.load("demo", [*given, "sampling_alpha=0.5"])
    recipes.load("demo", [*given, "sampling_alpha=0.5", "task_schedule=sampled"])
