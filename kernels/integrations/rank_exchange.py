"""Give task gradients of several ranks the meaning that they have in one process.

Every rank computes the gradients of its own losses.  The task gradient that is balanced is that of
the loss over the examples of all ranks: the mean of the ranks' gradients, weighted by their numbers
of examples.  Whole parameters' rows are averaged here (:class:`.RowAverages`); those of FSDP2 and
tensor parallelism come averaged from their own backward passes, as shards, and only their Gram
matrices are added up.  The weights of the first rank are used on all.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.rank_group import RankGroup, is_distributed
from ..distributed.row_averages import RowAverages
from ..distributed.sharded_tensors import are_sharded, coordinates, local, sharding_of
from ..distributed.weights_checksum import weights_checksum
from ..distributed.wrappers import Wrappers, find_wrappers
from ..gradient_buffer import GradientBuffer

ProcessGroup: TypeAlias = "dist.ProcessGroup | Literal['auto'] | None"
"""A group, that of the parameters' wrapper, or none."""

Examples = Sequence[float] | Mapping[str, float]
"""For each task, how many examples this rank's loss is the mean of."""


class ChosenGroup:
    """The ranks that an optimizer is told to train with.

    Args:
        chosen: a process group; ``"auto"``: that of the wrapper of the parameters, or else the
            default one, if it is initialised with several ranks; None: this process alone.

    Raises:
        TypeError: it is none of these.
    """

    def __init__(self, chosen: Any) -> None:
        if not (chosen is None or chosen == "auto" or isinstance(chosen, dist.ProcessGroup)):
            raise TypeError(f"process_group: expected a group, 'auto' or None, got {chosen!r}")
        self._chosen = chosen

    def __deepcopy__(self, _memo: object) -> "ChosenGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._chosen, str | None):
            return type(self), (self._chosen,)
        raise TypeError(
            "an optimizer with a process_group cannot be pickled: save its state_dict, or let it "
            "find the group, process_group='auto'"
        )

    @property
    def has_several(self) -> bool:
        """Whether there may be other ranks; without looking at parameters."""
        return self._chosen is not None and is_distributed()

    def exchange(self, parameters: Sequence[Tensor]) -> "RankExchange | None":
        """Set up the exchange for some parameters; None if no other rank trains them.

        Raises:
            NotImplementedError: they are wrapped by what cannot be used with task gradients.
            ValueError: their wrappers have several groups.
        """
        if not self.has_several:
            return None
        wrappers = find_wrappers(parameters)
        group = self._chosen
        if isinstance(group, str):
            group = wrappers.process_group or dist.group.WORLD
        assert group is not None
        return RankExchange(parameters, wrappers, RankGroup(group)) if _several(group) else None


def _several(group: "dist.ProcessGroup") -> bool:
    return dist.get_world_size(group) > 1


