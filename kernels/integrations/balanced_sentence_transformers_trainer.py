"""Balance several datasets' losses inside sentence-transformers' trainer.

    PCGradSentenceTransformerTrainer(
        model, settings, train_dataset={"a": ..., "b": ...}, loss={"a": ..., "b": ...}
    ).train()

sentence-transformers takes one dataset's batch for each step, in turn or by chance.  Here a step
has a batch of each dataset, each with its own loss.  Their graphs are apart, so K backward passes
cost what one of the sum does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import (
    MultiDatasetBatchSamplers,
    MultiDatasetDefaultBatchSampler,
)
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset

from ..autograd_graph import graph_nodes, other_leaves
from .balanced_trainer import PCGradTrainer


class PCGradSentenceTransformerTrainer(PCGradTrainer, SentenceTransformerTrainer):
    """sentence-transformers' trainer, with a batch of every dataset in each step.

    ``per_device_train_batch_size`` counts the examples of each dataset.  Batch samplers, columns,
    prompts and routes of each dataset are sentence-transformers', as are evaluation, checkpoints
    and the training of the losses' own parameters.  By ``multi_dataset_batch_sampler`` an epoch
    is as long as the longest dataset (``PROPORTIONAL``, the default), and the shorter ones begin
    anew, shuffled again, or it ends with the shortest (``ROUND_ROBIN``).  Losses that go through
    the model again in the backward pass (``Cached...``) are balanced, too.

    On several processes each takes every N-th step's batches of one process.  Their losses count by
    their examples, and an epoch has as many steps on all: the longest dataset begins anew, or the
    last steps are left out.

    Args:
        arguments: as for SentenceTransformerTrainer; ``train_dataset`` is a dict of two or more.
        settings: as for SentenceTransformerTrainer and :class:`.PCGradTrainer`.  The tasks are the
            datasets, in their order.

    Raises:
        ValueError: as :class:`.PCGradTrainer`; ``train_dataset`` is not such a dict, the sampler
            of datasets is another, or ``task_gradients`` or ``tasks`` are given.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        if settings.get("task_gradients") is not None:
            raise ValueError(
                "task_gradients: each dataset has a forward pass of its own, which needs none"
            )
        if settings.get("tasks") is not None:
            raise ValueError("tasks: are the names of the datasets in train_dataset")
        super().__init__(*arguments, **settings)
        found = self.train_dataset
        if found is not None and not (isinstance(found, Mapping) and len(found) > 1):
            raise ValueError(
                "train_dataset: expected a dict of two or more datasets by name, got "
                f"{type(found).__name__}"
            )
        sampler = self.args.multi_dataset_batch_sampler
        if not isinstance(sampler, str):
            raise ValueError(
                "multi_dataset_batch_sampler: a step has a batch of every dataset, so that there "
                f"is none to choose; expected 'proportional' or 'round_robin', got {sampler}"
            )
        if found is not None:
            self._tasks = tuple(found)
        self.data_collator: Any = _CollatorByDataset(self.data_collator)

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Say whether rows tell their dataset; here those of every dict of datasets do.

        Args:
            dataset: as for SentenceTransformerTrainer.
            args: as for SentenceTransformerTrainer.
            loss: as for SentenceTransformerTrainer.

        Returns:
            Whether they do.
        """
        return isinstance(dataset, DatasetDict) or bool(
            super().should_dataset_name_column_be_added(dataset, args, loss)
        )

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        """Make the sampler of a batch of every dataset in each step.

        Args:
            dataset: as for SentenceTransformerTrainer.
            batch_samplers: as for SentenceTransformerTrainer.
            generator: as for SentenceTransformerTrainer.
            seed: as for SentenceTransformerTrainer.

        Returns:
            The sampler.
        """
        until = self.args.multi_dataset_batch_sampler
        shortest = until == MultiDatasetBatchSamplers.ROUND_ROBIN
        processes = self.accelerator.num_processes
        return _EveryDatasetSampler(
            dataset, batch_samplers, generator, seed or 0, shortest, processes
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of each dataset's batch.

        Args:
            model: as for SentenceTransformerTrainer.
            inputs: those of one dataset, or of several by name.
            return_outputs: as for SentenceTransformerTrainer.
            num_items_in_batch: as for SentenceTransformerTrainer.

        Returns:
            The loss, or the losses by dataset; with ``return_outputs`` the outputs, too, ``{}``.
        """
        compute_loss: Callable[..., Any] = super().compute_loss
        if not all(isinstance(own, Mapping) for own in inputs.values()):
            return compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.world_size > 1:
            # Losses that go through the model in the backward pass must not go through its wrapper,
            # which would exchange their gradients.
            model = self.model
        self.examples = {name: own.pop(_NUM_EXAMPLES, 1) for name, own in inputs.items()}
        parameters = self._parameters(model)
        losses = {}
        for name, own in inputs.items():
            losses[name] = _differentiable(compute_loss(model, own), parameters)
        return (losses, {}) if return_outputs else losses

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """Those of the model and of the losses that are trained, each once."""
        losses = self.loss.values() if isinstance(self.loss, Mapping) else [self.loss]
        found = {id(p): p for module in (model, *losses) for p in module.parameters()}
        return [parameter for parameter in found.values() if parameter.requires_grad]


