"""Training sets of a recipe: first examples, shares of the labels, sentences of any file."""

import numpy as np
import pytest
import torch

from engine.config import recipe as recipes
from engine.runs.run import begin
from engine.training.build import build_trainer
from engine.training.trainer import Trainer

from ..conftest import TINY


def training(folder, recipe: str, *settings: str) -> Trainer:
    run = begin(recipes.load(recipe, [*TINY, *settings]), folder / "run")
    return build_trainer(run, torch.device("cpu"))


def drawn(built: Trainer, task: str) -> np.ndarray:
    """The examples of one pass through a task's training set."""
    place = built.recipe.train.index(task)
    sampler = built.samplers[place]
    batches = [sampler.batch(step) for step in range(-(-len(sampler) // sampler.batch_size))]
    return np.unique(np.concatenate(batches))


def test_a_task_is_cut_to_the_examples_that_come_first(tmp_path):
    built = training(tmp_path, "demo", "max_train_examples=0", "tasks.quora.first_n=40")
    np.testing.assert_array_equal(drawn(built, "quora"), np.arange(40))
    assert len(drawn(built, "sst")) == len(built.train_sets[0])


def test_of_these_a_limit_takes_a_share_of_each_label(tmp_path):
    built = training(tmp_path, "demo", "max_train_examples=10", "tasks.quora.first_n=40")
    chosen = drawn(built, "quora")
    assert len(chosen) == 10
    assert chosen.max() < 40
    labels = built.train_sets[1].labels
    assert abs(labels[chosen].sum() - labels[:40].sum() / 4) < 1


def test_more_than_there_are_is_all(tmp_path):
    built = training(tmp_path, "demo", "max_train_examples=0", "tasks.sts.first_n=1000000")
    assert len(drawn(built, "sts")) == len(built.train_sets[2])


def test_simcse_takes_the_first_lines_of_any_file(tmp_path):
    lines = [f"the {noun} was {word}" for noun in ("plot", "film") for word in ("good", "bad")]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines))
    files = f"objectives.simcse.files=['{tmp_path}/lines.txt']"
    built = training(tmp_path, "mtb-cosine-simcse", files, "objectives.simcse.max_per_source=3")
    (sentences,) = built.train_sets
    decode = built.run.tokenizer.decode
    assert [decode(tokens[1:-1].tolist()) for tokens in sentences.sentences] == lines[:3]


def test_without_a_file_simcse_takes_the_tasks_own_sentences_up_to_its_limit(tmp_path):
    built = training(tmp_path, "mtb-cosine-simcse", "objectives.simcse.max_texts=500")
    (sentences,) = built.train_sets
    assert len(sentences) == 500


@pytest.mark.parametrize(
    ("task", "short", "sequences"),
    [("sst", 96, 50), ("quora", 96, 100), ("sts", 96, 100), ("cfimdb", 1, 100)],
)
def test_masked_lm_joins_the_short_sentences_of_some_examples(tmp_path, task, short, sequences):
    """In twos: of 100 examples, or the two of each pair; longer texts stay by themselves."""
    settings = (f"sentences_of=['{task}']", f"short={short}", "max_per_source=100")
    built = training(tmp_path, "superbert", *(f"objectives.masked_lm.{s}" for s in settings))
    assert len(built.train_sets[0]) == sequences


@pytest.mark.parametrize("how", ["list", "folder", "pattern", "address"])
def test_texts_of_several_files(tmp_path, how):
    (tmp_path / "texts").mkdir()
    lines = [f"the plot was number {number}" for number in range(6)]
    for number in range(3):
        text = "\n".join(lines[2 * number : 2 * number + 2])
        (tmp_path / f"texts/{number}.txt").write_text(text)
    (tmp_path / "texts/sub.txt").mkdir()
    names = {
        "list": [f"{tmp_path}/texts/{number}.txt" for number in range(3)],
        "folder": [f"{tmp_path}/texts"],
        "pattern": [f"{tmp_path}/texts/[01].txt", f"{tmp_path}/texts/2*"],
        "address": [f"file://{tmp_path}/texts/*.txt"],
    }[how]
    if how == "address":
        pytest.importorskip("fsspec")
    built = training(tmp_path, "mtb-cosine-simcse", f"objectives.simcse.files={names}")
    (sentences,) = built.train_sets
    decode = built.run.tokenizer.decode
    assert [decode(tokens[1:-1].tolist()) for tokens in sentences.sentences] == lines
