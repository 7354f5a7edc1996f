"""Runs of PCGradSentenceTransformerTrainer on ranks, a case of :mod:`.trainer_cases`."""

import tempfile
from pathlib import Path
from typing import Any

import sentence_transformers as st
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn

from kernels import PCGrad, PCGradSentenceTransformerTrainer

from ..test_balanced_sentence_transformers_trainer import new_model, pairs, scored, settings
from ..test_sentence_transformers_inputs import save_tiny
from .training import digest

LR = 0.05


class Recording(PCGradSentenceTransformerTrainer):
    """Keeps the inputs of every step."""

    seen: list[Any]

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
        """Compute the losses."""
        self.seen.append({name: dict(own) for name, own in inputs.items()})
        return super().compute_loss(model, inputs, *arguments, **more)


def made_in(folder: str) -> st.SentenceTransformer:
    """Return the same model each time, without dropout."""
    torch.manual_seed(0)
    model = new_model(folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def losses(model: Any) -> dict[str, nn.Module]:
    """Return a loss for each dataset, of which one goes through the model in its backward pass."""
    cached = st_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    return {"scores": st_losses.CosineSimilarityLoss(model), "pairs": cached}


def every_dataset() -> dict[str, Any]:
    """Train an epoch of datasets of two lengths; compare with one process that sees all batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_first = [save_tiny(folder, "roberta")]  # transformers writes on the first rank alone
        dist.broadcast_object_list(of_first)
        model = made_in(of_first[0])
        optimizer = torch.optim.SGD(model.parameters(), LR)
        trainer = Recording(
            model,
            settings(folder, learning_rate=LR, max_grad_norm=0),
            train_dataset={"scores": scored(11), "pairs": pairs(5)},
            loss=losses(model),
            optimizers=(optimizer, None),
            seed=0,
        )
        trainer.seen = []
        trainer.train()
        wanted = made_in(of_first[0])
        dist.barrier()  # before the folder is removed
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, trainer.seen)
    result = {"digest": digest(model), "steps": trainer.state.global_step}
    if dist.get_rank() > 0:
        return result
    pcgrad = PCGrad(torch.optim.SGD(wanted.parameters(), LR), process_group=None)
    trainer.loss = losses(wanted)
    wanted.train()
    for of_ranks in zip(*every, strict=True):
        counts = [{task: own["num_examples"] for task, own in batch.items()} for batch in of_ranks]
        found = [balanced(trainer, wanted, batch) for batch in of_ranks]
        pcgrad.zero_grad()
        pcgrad.pc_backward(
            {
                task: sum(
                    own[task] * count[task] / sum(other[task] for other in counts)
                    for own, count in zip(found, counts, strict=True)
                )
                for task in found[0]
            }
        )
        pcgrad.step()
    pairs_of = zip(model.parameters(), wanted.parameters(), strict=True)
    sizes = [sorted(count.items()) for count in counts]
    return result | {
        "error": max(float((a - b).detach().abs().max()) for a, b in pairs_of),
        "sizes": sizes,
    }


def balanced(trainer: Recording, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the losses of one rank's batch, computed by another model."""
    before, trainer.model = trainer.model, model
    try:
        found: dict[str, Any] = trainer.compute_loss(model, batch)
    finally:
        trainer.model = before
    return found