_NUM_EXAMPLES = "num_examples"


class _CollatorByDataset:
    """Collates the rows of each dataset by itself: inputs by dataset, where there are several."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        by_dataset: dict[str | None, list[dict[str, Any]]] = {}
        for row in rows:
            by_dataset.setdefault(row.get("dataset_name"), []).append(row)
        if len(by_dataset) < 2:
            return self._collate(rows)
        return {
            str(name): {**self._collate(own), _NUM_EXAMPLES: len(own)}
            for name, own in by_dataset.items()
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not of the collator, and not before there is one
            raise AttributeError(name)
        return getattr(self._collate, name)


class _EveryDatasetSampler(MultiDatasetDefaultBatchSampler):
    """Yields a batch of every dataset, joined, until the shortest or the longest one ends."""

    def __init__(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None,
        seed: int,
        until_shortest: bool,
        processes: int,
    ) -> None:
        super().__init__(dataset, list(batch_samplers), generator, seed)
        self._processes = processes
        if processes > 1:
            # With a number accelerate would drop the batches that have another.
            self.batch_size = None  # type: ignore[assignment]
        self._until_shortest = until_shortest
        lengths = [len(part) for part in dataset.datasets]  # type: ignore[arg-type]
        self._offsets = list(accumulate(lengths[:-1], initial=0))

    def __iter__(self) -> Iterator[list[int]]:
        self.set_epoch(self.epoch)  # later passes change it below
        if self.generator is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        passes = 1 if self._until_shortest else None
        every = [self._batches(sampler, passes) for sampler in self.batch_samplers]
        numbered = list(zip(self._offsets, every, strict=True))
        for _ in range(len(self)):
            step: list[int] = []
            for offset, batches in numbered:
                batch = next(batches, None)
                if batch is None:
                    return
                step += [offset + index for index in batch]
            yield step

    def _batches(self, sampler: BatchSampler, passes: int | None) -> Iterator[list[int]]:
        """Yield a dataset's batches, shuffled anew in each pass.

        Raises:
            ValueError: there is none.
        """
        for number in count() if passes is None else range(passes):
            if number > 0 and hasattr(sampler, "set_epoch"):
                # Some seed the generator by the epoch: each pass has a number of its own.
                sampler.set_epoch(self.epoch + number * _EPOCHS)
            batch = None
            for batch in sampler:
                yield batch
            if batch is None:
                raise ValueError("train_dataset: the batch sampler makes no batch of a dataset")

    def __len__(self) -> int:
        lengths = [len(sampler) for sampler in self.batch_samplers]
        steps = min(lengths) if self._until_shortest else max(lengths)
        # Every process has as many, or those that have more would wait for the others.
        left = steps % self._processes
        if left and not self._until_shortest:
            return steps + self._processes - left
        return steps - left


_EPOCHS = 1_000_003  # more than a run has


class _OwnBackward(torch.autograd.Function):
    """A loss that computes its parameters' ``grad`` in hooks, as a function of these parameters."""

    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], *parameters: Tensor) -> Tensor:
        (ctx.loss,), ctx.parameters = losses, parameters
        return ctx.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        before = [parameter.grad for parameter in ctx.parameters]
        try:
            for parameter in ctx.parameters:
                parameter.grad = None
            with torch.enable_grad():
                torch.autograd.backward(ctx.loss, gradients[0])
            return (None, *(parameter.grad for parameter in ctx.parameters))
        finally:
            for parameter, gradient in zip(ctx.parameters, before, strict=True):
                parameter.grad = gradient


def _differentiable(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return a loss that torch.autograd.grad differentiates by the parameters.

    ``Cached...`` losses end in a leaf of their own, whose hook goes through the model again.
    """
    if not loss.requires_grad:
        return loss
    if loss.grad_fn is None or other_leaves([graph_nodes(loss)], parameters):
        # In a list, the loss is no argument that is differentiated by.
        return _OwnBackward.apply([loss], *parameters)  # type: ignore[no-untyped-call]
    return loss
