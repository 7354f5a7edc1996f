"""A step has a batch of every dataset, and trains as a loop of one's own does, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # what trains needs it
datasets = pytest.importorskip("datasets")
st = pytest.importorskip("sentence_transformers")

from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.base.training_args import BatchSamplers  # noqa: E402
from sentence_transformers.sentence_transformer import losses as st_losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

from kernels import (  # noqa: E402
    BalancedOptimizer,
    PCGrad,
    PCGradSentenceTransformerTrainer,
    accelerate,
    balancing,
)

from .test_balanced_trainer import assert_same_bits, logs  # noqa: E402
from .test_sentence_transformers_inputs import WORDS, save_tiny  # noqa: E402

# What the frameworks say about their own settings.
pytestmark = pytest.mark.filterwarnings("ignore")

RATE, BATCH = 0.01, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("roberta"), "roberta")


def new_model(folder: str) -> st.SentenceTransformer:
    transformer = Transformer(folder)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return st.SentenceTransformer(modules=[transformer, pooling], device="cpu")


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(4, len(WORDS), (count, 5), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in own) for own in picks]


def scored(count: int, seed: int = 0) -> Any:
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    columns = {"first": texts(count, seed), "second": texts(count, seed + 50)}
    return datasets.Dataset.from_dict({**columns, "score": scores})


def pairs(count: int, seed: int = 9) -> Any:
    columns = {"question": texts(count, seed), "answer": texts(count, seed + 50)}
    return datasets.Dataset.from_dict(columns)


def two() -> dict[str, Any]:
    return {"scores": scored(8), "pairs": pairs(4)}


def losses(model: st.SentenceTransformer) -> dict[str, nn.Module]:
    return {
        "scores": st_losses.CosineSimilarityLoss(model),
        "pairs": st_losses.MultipleNegativesRankingLoss(model),
    }


def settings(path: Path, **changed: Any) -> Any:
    given = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return st.SentenceTransformerTrainingArguments(str(path), **(given | changed))


OF_TRAINER = {
    *("train_dataset", "eval_dataset", "optimizers", "method", "seed", "tasks", "task_gradients"),
    "evaluator",
}


def trainer_of(
    model: st.SentenceTransformer, path: Path, loss: Any = None, **changed: Any
) -> PCGradSentenceTransformerTrainer:
    own = {"train_dataset": two()}
    own |= {name: changed.pop(name) for name in list(changed) if name in OF_TRAINER}
    loss = losses(model) if loss is None else loss
    return PCGradSentenceTransformerTrainer(model, settings(path, **changed), loss=loss, **own)


def loop_like(
    trainer: PCGradSentenceTransformerTrainer, epochs: int = 1, accumulate: int = 1, **options: Any
) -> list[dict[str, float]]:
    """Train the model of a trainer, which does not train, in a loop of one's own."""
    fresh: Any = trainer
    base = st.SentenceTransformerTrainer.create_optimizer(fresh)
    base = base.optimizer if isinstance(base, BalancedOptimizer) else base
    method = options.get("method")
    optimizer = PCGrad(base, seed=42) if method is None else BalancedOptimizer(base, method)
    model: Any = trainer.model
    model.train()
    logged = []
    for epoch in range(epochs):
        loader: Any = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        for number, batch in enumerate(loader, 1):
            found = {}
            for name, own in batch.items():
                name_of_own = own.pop("dataset_name")
                assert name_of_own == name
                features, labels = trainer.collect_features(own)
                loss = trainer.loss[name] if isinstance(trainer.loss, dict) else trainer.loss
                found[name] = loss(features, labels)
            optimizer.backward({name: loss / accumulate for name, loss in found.items()})
            logged.append({name: loss.item() for name, loss in found.items()})
            if number % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return logged


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [None, balancing.mgda])
def test_it_trains_as_a_loop_does(
    folder: str, tmp_path: Path, accumulate: int, packed: bool, method: Any
) -> None:
    trainers = []
    for _ in range(2):
        model = new_model(folder)
        if packed:
            accelerate(model)
        how = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 2}
        trainers.append(trainer_of(model, tmp_path, method=method, **how))
    trainers[0].train()
    found = loop_like(trainers[1], 2, accumulate, method=method)
    assert_same_bits(trainers[0].model, trainers[1].model)
    assert len(found) == 2 * 4  # as long as the longer dataset
    if accumulate == 1:
        for entry, own in zip(logs(trainers[0]), found, strict=True):
            assert entry["loss_scores"] == pytest.approx(own["scores"], rel=1e-5)
            assert entry["loss_pairs"] == pytest.approx(own["pairs"], rel=1e-5)
            assert entry["loss"] == pytest.approx(own["scores"] + own["pairs"], rel=1e-5)


