"""PCGradTrainer trains as a loop of one's own does, to the bit, with all of Trainer's settings."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers' Trainer needs it

from transformers import Trainer  # noqa: E402

from kernels import (  # noqa: E402
    BalancedOptimizer,
    PackingCollator,
    PCGrad,
    PCGradTrainer,
    TaskGradients,
    accelerate,
    balancing,
)

# What the frameworks say about their own settings.
pytestmark = pytest.mark.filterwarnings("ignore")

RATE, STEPS, BATCH = 0.05, 4, 4


class Two(nn.Module):
    """Two conflicting tasks on a shared layer, and a head that one task reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.shared(x)
        first = (hidden - torch.tensor([1.0, 2.0, 0.0])).square().mean()
        second = (self.head(hidden) - torch.tensor([-1.0, 2.0, 1.0])).abs().mean()
        return {"loss": {"a": first, "b": second}, "hidden": hidden}


def rows(count: int = STEPS * BATCH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": row} for row in torch.randn(count, 3, generator=generator)]


def stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}


def settings(folder: Path, **changed: Any) -> Any:
    given = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return hf.TrainingArguments(folder, **(given | changed))


def in_order(kind: type[PCGradTrainer]) -> type[PCGradTrainer]:
    """Leave the examples in their order, as the loops below take them."""

    class InOrder(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> None:
            return None

    return InOrder


def trainer_of(
    model: nn.Module, folder: Path, kind: type = PCGradTrainer, /, **changed: Any
) -> PCGradTrainer:
    own = {"train_dataset": rows(), "data_collator": stacked}
    own |= {name: changed.pop(name) for name in list(changed) if name in OF_TRAINER}
    return in_order(kind)(model, settings(folder, **changed), **own)


OF_TRAINER = {
    *("train_dataset", "data_collator", "eval_dataset", "optimizers", "compute_loss_func"),
    *("compute_metrics", "model_init", "callbacks"),
    *("method", "granularity", "reduction", "seed", "tasks", "task_gradients"),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Make Trainer's optimizer: two groups, of which biases are the second."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0, fused=True)


PCGRAD = partial(PCGrad, seed=42)  # Trainer's seed


def plain_loop(
    make: Callable[[torch.optim.Optimizer], BalancedOptimizer] = PCGRAD,
    accumulate: int = 1,
    clip: float = 1.0,
) -> tuple[Two, list[dict[str, float]]]:
    """Train in a loop of one's own; return the model and each step's losses."""
    model = Two()
    optimizer = make(adamw(model))
    data, logged, number = rows(), [], 0
    for _ in range(STEPS // accumulate):
        summed = {"a": 0.0, "b": 0.0}
        for _ in range(accumulate):
            losses = model(stacked(data[number : number + BATCH])["x"])["loss"]
            number += BATCH
            optimizer.backward({task: loss / accumulate for task, loss in losses.items()})
            summed = {task: summed[task] + losses[task].item() / accumulate for task in losses}
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        logged.append(summed)
    return model, logged


def assert_same_bits(left: nn.Module, right: nn.Module) -> None:
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other), name


def logs(trainer: PCGradTrainer, key: str = "loss") -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if key in entry]


# ---- as a loop of one's own ----------------------------------------------------------------------

METHODS = {
    "pcgrad": ({}, PCGRAD),
    "seed": ({"seed": 3}, partial(PCGrad, seed=3)),
    "sum by tensor": (
        {"reduction": "sum", "granularity": "tensor"},
        partial(PCGrad, reduction="sum", granularity="tensor", seed=42),
    ),
    "cagrad": ({"method": balancing.cagrad}, partial(BalancedOptimizer, method=balancing.cagrad)),
}


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_as_a_loop_does(tmp_path: Path, method: str) -> None:
    given, make = METHODS[method]
    trainer = trainer_of(Two(), tmp_path, **given)
    trainer.train()
    model, losses = plain_loop(make)
    assert_same_bits(trainer.model, model)
    for entry, own in zip(logs(trainer), losses, strict=True):
        assert entry["loss_a"] == pytest.approx(own["a"], rel=1e-6)
        assert entry["loss_b"] == pytest.approx(own["b"], rel=1e-6)
        assert entry["loss"] == pytest.approx(own["a"] + own["b"], rel=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up(tmp_path: Path, accumulate: int) -> None:
    trainer = trainer_of(
        Two(),
        tmp_path,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS // accumulate,
        logging_steps=STEPS // accumulate,
    )
    trainer.train()
    model, losses = plain_loop(accumulate=accumulate)
    assert_same_bits(trainer.model, model)
    (entry,) = logs(trainer)
    mean = sum(own["a"] for own in losses) / len(losses)
    assert entry["loss_a"] == pytest.approx(mean, rel=1e-6)
    assert entry["loss"] == pytest.approx(entry["loss_a"] + entry["loss_b"], rel=1e-6)


def test_an_epochs_last_step_has_fewer_micro_batches(tmp_path: Path) -> None:
    """Trainer then divides by their number; three batches make a step of two and one of one."""
    trainer = trainer_of(
        Two(),
        tmp_path,
        train_dataset=rows(3 * BATCH),
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    model = Two()
    optimizer = PCGrad(adamw(model), seed=42)
    x = stacked(rows(3 * BATCH))["x"].split(BATCH)
    for micro_batches in (x[:2], x[2:]):
        for own in micro_batches:
            losses = model(own)["loss"].values()
            optimizer.pc_backward([loss / len(micro_batches) for loss in losses])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(trainer.model, model)


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_gradients_are_clipped_when_they_are_combined(tmp_path: Path, clip: float) -> None:
    trainer = trainer_of(Two(), tmp_path, max_grad_norm=clip)
    trainer.train()
    assert_same_bits(trainer.model, plain_loop(clip=clip or float("inf"))[0])
    assert all((entry["grad_norm"] > 0.05) for entry in logs(trainer)[:2])


class InOrderOfTasks(PCGradTrainer):
    """Returns the losses in a list."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        outputs = model(inputs["x"])
        losses = list(outputs["loss"].values())
        return (losses, outputs) if return_outputs else losses


@pytest.mark.parametrize(("tasks", "names"), [(["a", "b"], "ab"), (None, "01")])
def test_losses_in_a_list(tmp_path: Path, tasks: list[str] | None, names: str) -> None:
    trainer = trainer_of(
        Two(), tmp_path, InOrderOfTasks, gradient_accumulation_steps=2, max_steps=2, tasks=tasks
    )
    trainer.train()
    assert_same_bits(trainer.model, plain_loop(accumulate=2)[0])
    assert {f"loss_{name}" for name in names} <= logs(trainer)[0].keys()


def test_losses_in_a_list_for_an_optimizer_with_names(tmp_path: Path) -> None:
    model = Two()
    optimizer = PCGrad(adamw(model), seed=42, tasks=["a", "b"])
    trainer = trainer_of(model, tmp_path, InOrderOfTasks, optimizers=(optimizer, None))
    trainer.train()
    assert_same_bits(model, plain_loop()[0])
    assert {"loss_a", "loss_b"} <= logs(trainer)[0].keys()


def test_compute_loss_func_gets_the_number_of_items(tmp_path: Path) -> None:
    """Trainer leaves the division to the function, which gets the items of all micro-batches."""
    counts = []

    class Hidden(Two):
        def forward(self, x: Tensor, **_: Any) -> dict[str, Any]:
            outputs = super().forward(x)
            return {"losses": outputs["loss"]}

    def losses_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> dict[str, Tensor]:
        counts.append(int(num_items_in_batch))
        share = len(labels) / num_items_in_batch
        return {task: loss * share for task, loss in outputs["losses"].items()}

    labelled = [row | {"labels": torch.tensor(1)} for row in rows()]
    trainer = trainer_of(
        Hidden(),
        tmp_path,
        train_dataset=labelled,
        compute_loss_func=losses_of,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer.train()
    assert counts == [2 * BATCH] * STEPS
    assert_same_bits(trainer.model, plain_loop(accumulate=2)[0])


class Now(PCGradTrainer):
    """Leaves the second task out in every other batch."""

    number = 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        losses = model(inputs["x"])["loss"]
        self.number += 1
        return losses if self.number % 2 else {"b": None, "a": losses["a"]}


def test_a_task_may_have_no_loss_in_a_batch(tmp_path: Path) -> None:
    trainer = trainer_of(Two(), tmp_path, Now, logging_steps=2)
    trainer.train()
    model = Two()
    optimizer = PCGrad(adamw(model), seed=42)
    found = []
    for number, x in enumerate(stacked(rows())["x"].split(BATCH)):
        losses = model(x)["loss"]
        optimizer.pc_backward(losses if number % 2 == 0 else {"a": losses["a"]})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses)
    assert_same_bits(trainer.model, model)
    first = logs(trainer)[0]
    assert first["loss_a"] == pytest.approx((found[0]["a"] + found[1]["a"]).item() / 2, rel=1e-6)
    assert first["loss_b"] == pytest.approx(found[0]["b"].item(), rel=1e-6)  # of the step with one


@pytest.mark.parametrize("wrapped", [False, True])
def test_optimizers_of_ones_own(tmp_path: Path, wrapped: bool) -> None:
    model = Two()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if wrapped:
        optimizer = PCGrad(optimizer, seed=42)
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, scheduler))
    trainer.train()
    assert_same_bits(model, plain_loop()[0])
    inner = trainer.optimizer.optimizer  # in accelerate's
    assert inner is optimizer if wrapped else inner.optimizer is optimizer


def test_training_twice_wraps_once(tmp_path: Path) -> None:
    trainer = trainer_of(Two(), tmp_path)
    trainer.train()
    trainer.train()
    balanced = trainer.optimizer.optimizer
    assert isinstance(balanced, PCGrad)
    assert isinstance(balanced.optimizer, torch.optim.AdamW)
    assert balanced.param_groups[0]["drawn_orders"] == 2 * STEPS


def test_a_class_of_ones_own_behind_another_trainer(tmp_path: Path) -> None:
    class Other(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(inputs["x"])["loss"]

    class Both(PCGradTrainer, Other):
        pass

    trainer = trainer_of(Two(), tmp_path, Both)
    trainer.train()
    assert_same_bits(trainer.model, plain_loop()[0])


def test_losses_computed_twice_in_a_step_are_refused(tmp_path: Path) -> None:
    """As trainers do that add the loss of changed inputs."""

    class Twice(hf.Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
            first, second = (self.compute_loss(model, inputs) for _ in range(2))
            self.accelerator.backward(first + second)
            return (first + second).detach()

    class Mine(PCGradTrainer, Twice):
        pass

    with pytest.raises(ValueError, match="compute_loss: called twice in a training step"):
        trainer_of(Two(), tmp_path, Mine).train()


def test_a_loss_assigned_to_the_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(Two(), tmp_path)
    assigned = lambda model, inputs, **_: model(inputs["x"])["loss"]  # noqa: E731
    trainer.compute_loss = assigned  # type: ignore[method-assign]
    trainer.train()
    assert trainer.compute_loss is assigned
    assert_same_bits(trainer.model, plain_loop()[0])


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, accumulate: int) -> None:
    how = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": accumulate,
        "lr_scheduler_type": "linear",
        "train_dataset": rows(6 * BATCH),
    }

    def train(folder: Path, **more: Any) -> PCGradTrainer:
        own = {"data_collator": stacked, "train_dataset": how["train_dataset"]}
        given = {name: value for name, value in how.items() if name != "train_dataset"}
        resumed = more.pop("resume", None)
        trainer = PCGradTrainer(Two(), settings(folder, **given, **more), **own)  # shuffled
        trainer.train(resume_from_checkpoint=resumed)
        return trainer

    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_bits(whole.model, resumed.model)
    drawn = 12  # an order for each micro-batch
    for trainer in (whole, resumed):
        assert trainer.optimizer.param_groups[0]["drawn_orders"] == drawn
    assert logs(whole)[-1] == logs(resumed)[-1]
    last = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert "loss_a" in last["log_history"][-1]


# ---- mixed precision -----------------------------------------------------------------------------


def test_bf16(tmp_path: Path) -> None:
    trainer = trainer_of(Two(), tmp_path, bf16=True)
    trainer.train()
    model = Two()
    optimizer = PCGrad(adamw(model), seed=42)
    for x in stacked(rows())["x"].split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(x)["loss"]
        optimizer.pc_backward({task: loss.float() for task, loss in losses.items()})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(trainer.model, model)


def test_a_gradient_scaler(tmp_path: Path) -> None:
    """As on a GPU with fp16; its powers of 2 leave the bits alone."""
    trainer = trainer_of(Two(), tmp_path, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    model, losses = plain_loop(clip=float("inf"))
    assert_same_bits(trainer.model, model)
    for entry, own in zip(logs(trainer), losses, strict=True):
        assert entry["loss_a"] == pytest.approx(own["a"], rel=1e-6)
        assert entry["loss"] == pytest.approx(own["a"] + own["b"], rel=1e-6)


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluation_has_the_sum_and_each_loss(tmp_path: Path) -> None:
    data = rows(6)  # the last batch is smaller
    trainer = trainer_of(Two(), tmp_path, eval_dataset=data, label_names=[])
    metrics = trainer.evaluate()
    parts = [Two()(stacked(part)["x"])["loss"] for part in (data[:4], data[4:])]
    for task in ("a", "b"):
        mean = (4 * parts[0][task] + 2 * parts[1][task]).item() / 6
        assert metrics[f"eval_loss_{task}"] == pytest.approx(mean, rel=1e-6)
    both = metrics["eval_loss_a"] + metrics["eval_loss_b"]
    assert metrics["eval_loss"] == pytest.approx(both, rel=1e-6)
    assert trainer.predict(data).predictions.shape == (6, 3)


def test_evaluation_while_training_with_datasets_by_name(tmp_path: Path) -> None:
    trainer = trainer_of(
        Two(),
        tmp_path,
        eval_dataset={"one": rows(6), "two": rows(3)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_two_loss_b",
        greater_is_better=False,
    )
    trainer.train()
    entries = logs(trainer, "eval_one_loss_a")
    assert len(entries) == STEPS // 2
    assert all("eval_two_loss_b" in entry for entry in logs(trainer, "eval_two_loss"))
    best = min(entry["eval_two_loss_b"] for entry in logs(trainer, "eval_two_loss_b"))
    assert trainer.evaluate(rows(3))["eval_loss_b"] == pytest.approx(best, rel=1e-6)


# ---- one forward pass for all tasks, packed ------------------------------------------------------

WORDS, EACH = 40, 2


class TwoHeads(nn.Module):
    """A transformers BERT with a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = hf.BertConfig(vocab_size=WORDS, intermediate_size=32, **sizes)
        self.bert = hf.BertModel(config)
        self.heads = nn.ModuleList(nn.Linear(16, classes) for classes in (3, 2))

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        self.bert.gradient_checkpointing_enable(**settings)


def texts() -> list[list[dict[str, Any]]]:
    """Examples of both tasks: one each."""
    generator = torch.Generator().manual_seed(2)

    def text(classes: int) -> dict[str, Any]:
        length = int(torch.randint(2, 9, (), generator=generator))
        ids = torch.randint(1, WORDS, (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": int(torch.randint(classes, (), generator=generator))}

    return [[text(3), text(2)] for _ in range(STEPS * EACH)]


def joined(examples: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    """Pack the texts of the first task, then those of the second."""
    return PackingCollator()([text for task in zip(*examples, strict=True) for text in task])


def losses_of(model: TwoHeads, batch: Mapping[str, Any], tasks: TaskGradients | None) -> Any:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"].split(EACH)

    def losses() -> dict[str, Tensor]:
        pooled = model.bert(**inputs).pooler_output.split(EACH)
        found = {}
        for number, head in enumerate(model.heads):
            if tasks is None:
                found[str(number)] = F.cross_entropy(head(pooled[number]), labels[number])
                continue
            with tasks.task(number):
                found[str(number)] = F.cross_entropy(head(pooled[number]), labels[number])
        return found

    if tasks is None:
        return losses()
    with tasks.batch([EACH, EACH]):
        return losses()


class Joined(PCGradTrainer):
    """One packed forward pass for both tasks."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        losses = losses_of(model, inputs, self.task_gradients)
        return (losses, ()) if return_outputs else losses


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_packed_pass_for_all_tasks(tmp_path: Path, accumulate: int, checkpointed: bool) -> None:
    model = TwoHeads()
    accelerate(model.bert)
    trainer = trainer_of(
        model,
        tmp_path,
        Joined,
        train_dataset=texts(),
        data_collator=joined,
        per_device_train_batch_size=EACH,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS // accumulate,
        per_device_eval_batch_size=EACH,
        eval_dataset=texts()[:EACH],
        eval_strategy="steps",  # between the steps, which it must not change
        eval_steps=1,
        task_gradients=2,
        gradient_checkpointing=checkpointed,
    )
    trainer.train()
    twin = TwoHeads()
    accelerate(twin.bert)
    if checkpointed:  # as transformers then sets a hook there, with which embeddings are not fused
        twin.bert.get_input_embeddings().register_forward_hook(lambda *_: None)
    tasks = TaskGradients(twin, 2)
    optimizer = PCGrad(trainer_like_adamw(trainer, twin), task_gradients=tasks, seed=42)
    data = texts()
    for number in range(STEPS):
        losses = losses_of(twin, joined(data[number * EACH : (number + 1) * EACH]), tasks)
        optimizer.pc_backward({task: loss / accumulate for task, loss in losses.items()})
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(model, twin)
    assert {"eval_loss", "eval_loss_0", "eval_loss_1"} <= logs(trainer, "eval_loss")[0].keys()


def trainer_like_adamw(trainer: PCGradTrainer, twin: nn.Module) -> torch.optim.Optimizer:
    """AdamW with Trainer's parameter groups, of another model."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    own = dict(twin.named_parameters())
    groups = [
        {"params": [own[names[id(p)]] for p in group["params"]]}
        for group in trainer.optimizer.param_groups
    ]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0, fused=True)


def test_an_accelerated_model_without_task_gradients(tmp_path: Path) -> None:
    """A backward pass for each task; the gradients are those of one for all."""
    found = []
    for collects in (False, True):
        model = TwoHeads()
        accelerate(model.bert)
        given = {"task_gradients": TaskGradients(model, 2)} if collects else {}
        how = {"train_dataset": texts(), "data_collator": joined, "optim": "sgd", "max_steps": 1}
        how |= {"per_device_train_batch_size": EACH}
        trainer_of(model, tmp_path, Joined, **how, **given).train()
        found.append(model.state_dict())
    torch.testing.assert_close(*found)


# ---- errors --------------------------------------------------------------------------------------


class Single(PCGradTrainer):
    """Returns one loss."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return sum(model(inputs["x"])["loss"].values())


class Vectors(PCGradTrainer):
    """Returns one loss for each example."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return {"a": model(inputs["x"])["hidden"].sum(1)}


class Nothing(PCGradTrainer):
    """Returns no loss."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return {"a": None}


class Outputs(PCGradTrainer):
    """Returns outputs where none are asked for."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(inputs["x"])["loss"], {}


class NoOutputs(PCGradTrainer):
    """Returns none where they are."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(inputs["x"])["loss"]


def test_outputs_that_evaluation_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \(losses, outputs\).*got a dict"):
        trainer_of(Two(), tmp_path, NoOutputs).evaluate(rows(4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Single, r"compute_loss: expected one loss for each task.*got a single loss"),
        (Vectors, r"compute_loss: expected a scalar for each task, 'a' is \[4\]"),
        (Nothing, "no task has a loss"),
        (Outputs, r"expected a scalar for each task, '0' is a dict"),
    ],
)
def test_losses_that_cannot_be_balanced(tmp_path: Path, kind: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(Two(), tmp_path, kind).train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": balancing.cagrad, "seed": 1}, "seed: is PCGrad's"),
        ({"method": balancing.cagrad, "reduction": "sum"}, "reduction: is PCGrad's"),
        ({"optim": "adalomo"}, "optim: adalomo steps within the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "optim: galore_adamw_layerwise steps within"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(Two(), tmp_path, **given)


@pytest.mark.parametrize("given", [{"seed": 1}, {"tasks": ["a"]}, {"method": balancing.mgda}])
def test_an_optimizer_with_settings_of_its_own_takes_no_others(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    model = Two()
    with pytest.raises(ValueError, match=f"{next(iter(given))}: the optimizer in optimizers"):
        trainer_of(model, tmp_path, optimizers=(PCGrad(adamw(model)), None), **given)


def test_several_gpus_are_refused(tmp_path: Path) -> None:
    given = settings(tmp_path)
    given._setup_devices  # noqa: B018  (sets the number)
    given._n_gpu = 2
    with pytest.raises(ValueError, match="not with 2 GPUs in DataParallel"):
        PCGradTrainer(Two(), given)


@pytest.mark.parametrize("what", ["DeepSpeed", "FSDP"])
def test_sharded_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    created = Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        created(self)
        setattr(self, f"is_{what.lower()}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=f"on one device of each process, not with {what}"):
        PCGradTrainer(Two(), settings(tmp_path))


def test_task_gradients_and_model_init(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give model, not model_init"):
        trainer_of(None, tmp_path, model_init=Two, task_gradients=2)


def test_model_init_makes_a_new_optimizer(tmp_path: Path) -> None:
    trainer = trainer_of(None, tmp_path, model_init=Two)
    trainer.train()
    trainer.train()
    assert_same_bits(trainer.model, plain_loop()[0])


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    model = TwoHeads()
    trainer = trainer_of(
        model,
        tmp_path,
        Joined,
        train_dataset=texts(),
        data_collator=joined,
        per_device_train_batch_size=EACH,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    accelerate(model.bert)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer.train()
