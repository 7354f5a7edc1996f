"""Names of tasks, objectives and phases in another table than their own."""

import pytest

from engine.config import recipe as recipes
from engine.utils.errors import InputError


@pytest.mark.parametrize(
    ("base", "key", "expected"),
    [
        ("cgs", "objectives.sts.batch_size", "sts is a task; did you mean tasks.sts.batch_size?"),
        ("cgs", "phases.sts.batch_size", "sts is a task; did you mean tasks.sts.batch_size? A"),
        ("cgs", "phases.sts.head", "sts is a task; did you mean tasks.sts.head?"),
        ("cgs", "balancing.sts.weight", "sts is a task; did you mean tasks.sts.weight?"),
        ("cgs", "balancing.sts", "did you mean balancing.preferences.sts or tasks.sts.weight?"),
        ("cgs", "sts.batch_size", "sts is a task; did you mean tasks.sts.batch_size?"),
        ("cgs", "sts", "sts is a task, whose fields stand below tasks.sts;"),
        ("cgs", "objectives.sts.lr", "sts is a task, whose fields stand below tasks.sts;"),
        ("cgs", "tasks.stts.batch_size", "tasks.stts: no such task; did you mean sts?; a new one"),
        ("cgs", "tasks.mood.weight", "tasks.mood: no such task; known: sst, quora, sts; a new one"),
        ("cgs", "objectives.mood.weight", "objectives.mood.kind: missing; give it a value"),
        (
            *("superbert", "tasks.masked_lm.batch_size"),
            "masked_lm is an objective; did you mean objectives.masked_lm.batch_size?",
        ),
        (
            *("superbert", "phases.masked_lm.weight"),
            "masked_lm is an objective; did you mean objectives.masked_lm.weight?",
        ),
        (
            *("superbert", "masked_lm.weight"),
            "masked_lm is an objective; did you mean objectives.masked_lm.weight?",
        ),
        ("superbert", "tasks.pretrain.lr", "pretrain is a phase; did you mean phases.pretrain.lr?"),
        ("superbert", "objectives.pretrain.lr", "did you mean phases.pretrain.lr?"),
        ("superbert", "pretrain.lr", "pretrain is a phase; did you mean phases.pretrain.lr?"),
    ],
)
def test_the_line_names_the_table_that_was_meant(base, key, expected):
    with pytest.raises(InputError) as error:
        recipes.load(base, [f"{key}=8"])
    assert expected in str(error.value)
    assert len(str(error.value)) < 200


def test_other_faults_of_a_new_task_come_first():
    with pytest.raises(InputError, match=r"unknown key tasks\.mood\.heads; did you mean head\?"):
        recipes.load("cgs", ["tasks.mood.heads=single"])


def test_a_phase_may_have_the_name_of_a_task():
    recipe = recipes.load("cgs", ['phases.sts.train=["sts"]', "phases.sts.batch_size=8"])
    assert recipe.in_phases["sts"].batch_size == 8


def test_a_phase_of_the_file_may_too(tmp_path):
    file = tmp_path / "mine.toml"
    text = recipes.load("cgs").to_toml()
    file.write_text(text.replace("[phases]", "[phases.sts]\nlr = 1e-3"))
    assert recipes.load(str(file), ["phases.sts.batch_size=8"]).in_phases["sts"].batch_size == 8
