"""``python -m bench.distributed``: time gradient surgery on several ranks beside the plain sum.

Starts 2 and 4 gloo processes on this machine.  Each rank takes its own examples of three tasks
through a transformers encoder, wrapped by DistributedDataParallel, FSDP2 or nothing, and the losses
are added up or balanced.  For every loop there are

    result   weights after a few steps of SGD, beside those of one process with all examples: the
             largest difference, as a share of the largest update, and the same between ranks
    bytes    what a rank sends in a step, counted by the loopback device
    time     of a step, of the slowest rank, interleaved with others and the plain sum: a few loops
             at once, so that their models have space in memory

Dropout is off, so that the results can be compared.  This engine's own steps are timed, too.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kernels
from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.distributed.ranks import Ranks
from engine.runs.run import begin
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.json_text import dump_json

from . import harness
from .baselines import TASKS, PaddedBatch

_LR, _STEPS = 0.05, 3  # of the steps whose results are compared
_TIMEOUT = 120.0
_TOGETHER = 4  # loops whose steps are interleaved, beside the sum's
_SUM = "sum of losses"
_BASE = f"DDP: {_SUM}"


class ThreeTasks(nn.Module):
    """A transformers encoder with the heads of three tasks, without dropout.

    Args:
        folder: the encoder's, in Hugging Face's layout; None: a small BERT with random weights.
    """

    def __init__(self, folder: Path | None) -> None:
        from transformers import AutoConfig, AutoModel, BertConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        super().__init__()
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if folder is None:
            small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = BertConfig(**off, **small, intermediate_size=128)
            self.encoder = AutoModel.from_config(config, add_pooling_layer=False)
        else:
            config = AutoConfig.from_pretrained(folder, **off)
            self.encoder = AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False)
        self.encoder.train()
        width = config.hidden_size
        # All tasks have a head, so that no task leaves parameters without a gradient to a rank.
        self.heads = nn.ModuleDict(
            {
                "sst": nn.Linear(width, 5),
                "quora": nn.Linear(2 * width, 1),
                "sts": nn.Linear(width, 8),
            }
        )

    def forward(self, batch: PaddedBatch) -> list[Tensor]:
        """Return each task's loss, its sentences one padded batch."""
        return [
            self.loss(task, [self._embed(ids, mask) for ids, mask in sentences], labels)
            for task, sentences, labels in zip(TASKS, batch.sentences, batch.labels, strict=True)
        ]

    def loss(self, task: str, sentences: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return a task's loss; ``sentences`` are those of its columns, ``[n, H]`` each."""
        if task == "sts":
            return F.mse_loss(5 * F.cosine_similarity(*map(self.heads[task], sentences)), labels)
        logits = self.heads[task](torch.cat(list(sentences), dim=1))
        if task == "sst":
            return F.cross_entropy(logits, labels.long())
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), labels)

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _means(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


class Joined(nn.Module):
    """The encoder on the sentences of all tasks: one padded batch, which ``accelerate`` packs."""

    def __init__(self, inner: ThreeTasks) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Return the sentences' means ``[S, H]``, those of a column one after the other."""
        pairs = [pair for sentences in batch.sentences for pair in sentences]
        longest = max(ids.shape[1] for ids, _ in pairs)
        ids, mask = (
            torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
            for parts in zip(*pairs, strict=True)
        )
        return self.inner._embed(ids, mask)


def _means(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


# ---- loops ---------------------------------------------------------------------------------------

Step = Callable[[PaddedBatch], None]


class PublishedPCGrad:
    """PCGrad as it is usually written: ``torch.autograd.grad`` for each loss, then projections.

    DistributedDataParallel does not see these gradients.  With ``loss.backward(retain_graph=True)``
    instead, as in the widely copied class, it ends the second backward pass with an error.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        """Project in the tasks' order, so that one process can be compared."""
        gradients = []
        for loss in losses:
            found = torch.autograd.grad(
                loss, self._parameters, retain_graph=True, allow_unused=True
            )
            of_task = [
                torch.zeros_like(p) if gradient is None else gradient
                for p, gradient in zip(self._parameters, found, strict=True)
            ]
            gradients.append(torch.cat([gradient.flatten() for gradient in of_task]))
        projected = [gradient.clone() for gradient in gradients]
        for mine in projected:
            for other in gradients:
                dot = torch.dot(mine, other)
                if dot < 0:
                    mine -= dot * other / other.norm() ** 2
        combined = torch.stack(projected).mean(0)
        sizes = [p.numel() for p in self._parameters]
        for parameter, gradient in zip(self._parameters, combined.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()


def make_step(loop: str, model: ThreeTasks, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    """Return what trains once.

    Args:
        loop: how the losses are used, by name, "accelerated" or not.
        model: the model, which ``accelerate`` may change.
        wrap: puts it, or the encoder on joined batches, into a wrapper.
    """
    if "accelerated" in loop:
        kernels.accelerate(model.encoder)
    if "TaskGradients" in loop:
        return _step_with_task_gradients(model, wrap)
    wrapped = wrap(model)
    parameters = list(wrapped.parameters())
    optimizer = torch.optim.SGD(parameters, _LR)
    if loop.startswith(_SUM):

        def backward(losses: Sequence[Tensor]) -> None:
            sum(losses).backward()  # type: ignore[attr-defined]

    elif loop.startswith("published PCGrad"):
        backward = PublishedPCGrad(parameters).pc_backward
    elif loop.startswith("CAGrad"):
        optimizer = kernels.BalancedOptimizer(optimizer, kernels.balancing.cagrad)
        backward = optimizer.backward
    else:
        optimizer = kernels.PCGrad(optimizer)
        backward = optimizer.pc_backward

    def step(batch: PaddedBatch) -> None:
        optimizer.zero_grad()
        backward(wrapped(batch))
        optimizer.step()

    return step


def _step_with_task_gradients(model: ThreeTasks, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    joined = Joined(model)
    task_gradients = kernels.TaskGradients(joined, len(TASKS))
    wrapped = wrap(joined)
    inner = torch.optim.SGD(model.parameters(), _LR)
    optimizer = kernels.PCGrad(inner, task_gradients=task_gradients)

    def step(batch: PaddedBatch) -> None:
        optimizer.zero_grad()
        losses = []
        with task_gradients.batch([sum(sizes) for sizes in batch.columns]):
            parts = iter(wrapped(batch).split(list(itertools.chain(*batch.columns))))
            for number, task in enumerate(TASKS):
                own = [next(parts) for _ in batch.columns[number]]
                with task_gradients.task(number):
                    losses.append(model.loss(task, own, batch.labels[number]))
        optimizer.pc_backward(losses)
        optimizer.step()

    return step


def _fsdp(module: nn.Module, replicas: int = 1) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    shape, names = ((ranks,), ("shard",))
    if replicas > 1:
        shape, names = (replicas, ranks // replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (m for m in module.modules() if isinstance(m, nn.ModuleList)):
        for one in layer:
            fully_shard(one, mesh=mesh)
    return fully_shard(module, mesh=mesh)


_WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "process group": lambda module: module,
    "FSDP2": _fsdp,
    "HSDP, 2 replicas": lambda module: _fsdp(module, 2),
}
_LOOPS = {
    "DDP": (
        *(_SUM, "published PCGrad", "PCGrad", "CAGrad", "TaskGradients, PCGrad"),
        *(f"{_SUM}, accelerated", "PCGrad, accelerated", "TaskGradients, PCGrad, accelerated"),
    ),
    "process group": ("PCGrad",),
    "FSDP2": (_SUM, "PCGrad"),
    "HSDP, 2 replicas": (_SUM, "PCGrad"),
}


def contestants(ranks: int) -> Iterator[tuple[str, str]]:
    """Yield wrappers and loops, those whose mesh has so many ranks."""
    for wrapper, loops in _LOOPS.items():
        if not wrapper.startswith("HSDP") or ranks >= 4:
            yield from ((wrapper, loop) for loop in loops)


# ---- a rank --------------------------------------------------------------------------------------


def _whole(parameters: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
        return torch.cat([p.detach().flatten() for p in whole])


def _method(loop: str) -> str:
    return next((name for name in (_SUM, "published", "CAGrad") if loop.startswith(name)), "PCGrad")


def _reference(
    method: str, options: argparse.Namespace, batches: list[list[PaddedBatch]]
) -> Tensor:
    """Return the weights that one process trains with the examples of all ranks.

    Args:
        method: a loop's.
        options: the benchmark's.
        batches: of each step those of all ranks.
    """
    model = ThreeTasks(options.init)
    optimizer: Any = torch.optim.SGD(model.parameters(), _LR)
    if method == "CAGrad":
        optimizer = kernels.BalancedOptimizer(
            optimizer, kernels.balancing.cagrad, process_group=None
        )
    elif method == "PCGrad":
        optimizer = kernels.PCGrad(optimizer, process_group=None)
    for of_ranks in batches:
        optimizer.zero_grad()
        by_rank = [model(batch) for batch in of_ranks]
        losses = [sum(own) / len(own) for own in zip(*by_rank, strict=True)]
        if method == _SUM:
            sum(losses).backward()
        elif method == "published":
            PublishedPCGrad(list(model.parameters())).pc_backward(losses)
        else:
            backward = getattr(optimizer, "pc_backward", optimizer.backward)
            backward(losses)
        optimizer.step()
    return _whole(list(model.parameters()))


def _compare(
    loop: str,
    wrapper: str,
    options: argparse.Namespace,
    batches: list[list[PaddedBatch]],
    references: dict[str, Tensor],
) -> dict[str, float]:
    """Train a few steps; return how far this loop is from one process, and the ranks are apart.

    The first rank keeps what one process trained, by method.
    """
    model = ThreeTasks(options.init)
    before = _whole(list(model.parameters()))
    step = make_step(loop, model, _WRAPPERS[wrapper])
    for of_ranks in batches:
        step(of_ranks[dist.get_rank()])
    found = _whole(list(model.parameters()))
    first = found.clone()
    dist.broadcast(first, 0)
    apart = (found - first).abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    result = torch.zeros(2)
    if dist.get_rank() == 0:
        method = _method(loop)
        if method not in references:
            references[method] = _reference(method, options, batches)
        wanted = references[method]
        update = (wanted - before).abs().max()
        result = torch.stack([(found - wanted).abs().max(), apart]) / update
    dist.broadcast(result, 0)
    return dict(zip(("from_one_process", "between_ranks"), result.tolist(), strict=True))


def _bytes_sent() -> int:
    """Return the bytes that the loopback device has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    own = next(line for line in lines if line.strip().startswith("lo:"))
    return int(own.split(":")[1].split()[8])


def _engine(distribute: str, options: argparse.Namespace, ranks: Ranks) -> Trainer:
    settings = [*("precision=fp32", "execution=eager", "balance=pcgrad", "dropout=0")]
    settings += [f"distribute={distribute}", f"batch_size={options.batch_size * ranks.size}"]
    for key, value in (("data", options.data), ("init", options.init)):
        if value is not None:
            settings.append(recipes.override(key, str(value.absolute())))
    run = begin(recipes.load("cgs", settings), Path("not-written"))
    return build_trainer(run, torch.device("cpu"), ranks)


def _first(trainer: Trainer, count: int) -> list[PackedBatch]:
    with contextlib.closing(trainer.loader(0)) as loader:
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def work(options: argparse.Namespace) -> None:
    """Be one rank: measure all loops, and let the first rank write what was found."""
    ranks, device = Ranks.from_environment(), torch.device("cpu")
    with ranks.init(device, _TIMEOUT):
        with ranks.main_first():
            trainer = _engine("replicated", options, ranks)
        own = _first(trainer, max(options.rounds + 1, _STEPS))
        batches = _of_all_ranks(own, ranks)
        kernels.keep_freed_memory()
        loops = {f"{wrapper}: {loop}": (wrapper, loop) for wrapper, loop in contestants(ranks.size)}
        references: dict[str, Tensor] = {}
        results: dict[str, Any] = {
            name: _compare(loop, wrapper, options, batches[:_STEPS], references)
            for name, (wrapper, loop) in loops.items()
        }

        def make(name: str) -> Callable[[int], object]:
            if name in loops:
                wrapper, loop = loops[name]
                step = make_step(loop, ThreeTasks(options.init), _WRAPPERS[wrapper])
                return lambda turn: step(batches[turn][ranks.rank])
            trainer = _engine(name.rpartition(" ")[2], options, ranks)
            return lambda turn: trainer.step([own[turn]], turn, 1e-5)

        results |= {f"this engine, {way}": {} for way in ("replicated", "sharded")}
        others = [name for name in results if name != _BASE]
        for begin in range(0, len(others), _TOGETHER):
            names = [_BASE, *others[begin : begin + _TOGETHER]]
            found = _time({name: make(name) for name in names}, options.rounds)
            gc.collect()  # models and wrappers refer to each other
            for name in names[1:]:
                results[name] |= found[name] | {"seconds_of_first": found[_BASE]["seconds"]}
            results[_BASE] |= found[_BASE] | {"seconds_of_first": found[_BASE]["seconds"]}
    if ranks.is_main:
        (options.worker / "results.json").write_text(dump_json(results))


def _of_all_ranks(own: list[PackedBatch], ranks: Ranks) -> list[list[PaddedBatch]]:
    """Return the padded batches of all ranks: of each step one a rank."""
    gathered: list[Any] = [None] * ranks.size
    dist.all_gather_object(gathered, own)
    return [
        [PaddedBatch(batch, torch.device("cpu")) for batch in of_step]
        for of_step in zip(*gathered, strict=True)
    ]


def _time(steps: dict[str, Callable[[int], object]], rounds: int) -> dict[str, Any]:
    """Time loops in turn: the slowest rank's seconds, and bytes that a rank sends."""
    names = list(steps)
    found: dict[str, Any] = {name: {"seconds": [], "bytes": []} for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            sent, begun = _bytes_sent(), time.perf_counter()
            steps[name](turn)
            seconds = torch.tensor(time.perf_counter() - begun)
            dist.barrier()
            sent = _bytes_sent() - sent
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if turn:  # the first is a warm-up
                found[name]["seconds"].append(float(seconds))
                found[name]["bytes"].append(sent // dist.get_world_size())
    return found


# ---- the command ---------------------------------------------------------------------------------


def launch(ranks: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Start so many ranks of this program; return what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        worker = ["-m", __spec__.name, *arguments, "--worker", folder]
        command = [sys.executable, "-m", *torchrun, *worker]
        if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            raise SystemExit(f"a rank of {ranks} failed; its message is above")
        found: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text())
        return found


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = Parser(prog="python -m bench.distributed", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="data folder (default: the demo corpus)")
    add("--init", type=Path, help="model folder (default: a small BERT, random)")
    add("--ranks", type=harness.whole(2, 64), nargs="+", default=[2, 4])
    add("--batch-size", type=harness.whole(1), default=8, help="examples a task and rank")
    add("--rounds", type=harness.whole(2), default=5)
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = harness.parse(parser)
    if options.worker is not None:
        work(options)
        return
    arguments = [f"--batch-size={options.batch_size}", f"--rounds={options.rounds}"]
    folders = {"data": options.data, "init": options.init}
    arguments += [f"--{name}={path.absolute()}" for name, path in folders.items() if path]
    console, results = Console(width=120), {}
    record = harness.Record(options, "distributed", torch.device("cpu"))
    for ranks in options.ranks:
        results[f"{ranks} ranks"] = launch(ranks, arguments)
        record.write(results)
        console.print(_table(f"{ranks} ranks", results[f"{ranks} ranks"]))


def _table(title: str, results: dict[str, Any]) -> Table:
    table = Table(title=title)
    table.add_column("wrapper: loop")
    for heading in ("from one process", "between ranks", "MB sent", "seconds", "times the sum"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        seconds, base = (harness.median(found[key]) for key in ("seconds", "seconds_of_first"))
        differences = [
            f"{found[key]:.0e}" if key in found else "-"
            for key in ("from_one_process", "between_ranks")
        ]
        sent = harness.median(found["bytes"]) / 1e6
        table.add_row(name, *differences, f"{sent:.1f}", f"{seconds:.3f}", f"{seconds / base:.2f}")
    return table


if __name__ == "__main__":
    exit_with(main)
