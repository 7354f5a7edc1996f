"""One rank of runs in which rank 1 drifts: ``python -m tests.engine.distributed.drifting_ranks``.

Its argument is a list of runs in JSON, each of what happens to rank 1 and the arguments of the
program.  The errors of all runs but the last go to ``RUN/../NAME-RANK``; the last one's ends the
process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.cli.common import run_cli
from engine.train import main
from engine.training.step import MultitaskStep
from engine.utils.errors import InputError, LostRankError

RANK = int(os.environ["RANK"])


def flip_weight(step: MultitaskStep) -> None:
    """Change the lowest bit of one weight."""
    step.parameters.compute[7:8].view(torch.int32).bitwise_xor_(1)


def draw_another_order(step: MultitaskStep) -> None:
    """Take the seed of another step."""
    step._seed += 5


DRIFTS = {"flip_weight": flip_weight, "draw_another_order": draw_another_order}
trained = MultitaskStep.__call__


def be_a_rank() -> int:
    """Make the runs one after the other."""
    runs = json.loads(sys.argv[1])
    for number, (drift, arguments) in enumerate(runs):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + (number > 0))
        if drift == "another_seed" and RANK == 1:
            arguments = [*arguments, "seed=1"]

        def train_and_drift(step, batch, number, lr, drift=drift):
            report = trained(step, batch, number, lr)
            if RANK == 1 and number == 2 and drift in DRIFTS:
                DRIFTS[drift](step)
            return report

        MultitaskStep.__call__ = train_and_drift
        if number == len(runs) - 1:
            return main(arguments)
        folder = Path(arguments[arguments.index("--out") + 1])
        try:
            outcome = f"status {main(arguments)}"
        except (InputError, LostRankError) as error:
            outcome = f"{type(error).__name__}: {error}"
            dist.destroy_process_group()
        folder.with_name(f"{folder.name}-{RANK}").write_text(outcome)
    return 0


if __name__ == "__main__":
    run_cli(be_a_rank)
