r"""``python -m bench.serving RUN TASK TEXTS``: requests a second, alone and packed together.

Clients send requests of one text each, the next one when they have the answer.  Contestants:
``Predictor``, which computes each request by itself, ``RequestBatcher``, which packs those that
wait, and transformers' pipeline on the exported task, one request after the other.
"""

import asyncio
import itertools
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table

from engine import export
from engine.cli.common import Parser, run_cli
from engine.predict import Predictor, RequestBatcher
from engine.utils.errors import InputError

from . import harness

ALONE, PACKED, PEER = "Predictor", "RequestBatcher", "transformers' pipeline"
Ask = Callable[[str], Awaitable[Any]]


async def serve(ask: Ask, texts: Sequence[str], clients: int) -> list[Any]:
    """Let clients ask for all texts; return the answers in their order."""
    answers: list[Any] = [None] * len(texts)
    places = iter(range(len(texts)))

    async def client() -> None:
        for place in places:
            answers[place] = await ask(texts[place])

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def contestants(
    predictor: Predictor, classify: Callable[[str], Any] | None, task: str
) -> dict[str, Callable[[Sequence[str], int], list[Any]]]:
    """Return functions of texts and a number of clients, which answer all."""

    async def alone(text: str) -> Any:
        return (await asyncio.to_thread(predictor, task, [text]))[0].prediction

    def packed(texts: Sequence[str], clients: int) -> list[Any]:
        async def ask_all() -> list[Any]:
            batcher = RequestBatcher(predictor)

            async def ask(text: str) -> Any:
                return (await batcher.predict(task, [text]))[0].prediction

            return await serve(ask, texts, clients)

        return asyncio.run(ask_all())

    made: dict[str, Callable[[Sequence[str], int], list[Any]]] = {
        ALONE: lambda texts, clients: asyncio.run(serve(alone, texts, clients)),
        PACKED: packed,
    }
    if classify is not None:
        made[PEER] = lambda texts, _: [classify(text) for text in texts]
    return made


def main() -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m bench.serving", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder")
    add("task", metavar="TASK", help="a task on single texts, with classes")
    add("texts", type=Path, metavar="TEXTS", help="a file with a text a line")
    add("--clients", nargs="+", type=harness.whole(1, 4096), default=[1, 8, 64])
    add("--requests", type=harness.whole(1, 1 << 20), default=512)
    add("--rounds", type=harness.whole(2), default=5)
    options = harness.parse(parser)
    lines = options.texts.read_text(encoding="utf-8").splitlines()
    texts = list(itertools.islice(itertools.cycle(filter(str.strip, lines)), options.requests))
    if not texts:
        raise InputError(f"{options.texts}: no text; give a file with a text a line")

    device = torch.device("cpu")
    predictor = Predictor(options.run, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "exported"
        export.main([str(options.run), "--task", options.task, "--to", str(folder)])
        pipeline = hf.pipeline(
            "text-classification",
            str(folder),
            trust_remote_code=True,
            dtype=predictor.dtype,
        )
    runs = contestants(predictor, lambda text: pipeline(text, truncation=True), options.task)
    if runs[ALONE](texts, 1) != runs[PACKED](texts, max(options.clients)):
        print("answers of packed requests differ where two classes are equally likely")

    record = harness.Record(options, "serving", device)
    results: dict[str, Any] = {"requests": len(texts), "cases": []}
    table = Table("clients", "contestant", "requests/s", "relative")
    for clients in options.clients:
        calls = {
            name: (lambda run=run, clients=clients: run(texts, clients))
            for name, run in runs.items()
        }
        samples = harness.interleave(calls, device, rounds=options.rounds)
        results["cases"].append({"case": f"{clients} clients", "seconds": samples})
        ours = harness.median(samples[PACKED])
        for name, seconds in samples.items():
            rate = len(texts) / harness.median(seconds)
            relative = harness.median(seconds) / ours
            table.add_row(str(clients), name, f"{rate:,.0f}", f"{relative:.2f}")
        record.write(results)
    Console(width=90).print(table)
    return 0


if __name__ == "__main__":
    run_cli(main)
