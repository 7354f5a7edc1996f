"""One rank of runs whose files are dealt: ``python -m tests.engine.distributed.dealing_rank``.

Its argument is a list of runs in JSON, each the arguments of the program; ``RANK`` in them stands
for the rank's number.  What came of each run goes to ``OUT-RANK.json``: its status or error, the
data files that were opened, and the texts that were trained on.
"""

import json
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist

from engine.cli.common import run_cli
from engine.train import main
from engine.training.step import MultitaskStep
from engine.utils.errors import InputError, LostRankError

RANK = os.environ["RANK"]
opened: set[str] = set()
trained: list[Counter] = []
step = MultitaskStep.__call__


def watch(event: str, arguments: tuple) -> None:
    """Keep the names of data files that are opened."""
    if event == "open" and str(arguments[0]).endswith((".csv", ".txt")):
        opened.add(Path(arguments[0]).name)


def keep(self, batch, number, lr):
    """Keep the texts of a step, as their tokens."""
    texts = Counter()
    for micro_batch in batch:
        ends = micro_batch.cu_seqlens.tolist()
        tokens = micro_batch.input_ids.tolist()
        for a, b in pairwise(ends):
            texts[" ".join(map(str, tokens[a:b]))] += 1
    trained.append(texts)
    return step(self, batch, number, lr)


def be_a_rank() -> int:
    """Make the runs one after the other."""
    sys.addaudithook(watch)
    MultitaskStep.__call__ = keep
    for number, arguments in enumerate(json.loads(sys.argv[1])):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + (number > 0))
        arguments = [each.replace("RANK", RANK) for each in arguments]
        folder = Path(arguments[arguments.index("--out") + 1])
        opened.clear()
        trained.clear()
        try:
            ended = f"status {main(arguments)}"
        except (InputError, LostRankError) as error:
            ended = f"{type(error).__name__}: {error}"
            dist.destroy_process_group()
        said = {"ended": ended, "opened": sorted(opened), "trained": trained}
        name = f"{folder.name}{'-again' * ('--resume' in arguments)}-{RANK}.json"
        folder.with_name(name).write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    run_cli(be_a_rank)