class RankExchange:
    """What the ranks tell each other in the backward passes of one set of parameters.

    Args:
        parameters: those that are trained, in the optimizer's order, the same on all ranks.
        wrappers: theirs.
        group: the ranks.

    Attributes:
        group: the ranks.
        is_sharded: whether parameters are DTensors, whose gradients come averaged.
        averages: of the rows of whole parameters, after :meth:`lay_out`.
    """

    def __init__(self, parameters: Sequence[Tensor], wrappers: Wrappers, group: RankGroup) -> None:
        self.group, self._wrappers = group, wrappers
        self.is_sharded = are_sharded(parameters)
        own = {id(parameter) for parameter in parameters}
        self._others = [p for _, p in wrappers.parameters() if id(p) not in own]
        self._num_parameters = len(parameters)
        self._layout = _crc([(tuple(p.shape), str(p.dtype)) for p in parameters])
        self.averages = RowAverages([], group)
        self.passed_over = wrappers.passed_over

    def lay_out(self, buffers: Sequence[GradientBuffer]) -> None:
        """Take the buffers whose rows are averaged, those of whole parameters."""
        self.averages = RowAverages(buffers, self.group)

    @property
    def is_now(self) -> bool:
        """Whether gradients are exchanged in this backward pass: not within ``no_sync``."""
        return self._wrappers.synchronise

    # ---- before the backward pass --------------------------------------------------------------

    def share(
        self,
        losses: Sequence[Tensor | None],
        examples: Sequence[float] | None,
        names: Sequence[str] | None,
        is_continued: bool,
    ) -> tuple[list[Tensor | None], list[bool]]:
        """Multiply each loss so that the mean over ranks is the loss of all examples.

        Args:
            losses: this rank's, None for a task without one.
            examples: of each, as the caller gave them; None: as many on each rank that has a loss.
            names: of the tasks.
            is_continued: whether the gradients are added to those of the call before.

        Returns:
            The losses, and for each task whether any rank has one.

        Raises:
            ValueError: the ranks differ in what they train, or, with sharded parameters, in the
                tasks that have a loss.
        """
        self._compare(
            {
                "trained parameters": self._layout,
                "number of tasks": len(losses),
                "names of tasks": 0 if names is None else _crc(list(names)),
                "gradients since zero_grad": is_continued,
            }
        )
        is_there = [float(loss is not None) for loss in losses]
        counts = is_there if examples is None else list(examples)
        totals = self.group.add_(torch.tensor([counts, is_there], dtype=torch.float64)).tolist()
        for task, ranks in enumerate(totals[1]):
            if self.is_sharded and 0 < ranks < self.group.size:
                raise ValueError(
                    f"losses: task {task} has a loss on {ranks:.0f} of {self.group.size} ranks; "
                    "with sharded parameters all ranks exchange its gradients, so give each one a "
                    "loss of the task, 0 * output.sum() where it has no example, or none"
                )
        shared = [
            None if loss is None or count == 0 else _times(loss, self.group.size * count / total)
            for loss, count, total in zip(losses, counts, totals[0], strict=True)
        ]
        return shared, [ranks > 0 for ranks in totals[1]]

    def _compare(self, numbers: Mapping[str, int]) -> None:
        """Compare numbers that must be the same on all ranks.

        Raises:
            ValueError: one is not; on all ranks.
        """
        gathered = self.group.gather([int(number) for number in numbers.values()])
        for place, what in enumerate(numbers):
            of_ranks = [of_rank[place] for of_rank in gathered]
            if rank := _first_different(of_ranks):
                raise ValueError(
                    f"losses: rank {rank} and rank 0 differ in their {what}; all ranks train the "
                    "same parameters with the same tasks, named with tasks=[…] where the optimizer "
                    "is wrapped, and call backward and zero_grad alike"
                )

    # ---- behind it -----------------------------------------------------------------------------

    def finish(self, reached: Sequence[set[int]]) -> None:
        """End the exchange of a backward pass.

        Args:
            reached: for each task the numbers of the parameters that its losses reach here; those
                that they reach on other ranks are added.
        """
        flags = torch.zeros(len(reached), self._num_parameters, dtype=torch.uint8)
        for task, numbers in enumerate(reached):
            flags[task, list(numbers)] = 1
        for own, of_all in zip(reached, self.group.any_(flags), strict=True):
            own.update(of_all.nonzero().flatten().tolist())
        self._average_others()
        self.averages.wait()

    def _average_others(self) -> None:
        """Average the ``grad`` of what the wrapper averages besides the optimizer's parameters."""
        if not self._others:
            return
        has_gradient = torch.tensor([p.grad is not None for p in self._others], dtype=torch.uint8)
        of_all = self.group.any_(has_gradient).tolist()
        works = []
        for parameter in (p for p, flag in zip(self._others, of_all, strict=True) if flag):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(self.group.start_average(parameter.grad))
        with self.group.explaining():
            for work in works:
                work.wait()

    # ---- checks of the weights -----------------------------------------------------------------

    def check_same(self, parameters: Sequence[Tensor], state: Sequence[int], step: int) -> None:
        """Compare weights and state of all ranks, bit by bit.

        Of sharded parameters those ranks are compared that hold the same shards.

        Args:
            parameters: all that are trained.
            state: further numbers that must be the same.
            step: for the message.

        Raises:
            RuntimeError: they differ; on all ranks.
        """
        by_kind: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in parameters:
            sharding, shard = sharding_of(parameter), local(parameter.detach())
            held = () if sharding is None else (str(sharding.placements), *coordinates(sharding))
            by_kind.setdefault((*held, shard.device), []).append(shard)
        sums = [int(weights_checksum(shards)) for shards in by_kind.values()]
        held_here = _crc([(*held, device.type) for *held, device in by_kind])
        gathered = self.group.gather([held_here, *sums, *state])
        for rank, own in enumerate(gathered):
            peer = next(r for r, other in enumerate(gathered) if other[0] == own[0])
            if own[: len(sums) + 1] != gathered[peer][: len(sums) + 1]:
                raise _drifted(step, "weights", rank, peer)
            if own[len(sums) + 1 :] != gathered[0][len(sums) + 1 :]:
                raise _drifted(step, "seeds or numbers of orders", rank, 0)


def _drifted(step: int, what: str, rank: int, peer: int) -> RuntimeError:
    return RuntimeError(
        f"step {step}: the {what} of rank {rank} differ from those of rank {peer}; begin again "
        "from a checkpoint, with the same weights, seed and optimizer settings on all ranks, and "
        "change weights by the optimizer alone"
    )


def _first_different(numbers: Sequence[int]) -> int:
    """Return the first index of a number that is not the first one; 0 if all are."""
    return next((rank for rank, number in enumerate(numbers) if number != numbers[0]), 0)


def _times(loss: Tensor, factor: float) -> Tensor:
    return loss if factor == 1 else loss * factor


def _crc(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def examples_by_task(
    examples: Examples | None, names: Sequence[str] | None, num_tasks: int
) -> list[float] | None:
    """Return the numbers of examples in the tasks' order.

    Raises:
        ValueError: they are not one finite number of at least 0 for each task.
    """
    if examples is None:
        return None
    if isinstance(examples, Mapping):
        unknown = [name for name in examples if name not in (names or ())]
        if unknown:
            raise ValueError(f"examples: {unknown[0]!r} is none of the tasks {list(names or ())}")
        examples = [examples.get(name, 0) for name in names or ()]
    counts = [float(count) for count in examples]
    if len(counts) != num_tasks or not all(0 <= count < float("inf") for count in counts):
        raise ValueError(
            f"examples: expected {num_tasks} numbers of at least 0, one for each task, got "
            f"{list(examples)}"
        )
    return counts