def test_losses_train_their_own_parameters(folder: str, tmp_path: Path) -> None:
    labelled = pairs(8).add_column("label", [0, 1, 2, 1] * 2)
    trainers = []
    for _ in range(2):
        model = new_model(folder)
        width = model.get_embedding_dimension()
        torch.manual_seed(1)
        loss = losses(model) | {"pairs": st_losses.SoftmaxLoss(model, width, num_labels=3)}
        data = {"scores": scored(8), "pairs": labelled}
        trainers.append(trainer_of(model, tmp_path, loss, train_dataset=data))
    before = trainers[0].loss["pairs"].classifier.weight.clone()
    trainers[0].train()
    loop_like(trainers[1])
    assert not torch.equal(trainers[0].loss["pairs"].classifier.weight, before)
    assert_same_bits(trainers[0].loss["pairs"], trainers[1].loss["pairs"])


# ---- losses that go through the model again in the backward pass ---------------------------------


def cached(model: st.SentenceTransformer, kind: str) -> nn.Module:
    if kind == "plain":
        return st_losses.MultipleNegativesRankingLoss(model)
    loss = st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=1)
    return loss if kind == "cached" else st_losses.MatryoshkaLoss(model, loss, [8, 4])


@pytest.mark.parametrize("packed", [False, True])
def test_a_cached_losss_gradient_is_balanced(folder: str, tmp_path: Path, packed: bool) -> None:
    found = []
    for kind in ("plain", "cached"):
        model = new_model(folder)
        if packed:
            accelerate(model)
        loss = losses(model) | {"pairs": cached(model, kind)}
        trainer = trainer_of(model, tmp_path, loss, max_steps=1, optim="sgd", max_grad_norm=0.0)
        trainer.train()
        found.append((dict(model.named_parameters()), trainer.optimizer.optimizer.gram))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)


