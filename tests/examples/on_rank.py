"""Run an example on one of several processes, and write down what it did.

    LAUNCHER -m tests.examples.on_rank EXAMPLE FOLDER [ARGUMENTS OF THE EXAMPLE]

``FOLDER/RANK.json`` gets what the example's ``main`` returns, and the weights' bits behind the last
step, of shards those of the whole parameters; and how many modules of DistributedDataParallel there
were when the process group was ended.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook


def main(example: str, folder: str, *arguments: str) -> None:
    """Run it."""
    last: list[Any] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        last[:] = [_digest(p) for group in optimizer.param_groups for p in group["params"]]

    wrapped: list[int] = []
    end = dist.destroy_process_group

    def counted(*given: Any) -> None:
        modules = (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
        wrapped.append(sum(1 for _ in modules))
        end(*given)

    dist.destroy_process_group = counted
    register_optimizer_step_post_hook(note)
    returned = importlib.import_module(f"examples.{example}").main(list(arguments))
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))  # Lightning sets the latter
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"returned": returned, "weights": last, "wrapped": wrapped})
    )


def _digest(parameter: Tensor) -> int:
    weight = parameter.detach()
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return int(weight.contiguous().view(torch.int32).sum(dtype=torch.int64))


if __name__ == "__main__":
    main(*sys.argv[1:])
