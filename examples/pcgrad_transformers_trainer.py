"""Three tasks in transformers' Trainer: `compute_loss` returns their losses, PCGrad balances them.

    python -m examples.pcgrad_transformers_trainer [--steps N]
    torchrun --nproc-per-node 2 -m examples.pcgrad_transformers_trainer

The model and its packed batches are those of `examples/three_tasks.py`.  (Installed, it is
`superbert.kernels`.)
"""

import argparse
import tempfile
from typing import Any

import transformers as hf
from accelerate import PartialState

from examples.three_tasks import EACH, LOSSES, losses_of, model_and_rows
from kernels import PackingCollator, PCGradTrainer


class ThreeTasksTrainer(PCGradTrainer):
    """Trains on all tasks at once."""

    def compute_loss(self, model, inputs, return_outputs=False, **_) -> Any:
        """Return the loss of each task, by name."""
        losses = losses_of(model, inputs, self.task_gradients)
        return (losses, {}) if return_outputs else losses


def collate(examples: list[tuple[dict[str, Any], ...]]) -> dict[str, Any]:
    """Pack the rows of the first task, then those of the next."""
    return PackingCollator()([row for task in zip(*examples, strict=True) for row in task])


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Train; return what was logged: the sum of the losses, and each of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    steps = parser.parse_args(arguments).steps

    hf.set_seed(0)
    model, rows = model_and_rows()
    examples = list(zip(*rows.values(), strict=False))  # one of each task; the longer ones are cut
    with tempfile.TemporaryDirectory() as folder:
        settings = hf.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=EACH,
            dataloader_drop_last=True,
            learning_rate=5e-4,
            logging_steps=5,
            remove_unused_columns=False,
            report_to="none",
        )
        data = {"train_dataset": examples, "data_collator": collate}
        trainer = ThreeTasksTrainer(model, settings, **data, task_gradients=len(LOSSES))
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    last = main()[-1]
    PartialState().print(last)  # on the first process alone
