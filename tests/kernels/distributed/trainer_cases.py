"""Runs of PCGradTrainer on ranks; each rank runs all of them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

from kernels import PCGradTrainer, TaskGradients

from .plain_loop import EACH, LR, alone, pcgrad
from .sentence_cases import every_dataset
from .training import STEPS, TASKS, Batch, Examples, Model, batches, digest, error, model

NAMES = [str(task) for task in range(TASKS)]


class ByName(nn.Module):
    """Returns what Trainer takes, losses by name among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: Tensor, targets: Tensor, lacks: Sequence[str] = ()) -> dict[str, Any]:
        """``tokens [N, TASKS, 4]``, ``targets [N, TASKS]``; some tasks may have no loss."""
        batch = [Examples(tokens[:, task], targets[:, task]) for task in range(TASKS)]
        losses = dict(zip(NAMES, self.inner(batch), strict=True))
        return {"loss": {name: loss for name, loss in losses.items() if name not in lacks}}


def rows(data: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Return the examples of all batches, one of each task in a row."""
    found = []
    for batch in data:
        tokens = torch.stack([own.tokens for own in batch], 1)
        targets = torch.stack([own.targets for own in batch], 1)
        found += [{"tokens": t, "targets": y} for t, y in zip(tokens, targets, strict=True)]
    return found


def stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows."""
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}


def settings(folder: str, **changed: Any) -> Any:
    """Return training arguments that change nothing of the plain loop."""
    given = {
        **{"learning_rate": LR, "lr_scheduler_type": "constant", "max_steps": STEPS},
        **{"per_device_train_batch_size": EACH, "per_device_eval_batch_size": EACH},
        **{"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True},
        **{"disable_tqdm": True, "remove_unused_columns": False, "max_grad_norm": 1e9},
    }
    return hf.TrainingArguments(folder, **(given | changed))


class InOrder(PCGradTrainer):
    """Leaves the examples in their order, as the loop of one process takes them."""

    def _get_train_sampler(self, *_: Any) -> None:
        return None


def trainer(
    folder: str,
    kind: type[PCGradTrainer] = InOrder,
    own: nn.Module | None = None,
    data: Sequence[Batch] | None = None,
    more: dict[str, Any] | None = None,
    **changed: Any,
) -> PCGradTrainer:
    """Make a trainer with the plain loop's optimizer."""
    own = ByName() if own is None else own
    optimizer = torch.optim.SGD(own.parameters(), LR, momentum=0.9)
    data = batches([EACH * dist.get_world_size()] * TASKS) if data is None else data
    given = {"train_dataset": rows(data), "data_collator": stacked, "seed": 0} | (more or {})
    return kind(own, settings(folder, **changed), optimizers=(optimizer, None), **given)


def in_order(**changed: Any) -> dict[str, Any]:
    """Train all steps; compare with one process, and its logged losses with the mean of ranks."""
    clip = changed.get("max_grad_norm")
    accumulate = changed.get("gradient_accumulation_steps", 1)
    changed["per_device_train_batch_size"] = EACH // accumulate
    sizes = [EACH * dist.get_world_size()] * TASKS
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder, more={"eval_dataset": rows(batches(sizes)[:1])}, **changed)
        made.train()
        evaluated = made.evaluate()
    assert type(made.model_wrapped).__name__ == "DistributedDataParallel"
    own: Any = made.model
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    with torch.no_grad():
        before = [float(loss) for loss in model()(batches(sizes)[0])]  # type: ignore[arg-type]
        after = [float(loss) for loss in own.inner(batches(sizes)[0])]
    like = in_bf16 if changed.get("bf16") else alone(pcgrad, clip)
    return error(own.inner, like, batches(sizes)) | {
        "logged": [[entry[f"loss_{name}"] for name in NAMES] for entry in logged],
        "sums": [entry["loss"] for entry in logged],
        "evaluated": [evaluated[f"eval_loss_{name}"] for name in NAMES],
        "before": before,
        "after": after,
    }


