"""Baselines: a transformers encoder on padded batches, PCGrad as commonly published.

These are written plainly, as one finds them in training loops, and are here to be measured and to
be agreed with.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.data.collate import PackedBatch

from .batching import Batching, Means, PackedRow, PaddedColumns, pad

TASKS = ("sst", "quora", "sts")
_HEADS = {"sst": (1, 5), "quora": (2, 1), "cfimdb": (1, 1)}
"""Sentences that a linear head reads, and its logits: more than one for cross entropy."""


def published_pcgrad(gradients: Sequence[Tensor]) -> Tensor:
    """Combine flat task gradients ``[P]`` each: clone, shuffle, project in a loop, sum.

    The way PCGrad is usually written: every conflict is a host-side ``if``, every projection a pass
    over two whole vectors, and the list is shuffled while each gradient is projected, by itself
    included.
    """
    projected = [gradient.clone() for gradient in gradients]
    others = list(gradients)
    for mine in projected:
        random.shuffle(others)
        for other in others:
            dot = torch.dot(mine, other)
            if dot < 0:
                mine -= dot * other / other.norm() ** 2
    return torch.stack(projected).sum(0)


class HuggingFaceLoop:
    """A plain multitask loop around an encoder of ``transformers``.

    Args:
        model_folder: of Hugging Face's, or None for random weights of ``config``.
        balance: ``"sum"`` (one backward of the summed loss), ``"pcgrad"`` (one per task, then
            :func:`published_pcgrad`), ``"torchjd"`` (its Jacobians and its PCGrad) or, accelerated,
            ``"task gradients"`` (all sentences in one forward pass, then this project's PCGrad).
        autocast: compute in bf16 under torch's autocast.
        device: where to run.
        compiled: run the encoder through ``torch.compile``.
        compiled_layers: each of its layers instead, which all share one compilation: a few seconds
            instead of a minute.
        recorded: prepared for CUDA graphs of whole steps.
        config: fields of ``config.json`` when there is no folder.
        batching: how sentences go through the encoder; with task gradients as one row of tokens.
        flash: attention by the flash-attn package, on a GPU, in bf16.
        accelerated: through :func:`kernels.accelerate`.
        tasks: those of a batch, in its order.
    """

    def __init__(
        self,
        model_folder: Path | None,
        *,
        balance: str,
        autocast: bool,
        device: torch.device,
        compiled: bool = False,
        compiled_layers: bool = False,
        recorded: bool = False,
        config: dict[str, object] | None = None,
        batching: type[Batching] = PaddedColumns,
        flash: bool = False,
        accelerated: bool = False,
        tasks: Sequence[str] = TASKS,
        lr: float = 1e-5,
    ) -> None:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        if model_folder is not None:
            shape = AutoConfig.from_pretrained(model_folder)
        else:
            fields = {"model_type": "bert", **(config or {})}
            shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
        # BERT's pooler has weights; a model without one knows no such argument.
        pooler = {"add_pooling_layer": False} if shape.model_type == "bert" else {}
        encoder = (
            AutoModel.from_config(shape, **pooler)
            if model_folder is None
            else AutoModel.from_pretrained(model_folder, **pooler)
        )
        self.encoder = encoder.to(device).train()
        if balance == "task gradients":
            batching = PackedRow
        if batching.register_attention is not None:
            self.encoder.set_attn_implementation(batching.register_attention())
        if flash:
            self.encoder.set_attn_implementation("flash_attention_2")
        if accelerated:
            kernels.accelerate(self.encoder)
        self._encode = torch.compile(self.encoder, dynamic=True) if compiled else self.encoder
        if compiled_layers:
            layers = next(m for m in self.encoder.modules() if isinstance(m, nn.ModuleList))
            for layer in layers:
                layer.compile(dynamic=True)
        width = shape.hidden_size
        heads = {task: _HEADS[task] for task in tasks if task in _HEADS}
        self.heads = nn.ModuleDict(
            {task: nn.Linear(size * width, logits) for task, (size, logits) in heads.items()}
        ).to(device)
        self.tasks = tasks
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=0.0, fused=True, capturable=recorded
        )
        self.balance, self.autocast, self.device = balance, autocast, device
        self._batching, self._batchings = batching, dict[PaddedBatch, Batching]()
        if balance == "task gradients":
            trained = nn.ModuleList([self.encoder, self.heads])
            self.task_gradients = kernels.TaskGradients(trained, len(tasks))
            self.pcgrad = kernels.PCGrad(self.optimizer, task_gradients=self.task_gradients)

    def step(self, padded: "PaddedBatch") -> Tensor:
        """Train on one batch of each task; return the losses ``[K]``."""
        if self.balance == "task gradients":
            return self._step_with_task_gradients(padded)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses = self._losses(padded)
        {
            "sum": lambda: sum(losses).backward(),
            "pcgrad": lambda: self._pcgrad_backward(losses),
            "torchjd": lambda: self._torchjd_backward(losses),
        }[self.balance]()
        self.optimizer.step()
        return torch.stack([loss.detach().float() for loss in losses])

    def _step_with_task_gradients(self, padded: "PaddedBatch") -> Tensor:
        sequences = [sum(columns) for columns in padded.columns]
        self.pcgrad.zero_grad()
        losses = []
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast),
            self.task_gradients.batch(sequences),
        ):
            for task, sentences in enumerate(self._embed(padded)):
                with self.task_gradients.task(task):
                    losses.append(self._loss(self.tasks[task], sentences, padded.labels[task]))
        self.pcgrad.pc_backward(losses)
        self.pcgrad.step()
        return torch.stack([loss.detach().float() for loss in losses])

    def _losses(self, padded: "PaddedBatch") -> list[Tensor]:
        each = zip(self.tasks, self._embed(padded), padded.labels, strict=True)
        return [self._loss(task, sentences, labels) for task, sentences, labels in each]

    def _loss(self, task: str, sentences: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of a task; ``sentences`` are those of its columns, ``[n, H]`` each."""
        dropped = [F.dropout(sentence, 0.5) for sentence in sentences]
        if task == "sts":
            cosine = F.cosine_similarity(*dropped)
            return F.mse_loss(5 * cosine.float(), labels)
        logits = self.heads[task](torch.cat(dropped, dim=1))
        if logits.shape[1] > 1:
            return F.cross_entropy(logits.float(), labels.long())
        return F.binary_cross_entropy_with_logits(logits.squeeze(1).float(), labels)

    def _embed(self, padded: "PaddedBatch") -> Means:
        """Mean-pooled sentences of each task and column; a batch is prepared on its first use."""
        if padded not in self._batchings:
            self._batchings[padded] = self._batching(padded.tokens)
        return self._batchings[padded].embed(self._encode)

    def _pcgrad_backward(self, losses: Sequence[Tensor]) -> None:
        flat = []
        for loss in losses:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)
            flat.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                        for p in self.parameters
                    ]
                )
            )
        combined = published_pcgrad(flat)
        for parameter, gradient in zip(
            self.parameters, combined.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter).clone()

    def _torchjd_backward(self, losses: Sequence[Tensor]) -> None:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        backward(losses, parallel_chunk_size=1)
        jac_to_grad([p for p in self.parameters if p.jac is not None], PCGrad())


class PaddedBatch:
    """The examples of a packed batch, as transformers' loops take them.

    Attributes:
        tokens: of each task, of each column, the token ids of its sentences.
        sentences: of each task, ids and mask of each column, ``[n, S]`` each.
        columns: of each task, the sentences of each column.
        labels: of each task.
    """

    def __init__(self, batch: PackedBatch, device: torch.device) -> None:
        sequences = batch.input_ids.to(device).split(batch.cu_seqlens.diff().tolist())
        self.tokens: list[list[Sequence[Tensor]]] = []
        for task, columns in enumerate(batch.columns):
            # A task may have more sequences, of padding.
            start, count = batch.task_offsets[task], batch.examples[task]
            starts = range(start, start + columns * count, count)
            self.tokens.append([sequences[first : first + count] for first in starts])
        self.sentences = [[pad(sentences) for sentences in columns] for columns in self.tokens]
        self.columns = [[len(sentences) for sentences in columns] for columns in self.tokens]
        self.labels = [label.to(device) for label in batch.labels if label is not None]
