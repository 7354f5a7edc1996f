"""Break a training step down into its phases, with its floor and its energy."""

import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from engine.data.collate import PackedBatch
from engine.models.layers import Linear
from engine.training.trainer import Trainer

from . import harness

PRODUCTS = "matrix products"
"""The part of the floor that is timed; the rest is bytes at the measured bandwidth."""


def floor_seconds(trainer: Trainer, batch: PackedBatch, device: torch.device) -> dict[str, float]:
    """Return the least a PCGrad step can take: its matrix products, then two passes of bytes.

    Every weight matrix is multiplied three times, by torch: forward, gradient of the input,
    gradient of the weight, which is a product for each task.  On a GPU exactly these products are
    replayed as a graph.  Surgery reads the rows twice; the update reads and writes weights and
    moments.
    """
    parameters = trainer.parameters
    run = encoder_products(trainer, batch, device)
    if device.type == "cuda":
        replay = harness.graph_replay(run, device)
        samples = harness.device_seconds({"products": replay}, device, rounds=3)
    else:
        samples = harness.interleave({"products": run}, device, rounds=3, warmup=1)
    bandwidth = harness.measure_bandwidth(device)["copy"]
    state = 3 * parameters.master.nbytes
    copy = 0 if parameters.compute is parameters.master else parameters.compute.nbytes
    return {
        PRODUCTS: harness.median(samples["products"]),
        "surgery and update": (2 * parameters.rows.nbytes + 2 * state + copy) / bandwidth,
    }


def encoder_products(
    trainer: Trainer, batch: PackedBatch, device: torch.device
) -> Callable[[], None]:
    """Return what computes all products with weight matrices of the encoder in one step.

    Each layer has weights of its own, as in the step: none is in the cache from the layer before.
    """
    dtype = trainer.parameters.compute.dtype
    shapes = [m.weight.shape for m in trainer.model.encoder.modules() if isinstance(m, Linear)]
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    tokens = batch.num_tokens
    streams = {
        size: torch.randn(tokens, size, device=device).to(dtype)
        for size in {side for shape in shapes for side in shape}
    }
    tasks = list(itertools.pairwise(batch.token_offsets))

    def run() -> None:
        for weight in weights:
            outputs, inputs = (streams[side] for side in weight.shape)
            inputs @ weight.T
            outputs @ weight
            for start, end in tasks:
                outputs[start:end].T @ inputs[start:end]

    return run


def phase_seconds(
    trainer: Trainer, batches: Sequence[PackedBatch], device: torch.device
) -> dict[str, float]:
    """Return the mean seconds of each phase; each is waited for, so their sum exceeds a step."""
    step = trainer.step
    phases = {
        "forward": (trainer.model, "forward"),
        "Gram matrix": (step.groups, "grams"),
        "weights": (step, "balancer"),
        "combine and update": (step.optimizer, "step"),
        "zero word rows": (trainer.model, "zero_sparse_rows"),
    }
    seconds = dict.fromkeys(phases, 0.0)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            harness.synchronize(device)
            start = time.perf_counter()
            result = call(*arguments, **keywords)
            harness.synchronize(device)
            seconds[name] += time.perf_counter() - start
            return result

        return run

    whole = 0.0
    with ExitStack() as stack:
        for name, (owner, attribute) in phases.items():
            wrapped = timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, wrapped))
        for number, batch in enumerate(batches):
            harness.synchronize(device)
            start = time.perf_counter()
            step(batch, number, 1e-5)
            harness.synchronize(device)
            whole += time.perf_counter() - start
    named = {name: total / len(batches) for name, total in seconds.items()}
    rest = whole / len(batches) - sum(named.values())
    forward = named.pop("forward")
    return {"forward": forward, "backward and the rest": rest} | named


def joules_a_run(
    contestants: Mapping[str, harness.Contestant], device: torch.device, seconds: float = 1.0
) -> dict[str, float]:
    """Return each contestant's joules a run by the GPU's own meter; empty where there is none.

    The meter is slow, so a contestant runs for ``seconds`` between two readings.
    """
    if device.type != "cuda" or not importlib.util.find_spec("pynvml"):
        return {}
    import pynvml

    joules = {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        for name, run in contestants.items():
            harness.synchronize(device)
            before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
            start, runs = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                run()
                harness.synchronize(device)
                runs += 1
            after = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            joules[name] = (after - before) / 1e3 / runs
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no meter, or one that stopped: a record without joules
        return {}
    return joules
