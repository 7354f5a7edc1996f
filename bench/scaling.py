"""``python -m bench.scaling``: predict the time of a step on N ranks.

    time(N) = compute + exposed + gram + update / N + gather

A rank computes on its share of the batch.  A bucket's K gradient rows are on their way as soon as
the backward pass has left its layer; the links carry one bucket after the other, each in

    K (N - 1) latency + (N - 1) / N * bytes / bandwidth        (ring reduce-scatter, row by row)

What is not done when the backward pass ends is exposed: embeddings, and biases and norms, always
are, a bucket each.  Buckets are padded to equal shards.  Gram matrices and losses go up a tree and
down again, 2 log2 N hops.  The new weights are all-gathered by the formula above, as one row.  With
``--replicated`` the rows go along the tree,

    K 2 log2 N latency + 2 (N - 1) / N * bytes / bandwidth

and every rank updates everything, so that nothing is gathered.  The figures that go in are
measured (compute and update on one rank, latency and bandwidth on some); nothing is fitted to what
comes out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich.console import Console
from rich.table import Table

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.gradients.layout import ALIGNMENT

from . import harness


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model: its computation and traffic of a step.

    Attributes:
        buckets: parameters of each bucket, in the order in which the backward pass completes them
            (heads, last layer, ..., first layer).
        late: parameters of each that it completes at its end (embeddings; biases and norms).
        tasks: K gradient rows.
        row_bytes: of a gradient and of a weight that the model computes with, 4 or 2.
    """

    buckets: Sequence[int]
    late: Sequence[int]
    tasks: int
    row_bytes: int

    @property
    def parameters(self) -> int:
        """P."""
        return sum(self.buckets) + sum(self.late)

    def padded(self, owners: int) -> "Model":
        """Return the model with every bucket as long as its equal shards of ``owners`` ranks."""
        multiple = ALIGNMENT * owners
        buckets, late = (
            [-(-size // multiple) * multiple for size in sizes]
            for sizes in (self.buckets, self.late)
        )
        return replace(self, buckets=buckets, late=late)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine: speeds that were measured, or are assumed.

    Attributes:
        forward: seconds of the forward pass of the whole batch on one rank.
        backward: of its backward pass.
        update: of surgery and optimizer on one rank, which all ranks share.
        latency: seconds of one hop of a collective.
        bandwidth: bytes a second that a rank sends while all do.
    """

    forward: float
    backward: float
    update: float
    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of a step on N ranks, and memory of one.

    Attributes:
        compute: forward and backward pass on a rank's share of the batch.
        exposed: waiting for gradients after the backward pass.
        gram: all-reduce of Gram matrices and losses.
        update: surgery and optimizer on a rank's part.
        gather: all-gather of the new weights.
        sent: bytes that a rank sends in a step.
        memory: bytes of weights, gradient rows and moments on a rank.
    """

    compute: float
    exposed: float
    gram: float
    update: float
    gather: float
    sent: float
    memory: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.exposed + self.gram + self.update + self.gather


def predict(
    model: Model, machine: Machine, ranks: int, *, replicated: bool = False, weak: bool = False
) -> Prediction:
    """Go through one step's backward pass bucket by bucket.

    Args:
        model: what is sent.
        machine: how fast.
        ranks: N.
        replicated: all-reduce, every rank updates everything; otherwise each updates its part.
        weak: each rank has a batch as large as one rank's; otherwise they share one.
    """
    share = 1.0 if weak else 1 / ranks
    owners = 1 if replicated else ranks
    model = model.padded(owners)
    exchange = _all_reduce if replicated else _ring
    reduce = partial(exchange, model, machine, ranks, rows=model.tasks)
    computed = machine.forward * share
    link_free = 0.0
    for parameters in model.buckets:
        computed += machine.backward * share * parameters / sum(model.buckets)
        link_free = max(link_free, computed) + reduce(parameters)
    link_free = max(link_free, computed) + sum(map(reduce, model.late))
    times = 2 * model.tasks if replicated else model.tasks + 1
    buckets = (*model.buckets, *model.late)
    return Prediction(
        compute=computed,
        exposed=link_free - computed,
        gram=_hops_of_tree(ranks) * machine.latency,
        update=machine.update / owners,
        gather=sum(_ring(model, machine, owners, size, 1) for size in buckets),
        sent=(ranks - 1) / ranks * _row_bytes(model) * times,
        memory=_memory(model, owners),
    )


def _ring(model: Model, machine: Machine, ranks: int, parameters: int, rows: int) -> float:
    """Return the seconds of a ring reduce-scatter or all-gather."""
    moved = (ranks - 1) / ranks * parameters * model.row_bytes * rows
    return rows * (ranks - 1) * machine.latency + moved / machine.bandwidth


def _all_reduce(model: Model, machine: Machine, ranks: int, parameters: int, rows: int) -> float:
    """Return the seconds of an all-reduce along a tree, which moves all twice."""
    moved = 2 * (ranks - 1) / ranks * parameters * model.row_bytes * rows
    return rows * _hops_of_tree(ranks) * machine.latency + moved / machine.bandwidth


def _hops_of_tree(ranks: int) -> int:
    return 2 * math.ceil(math.log2(ranks))


def _row_bytes(model: Model) -> int:
    return model.parameters * model.row_bytes


def _memory(model: Model, owners: int) -> float:
    """Return the bytes of gradient rows, weights and moments on one of ``owners`` ranks."""
    whole = _row_bytes(model) * (model.tasks + 1)
    if owners == 1:  # in fp32 the weights that are computed with are the masters
        return whole + model.parameters * (8 if model.row_bytes == 4 else 12)
    low = 0 if model.row_bytes == 4 else model.row_bytes
    return whole + model.parameters / owners * (model.row_bytes * model.tasks + 12 + low)


def bert_base(tasks: int, row_bytes: int) -> Model:
    """BERT-base: 12 layers of 7.08 M matrix elements, 23.8 M of embeddings, 0.12 M of vectors."""
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    embeddings = (30522 + 512 + 2) * 768
    vectors = 2 * 768 + 12 * (3 * 768 + 768 + 3072 + 768 + 4 * 768)
    return Model(
        buckets=[10_000, *[layer] * 12],
        late=[embeddings, vectors],
        tasks=tasks,
        row_bytes=row_bytes,
    )


def main() -> int:
    """Print the table for a machine that the options describe."""
    parser = Parser(prog="python -m bench.scaling", description=__doc__)
    add = parser.add_argument
    add("--forward", type=harness.positive, default=0.020, help="seconds of the batch on one rank")
    add("--backward", type=harness.positive, default=0.040, help="seconds, likewise")
    add("--update", type=harness.positive, default=0.002, help="seconds on one rank")
    add("--latency", type=harness.positive, default=10e-6, help="seconds a hop")
    add("--bandwidth", type=harness.positive, default=100e9, help="bytes a second a rank sends")
    add("--tasks", type=harness.whole(1), default=3)
    add("--row-bytes", type=int, choices=[2, 4], default=2)
    add("--ranks", type=harness.whole(1), nargs="+", default=[1, 8, 64, 1024])
    add("--weak", action="store_true", help="a batch for each rank instead of one for all")
    add("--replicated", action="store_true", help="as distribute=replicated does")
    options = harness.parse(parser)
    model = bert_base(options.tasks, options.row_bytes)
    machine = Machine(
        forward=options.forward,
        backward=options.backward,
        update=options.update,
        latency=options.latency,
        bandwidth=options.bandwidth,
    )
    parts = ("step", "compute", "exposed", "gram", "update", "gather")
    table = Table("ranks", "step ms", *parts[1:], "sent MiB", "held GiB")
    records = []
    for ranks in options.ranks:
        one = predict(model, machine, ranks, replicated=options.replicated, weak=options.weak)
        table.add_row(
            str(ranks),
            *(f"{1e3 * getattr(one, part):.2f}" for part in parts),
            f"{one.sent / 2**20:.0f}",
            f"{one.memory / 2**30:.2f}",
        )
        records.append({"ranks": ranks, "step": one.step, **asdict(one)})
    Console(width=100).print(table)
    if options.json is not None:
        harness.write_json(options.json, records, replace=options.force)
    return 0


if __name__ == "__main__":
    exit_with(main)
