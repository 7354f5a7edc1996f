r"""``python -m bench.run_memory``: the memory of a run, in parts, with settings that lower it.

    python -m bench.run_memory --data DIR --init MODEL --json bench/results/cpu-bf16/run_memory.json

The parts are those of ``engine.train --dry-run``.  Each row of the table is the recipe with one
more setting, alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from engine.cli.common import Parser, run_cli
from engine.config import recipe as recipes
from engine.runs.run import begin
from engine.runtime.cpu import set_threads
from engine.training.build import build_trainer
from engine.training.memory_parts import MemoryMeter
from engine.utils.errors import InputError

from . import harness

SETTINGS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "micro_batches=4": ("micro_batches=4",),
    "checkpoint_layers=true": ("checkpoint_layers=true",),
    "both": ("micro_batches=4", "checkpoint_layers=true"),
    "max_length=32": ("max_length=32",),
    "batch_size=8": ("batch_size=8",),
    "precision=fp32": ("precision=fp32",),
    "task_schedule=round_robin": ("task_schedule=round_robin",),
    "balance=sum": ("balance=sum",),
    "optimizer=sgd": ("optimizer=sgd", "momentum=0"),
    "optimizer=adafactor": ("optimizer=adafactor",),
    "lora_rank=8": ("lora_rank=8",),
    "freeze_encoder=true": ("freeze_encoder=true",),
    "ema_decay=0.999": ("ema_decay=0.999",),
}
"""Settings by what the table calls them."""
_MIB = 1 << 20


def measure(
    recipe: str, settings: Sequence[str], names: Sequence[str] = tuple(SETTINGS)
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield bytes of each part of the memory, without the process itself, for each setting.

    Args:
        recipe: its name or file.
        settings: of all rows.
        names: of ``SETTINGS``.
    """
    for name in names:
        resolved = recipes.load(recipe, [*settings, *SETTINGS[name]])
        set_threads(resolved.threads, 1)
        device = torch.device("cpu")
        meter = MemoryMeter(device)
        trainer = build_trainer(begin(resolved, Path("not-written")), device)
        with closing(trainer.loader(0)) as loader:
            batches = zip(*[iter(loader)] * resolved.micro_batches, strict=False)
            first = next(batches)
            with meter.step(trainer, first):
                trainer.step(first, 0, trainer.lr_schedule(0))
        parts = asdict(meter.predict(trainer))
        del parts["process"]
        yield name, parts


def main() -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m bench.run_memory", description=__doc__)
    add = parser.add_argument
    add("recipe", nargs="?", default="cgs", help="name or file (default: cgs)")
    add("--data", type=Path, metavar="DIR", help="folder of the data files")
    add("--init", type=Path, metavar="DIR", help="pretrained encoder; lora_rank needs one")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all rows")
    options = harness.parse(parser)
    settings = list(options.set)
    for key, folder in (("data", options.data), ("init", options.init)):
        if folder is not None:
            settings.append(recipes.override(key, str(folder.absolute())))
    if options.init is None:
        raise InputError("--init: needed, since lora_rank updates a pretrained encoder")
    record = harness.Record(options, "run_memory", torch.device("cpu"))
    results: dict[str, dict[str, int]] = {}
    for name, parts in measure(options.recipe, settings):
        results[name] = parts
        record.write({"recipe": options.recipe, "settings": options.set, "bytes": results})
        cells = ", ".join(f"{part} {size / _MIB:.1f}" for part, size in parts.items())
        print(f"{name}: {cells} MiB", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
