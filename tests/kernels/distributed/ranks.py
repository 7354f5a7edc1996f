"""Run cases on several gloo processes.

    python -m tests.kernels.distributed.ranks MODULE FOLDER      one rank, started by `run`

A module of cases has a mapping ``CASES`` of functions by name, which every rank calls in its order,
and which return what JSON can hold.  The processes are started once for all, since importing torch
takes longer than most cases.
"""

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...launch import start_ranks

_PATIENCE = timedelta(seconds=60)


def run(module: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run all cases of a module on so many processes.

    Returns:
        For each rank the results by the cases' names; of one that raised, ``{"raised": text}``.
    """
    log = folder / "log"
    processes = start_ranks(ranks, [__name__, module, str(folder)], log)
    statuses = [process.wait(timeout=400) for process in processes]
    assert statuses == [0] * ranks, log.read_text()[-4000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(ranks)]


def _be_a_rank(module: str, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=_PATIENCE)
    cases = importlib.import_module(module)
    results: dict[str, Any] = {}
    for name, case in cases.CASES.items():
        torch.manual_seed(0)
        try:
            results[name] = case()
        except Exception as error:  # whose text the test asks for
            traceback.print_exc()
            results[name] = {"raised": f"{type(error).__name__}: {error}"}
        dist.barrier()
    path = folder / f"results-{dist.get_rank()}.json"
    path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_a_rank(sys.argv[1], Path(sys.argv[2]))
