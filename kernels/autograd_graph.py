"""The autograd graphs of several losses: nodes that they share, and leaves they depend on."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def graph_nodes(loss: Tensor) -> set[Any]:
    """All nodes between a loss and its leaves; a leaf's own node keeps nothing that is freed."""
    nodes: set[Any] = set()
    open_nodes = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in nodes or not node.next_functions:
            continue
        nodes.add(node)
        open_nodes.extend(_parents(node))
    return nodes


def needed_later(graphs: Sequence[set[Any]]) -> list[bool]:
    """Whether a later loss shares a node with each loss, by the nodes of their graphs.

    Raises:
        ValueError: a part of the graph is made in the backward pass only.
    """
    later: set[Any] = set()
    needed = []
    for nodes in reversed(graphs):
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            raise ValueError(
                "losses: they went through torch.utils.checkpoint with use_reentrant=True, which "
                "hides the parameters inside from a gradient of each task; give use_reentrant=False"
            )
        needed.append(not later.isdisjoint(nodes))
        later |= nodes
    return needed[::-1]


def other_leaves(graphs: Iterable[set[Any]], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the losses depend on besides ``parameters``, each once."""
    known = {id(parameter) for parameter in parameters}
    parents = {parent for nodes in graphs for node in nodes for parent in _parents(node)}
    leaves = [n.variable for n in parents if n.name() == "torch::autograd::AccumulateGrad"]
    return [leaf for leaf in leaves if id(leaf) not in known]


def gradient_node(leaf: Tensor) -> Any:
    """Return the node that adds up a leaf's gradients, for as long as somebody refers to it."""
    node = leaf.view_as(leaf).grad_fn
    assert node is not None
    return node.next_functions[0][0]


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]