def in_bf16(own: Model) -> Callable[[Model, Batch], None]:
    """Return the step of one process in mixed precision, but for the one in float64."""
    step = alone(pcgrad)(own)
    is_mixed = own.norm.weight.dtype == torch.float32

    def mixed(own: Model, batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            step(own, batch)

    return mixed


# ---- numbers of items ----------------------------------------------------------------------------


def items_of(losses_of: str) -> Callable[[], dict[str, Any]]:
    """Divide sums of losses by the items of all ranks, of which the ranks have other numbers."""

    def case() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(
                folder,
                own=Hidden(),
                more={"compute_loss_func": per_item, "data_collator": labelled(losses_of)},
                max_steps=1,
            )
            made.train()
        own: Any = made.model
        result = {"digest": digest(own), "logged": made.state.log_history[0]["loss"]}
        if dist.get_rank() > 0:
            return result
        wanted = Hidden()
        optimizer = pcgrad(wanted.parameters(), process_group=None)
        data = rows(batches([EACH * dist.get_world_size()] * TASKS)[:1])
        halves = [
            labelled(losses_of, rank)(data[rank * EACH : (rank + 1) * EACH])
            for rank in range(dist.get_world_size())
        ]
        batch = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        items = batch["labels"].ne(-100).sum()
        losses = per_item(wanted(**batch), batch["labels"], items)
        total = sum(float(loss.detach()) for loss in losses.values() if loss is not None)
        optimizer.pc_backward(losses)
        optimizer.step()
        return result | {
            "wanted": total,
            "error": max(
                float((a - b).abs().max())
                for a, b in zip(own.parameters(), wanted.parameters(), strict=True)
            ),
        }

    return case


class Hidden(nn.Module):
    """Gives the errors of all tasks, ``[N, TASKS]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: Tensor, targets: Tensor, labels: Any = None) -> dict[str, Tensor]:
        """As :class:`ByName`."""
        outputs = [
            head(self.inner.hidden(tokens[:, task]))[:, 0]
            for task, head in enumerate(self.inner.heads)
        ]
        return {"errors": (torch.stack(outputs, 1) - targets).square()}


def per_item(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any) -> dict[str, Any]:
    """Sum the errors of labelled items, over the number of all items; none without items."""
    is_item = labels.ne(-100)
    losses: dict[str, Any] = {}
    for task, name in enumerate(NAMES):
        own = is_item[:, task]
        losses[name] = None
        if own.any():
            losses[name] = outputs["errors"][:, task][own].sum() / num_items_in_batch
    return losses


def labelled(which: str, as_rank: int | None = None) -> Callable[..., dict[str, Tensor]]:
    """Collate rows with labels, fewer on the later ranks, or for the last task none."""

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = stacked(examples)
        rank = dist.get_rank() if as_rank is None else as_rank
        labels = torch.zeros(batch["targets"].shape, dtype=torch.int64)
        if rank > 0 and which == "fewer":
            labels[3:] = -100
        elif rank > 0:
            labels[:, -1] = -100
        return batch | {"labels": labels}

    return collate


# ---- tasks that ranks lack, ends of epochs, checkpoints ------------------------------------------


class Lacking(InOrder):
    """Has no loss of the last task on the ranks but the first, and none at all in the second."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return the losses."""
        lacks = NAMES[-1:] if dist.get_rank() else []
        if dist.get_rank() and self.state.global_step == 1 and not return_outputs:
            lacks = NAMES
        losses = model(**inputs, lacks=lacks)["loss"]
        return (losses, {}) if return_outputs else losses


def lacking() -> dict[str, Any]:
    """Train and evaluate where ranks lack tasks."""
    data = rows(batches([EACH * dist.get_world_size()] * TASKS))
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder, Lacking, more={"eval_dataset": data, "tasks": NAMES})
        made.train()
        metrics = made.evaluate()
    own: Any = made.model
    return {
        "digest": digest(own),
        "logged": [sorted(e) for e in made.state.log_history if "loss" in e],
        "values": [e[f"loss_{NAMES[-1]}"] for e in made.state.log_history if "loss" in e],
        "metrics": [metrics[f"eval_loss_{name}"] for name in NAMES],
    }


