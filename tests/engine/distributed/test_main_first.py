"""The first process of each machine does a work before the others, for longer than any timeout."""

import os
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

from engine.cli.common import LOST_RANK, run_cli
from engine.distributed import ranks as module
from engine.distributed.ranks import Ranks

from ..launch import start_ranks

pytestmark = pytest.mark.long

TIMEOUT = 3.0


def be_a_rank(folder: Path, local_size: int, ending: str) -> int:
    """Work for longer than a rank is waited for; write when that was."""
    module._BEAT, module._SILENCE = 0.2, 2.0
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % local_size)
    ranks = Ranks.from_environment()
    with ranks.init(torch.device("cpu"), timeout=TIMEOUT):
        for turn in range(2):
            with ranks.main_first():
                begun = time.monotonic()
                if ranks.local_rank == 0 and turn:
                    # Each machine has its own time.
                    time.sleep(2.5 * TIMEOUT if ranks.is_main == (ending != "other") else 0.1)
                    if ending == "killed" and ranks.is_main:
                        os._exit(9)
                (folder / f"{ranks.rank}").write_text(f"{begun} {time.monotonic()}")
    return 0


def times(folder: Path, rank: int) -> tuple[float, float]:
    begun, ended = (folder / str(rank)).read_text().split()
    return float(begun), float(ended)


@pytest.mark.parametrize(
    ("size", "local_size", "ending"), [(2, 2, "main"), (4, 2, "main"), (4, 2, "other")]
)
def test_it_may_take_longer_than_the_timeout(
    tmp_path: Path, size: int, local_size: int, ending: str
) -> None:
    log = tmp_path / "log"
    arguments = [__spec__.name, str(tmp_path), str(local_size), ending]
    processes = start_ranks(size, arguments, log)
    assert [process.wait(timeout=120) for process in processes] == [0] * size, log.read_text()
    for rank in range(size):
        if rank % local_size:
            assert times(tmp_path, rank)[0] >= times(tmp_path, rank - rank % local_size)[1]


def test_one_that_dies_is_noticed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begun = datetime.now()
    processes = start_ranks(2, [__spec__.name, str(tmp_path), "2", "killed"], log)
    assert [process.wait(timeout=120) for process in processes] == [9, LOST_RANK], log.read_text()
    assert (datetime.now() - begun).total_seconds() < 60


if __name__ == "__main__":
    run_cli(lambda: be_a_rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
