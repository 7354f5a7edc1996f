"""The ranks that train one model together, as gradient surgery needs them.

Task gradients are averaged on the device, over the group that the model's wrapper uses.  What the
ranks must agree on before and after a backward pass (the number of tasks, the examples of each, the
parameters that were reached) is a few numbers on the host: they go through a group of gloo, so that
no rank waits for its GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """N ranks, seen from one of them.

    Args:
        group: of all ranks that train the model, on the parameters' device.

    Attributes:
        group: as given.
        rank: of this process within the group, from 0.
        size: N.
    """

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        assert group is not None  # it is initialised
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._on_host = _host_group(group)

    def __deepcopy__(self, _memo: object) -> "RankGroup":
        return self

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return every rank's numbers, as many from each; they are compared by value on the host.

        Args:
            numbers: this rank's, within int64.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        with self.explaining():
            dist.all_gather(gathered, own, group=self._on_host)
        return [of_rank.tolist() for of_rank in gathered]

    def add_(self, values: Tensor) -> Tensor:
        """Add up a CPU tensor over the ranks, in place."""
        with self.explaining():
            dist.all_reduce(values, group=self._on_host)
        return values

    def any_(self, flags: Tensor) -> Tensor:
        """Set each of some flags, uint8 on the CPU, that is set on any rank."""
        with self.explaining():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._on_host)
        return flags

    def broadcast_(self, values: Tensor) -> Tensor:
        """Take the first rank's values of a tensor."""
        group = self._on_host if values.device.type == "cpu" else self.group
        with self.explaining():
            dist.broadcast(values, group=group, group_src=0)
        return values

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say in one line what it means that an exchange within the block failed.

        Raises:
            RuntimeError: it failed; gloo and NCCL do not tell which rank was lost.
        """
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: no answer from another rank, which died, hangs "
                "or does not call backward and step as often; start all again from the last "
                f"checkpoint ({reason})"
            ) from error

    def start_average(self, values: Tensor) -> "dist.Work":
        """Begin to average a contiguous tensor over the ranks, in place."""
        if dist.get_backend(self.group) == dist.Backend.NCCL:
            return dist.all_reduce(values, dist.ReduceOp.AVG, group=self.group, async_op=True)
        values.mul_(1 / self.size)  # gloo cannot average
        return dist.all_reduce(values, group=self.group, async_op=True)


def is_distributed() -> bool:
    """Whether this process belongs to an initialised process group of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _host_group(group: "dist.ProcessGroup") -> "dist.ProcessGroup":
    """Return the group if it takes tensors on the host, or else one of gloo with its ranks.

    All ranks of the group call this at the same time.
    """
    cpu = torch.device("cpu")
    if cpu in group._device_types:
        return group
    device = next(iter(group._device_types))
    timeout: timedelta = group._get_backend(device).options._timeout
    made = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout,
        backend="gloo",
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)  # this rank is one of them
    return made