class Counting(InOrder):
    """Says how many examples a rank's batch has."""

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
        """Compute the losses."""
        self.examples = [len(inputs["targets"])] * TASKS
        return super().compute_loss(model, inputs, *arguments, **more)


def uneven() -> dict[str, Any]:
    """Train one epoch whose last step has fewer examples on the last rank."""
    ranks = dist.get_world_size()
    joined = batches([EACH * ranks] * TASKS)
    joined[-1] = [own.part(0, EACH * ranks - 3) for own in joined[-1]]
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            folder,
            Counting,
            data=joined,
            max_steps=-1,
            num_train_epochs=1,
            accelerator_config={"even_batches": False},
        )
        made.train()
    own: Any = made.model
    return error(own.inner, alone(pcgrad), joined) | {"steps": made.state.global_step}


def resumed() -> dict[str, Any]:
    """Stop behind a checkpoint and go on; compare with a run without interruption."""
    with tempfile.TemporaryDirectory() as own:
        names = [own]  # the first rank's is that of all
        dist.broadcast_object_list(names)
        folder = Path(names[0])
        whole = trainer(str(folder / "whole"), ByChance)
        whole.train()
        kept = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        first = trainer(str(folder / "cut"), ByChance, **kept)
        first.train()
        dist.barrier()
        second = trainer(str(folder / "cut"), ByChance)
        second.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-1"))
        dist.barrier()
    models: list[Any] = [whole.model, second.model, first.model]
    return {"digests": [digest(own) for own in models]}


class ByChance(PCGradTrainer):
    """Shuffles, as Trainer does."""


# ---- one backward pass for all tasks -------------------------------------------------------------


class Joined(InOrder):
    """Computes the losses of all tasks from one pass through the shared layers."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return the losses."""
        tokens, targets = inputs["tokens"], inputs["targets"]
        collector = self.task_gradients
        assert collector is not None
        count = len(targets)
        with collector.batch([count] * TASKS):
            hidden = model(tokens.transpose(0, 1).flatten(0, 1)).split(count)
            losses = []
            for task, head in enumerate(heads_of(model)):
                with collector.task(task):
                    outputs = head(hidden[task])[:, 0]
                    losses.append((outputs - targets[:, task]).square().mean())
        return (losses, {}) if return_outputs else losses


def heads_of(wrapped: Any) -> nn.ModuleList:
    """Return the heads of a model that DistributedDataParallel may wrap."""
    inner: Model = getattr(wrapped, "module", wrapped).inner
    return inner.heads


class Shared(nn.Module):
    """Gives the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, FEATURES]``."""
        return self.inner.hidden(tokens)


def collected(accumulate: int) -> dict[str, Any]:
    """Train with TaskGradients."""
    own = Shared()
    collector = TaskGradients(own, TASKS)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            folder,
            Joined,
            own,
            more={"task_gradients": collector},
            gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=EACH // accumulate,
        )
        made.train()
    return error(own.inner, alone(pcgrad), batches([EACH * dist.get_world_size()] * TASKS))


SAME_RESULT: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": in_order,
    "clipped": lambda: in_order(max_grad_norm=0.1),
    "micro-batches": lambda: in_order(gradient_accumulation_steps=2),
}

IN_BF16 = {"bf16": lambda: in_order(bf16=True)}

COLLECTED = {
    "one backward pass": lambda: collected(1),
    "one backward pass, micro-batches": lambda: collected(2),
}

OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "fewer items": items_of("fewer"),
    "no items of a task": items_of("none"),
    "lacking": lacking,
    "uneven": uneven,
    "resumed": resumed,
    "every dataset": every_dataset,
}

CASES = SAME_RESULT | IN_BF16 | COLLECTED | OTHERS