def test_a_cached_loss_within_another(folder: str, tmp_path: Path) -> None:
    """Two gradients, one by the plain backward pass and one by the trainer."""
    model = new_model(folder)
    loss = losses(model) | {"pairs": cached(model, "matryoshka")}
    trainer = trainer_of(model, tmp_path, loss, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    features, _ = trainer.collect_features(batch["pairs"])
    model.train()
    loss["pairs"](features, None).backward()
    square = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    trainer.train()
    torch.testing.assert_close(trainer.optimizer.optimizer.gram[1, 1], square, rtol=1e-4, atol=0)


# ---- batches -------------------------------------------------------------------------------------


def epochs_of(trainer: PCGradSentenceTransformerTrainer, count: int = 2) -> list[list[Any]]:
    """The texts of each step's batch, by dataset."""
    seen = []
    loader: Any = trainer.get_train_dataloader()
    collate = loader.collate_fn._collate
    collate.preprocess_fn = lambda inputs, **_: {"input_ids": inputs}
    for epoch in range(count):
        loader.set_epoch(epoch)
        steps = []
        for batch in loader:
            step = {}
            for name, own in batch.items():
                column = "first_input_ids" if name == "scores" else "question_input_ids"
                step[name] = own[column]
            steps.append(step)
        assert len(steps) == len(loader)
        seen.append(steps)
    return seen


def unique(count: int) -> dict[str, Any]:
    """Datasets of texts that are all different: 8 and `count`."""
    rows = {"first": [f"s{i}" for i in range(8)], "second": ["t"] * 8, "score": [0.5] * 8}
    own = {"question": [f"q{i}" for i in range(count)], "answer": [f"a{i}" for i in range(count)]}
    return {"scores": datasets.Dataset.from_dict(rows), "pairs": datasets.Dataset.from_dict(own)}


@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates"])
def test_the_shorter_dataset_begins_anew_shuffled(
    folder: str, tmp_path: Path, sampler: str
) -> None:
    data = unique(count=3)
    if sampler == "no_duplicates":  # "t" would be one
        data["scores"] = (
            data["scores"]
            .remove_columns("second")
            .add_column("second", [f"t{i}" for i in range(8)])
        )
    trainer = trainer_of(
        new_model(folder),
        tmp_path,
        train_dataset=data,
        batch_sampler=BatchSamplers(sampler),
        per_device_train_batch_size=1,
    )
    epochs = epochs_of(trainer)
    orders = []
    for steps in epochs:
        assert len(steps) == 8
        assert sorted(text for step in steps for text in step["scores"]) == [
            f"s{i}" for i in range(8)
        ]
        short = [text for step in steps for text in step["pairs"]]
        for begin in (0, 3):
            assert sorted(short[begin : begin + 3]) == ["q0", "q1", "q2"]
            orders.append(tuple(short[begin : begin + 3]))
        orders.append(tuple(step["scores"][0] for step in steps))
    assert len(set(orders)) > 4  # of two epochs, and of two passes in each
    again = epochs_of(trainer)
    assert again == epochs


def test_round_robin_ends_with_the_shortest(folder: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        new_model(folder),
        tmp_path,
        train_dataset=unique(count=3),
        multi_dataset_batch_sampler="round_robin",
    )
    for steps in epochs_of(trainer):
        assert [(len(step["scores"]), len(step["pairs"])) for step in steps] == [(2, 2), (2, 1)]


def test_prompts_by_dataset_and_one_loss_for_all(folder: str, tmp_path: Path) -> None:
    model = new_model(folder)
    data = {"one": scored(4), "other": scored(4, seed=3)}
    prompts = {"one": {"first": "it "}, "other": "hill "}
    loss = st_losses.CosineSimilarityLoss(model)
    trainer = trainer_of(model, tmp_path, loss, train_dataset=data, prompts=prompts)
    (batch, *_) = trainer.get_train_dataloader()
    assert (batch["one"]["first_input_ids"][:, 1] == WORDS.index("it")).all()
    assert (batch["other"]["second_input_ids"][:, 1] == WORDS.index("hill")).all()
    trainer.train()
    assert {"loss_one", "loss_other"} <= logs(trainer)[0].keys()


# ---- resuming and evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [2, 4, 6])
def test_a_resumed_run_has_the_same_bits(folder: str, tmp_path: Path, saved_at: int) -> None:
    """Within an epoch, between two, and within the second."""
    how = {"num_train_epochs": 2, "lr_scheduler_type": "linear"}
    whole = trainer_of(new_model(folder), tmp_path, save_strategy="steps", save_steps=2, **how)
    whole.train()
    resumed = trainer_of(new_model(folder), tmp_path / "again", **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert_same_bits(whole.model, resumed.model)
    for trainer in (whole, resumed):
        assert trainer.optimizer.param_groups[0]["drawn_orders"] == 8
    last = logs(whole)[-1]
    assert last == logs(resumed)[-1]


def test_evaluation_of_each_dataset(folder: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        new_model(folder),
        tmp_path,
        eval_dataset={"scores": scored(4, seed=5), "pairs": pairs(4, seed=6)},
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    for name in ("scores", "pairs"):
        entries = logs(trainer, f"eval_{name}_loss")
        assert len(entries) == 2
        theirs = st.SentenceTransformerTrainer(
            trainer.model,
            settings(tmp_path),
            eval_dataset=trainer.eval_dataset,
            loss=trainer.loss,
        )
        metrics = theirs.evaluate()
        assert entries[-1][f"eval_{name}_loss"] == metrics[f"eval_{name}_loss"]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": scored(4)}, "train_dataset: expected a dict of two or more"),
        ({"train_dataset": {"scores": scored(4)}}, "train_dataset: expected a dict of two or more"),
        ({"task_gradients": 2}, "task_gradients: each dataset has a forward pass of its own"),
        ({"tasks": ["a"]}, "tasks: are the names of the datasets"),
        ({"multi_dataset_batch_sampler": lambda *_, **__: None}, "multi_dataset_batch_sampler: a"),
    ],
)
def test_what_is_refused(folder: str, tmp_path: Path, given: Any, message: str) -> None:
    model = new_model(folder)
    loss = st_losses.CosineSimilarityLoss(model)
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, loss, **given)
