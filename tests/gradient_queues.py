"""Stand-ins for the side stream of weight gradients on machines without a GPU."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import gradient_queue
from kernels.gradient_queue import Launch


class UntilJoined:
    """A queue that launches nothing before the join: the longest delay that a stream can have.

    Attributes:
        launched: the number of launches so far.
        overwritten: of how many an input had been overwritten before the launch.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Launch, tuple[Tensor, ...], list[Tensor]]] = []
        self.launched = self.overwritten = 0

    @property
    def operands(self) -> list[Tensor]:
        return [tensor for _, operands, _ in self._waiting for tensor in operands]

    def submit(self, launch: Launch, operands: tuple[Tensor, ...]) -> None:
        inputs = operands[:2]  # then come the rows
        self._waiting.append((launch, operands, [x.clone() for x in inputs]))

    @torch.no_grad()
    def join(self) -> None:
        waiting, self._waiting = self._waiting, []
        for launch, operands, inputs in waiting:
            pairs = zip(operands, inputs, strict=False)
            self.overwritten += not all(torch.equal(now, then) for now, then in pairs)
            launch()
        self.launched += len(waiting)


class InOrder(TorchDispatchMode):
    """Lets the operators of eager code wait as `register_cuda` does, which no CPU kernel passes.

    An operator of torch's that reads or writes rows which are waited for raises an AssertionError:
    on a GPU nothing would let it wait.
    """

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        arguments = tuple(tree_leaves((args, kwargs)))
        is_view = any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in func._schema.arguments
        )
        if func.namespace == "superbert":
            if func.overloadpacket.__name__ != "linear_task_gradients_":
                gradient_queue.join_for(arguments)
        elif not is_view and not func.overloadpacket.__name__.startswith("new_"):
            for rows, opened in gradient_queue._opened(arguments):
                assert not opened.awaits(rows), f"{func}: nobody has computed these rows yet"
        return func(*args, **(kwargs or {}))
