"""``python -m tests.faults``: the whole report; exit status 1 where it shows a problem."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compare import compare_ranks
from .endurance import endure
from .fuzz import fuzz
from .kills import kill_runs


def report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make every part of the report, each in a folder of its own."""
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "fuzz": lambda path: fuzz(path, options.inputs, options.seed),
        "ranks": lambda path: compare_ranks(path, options.steps),
        "kills": lambda path: kill_runs(path, options.kills, options.seed),
        "endurance": lambda path: endure(path, options.endurance_steps),
    }
    results: dict[str, Any] = {"seed": options.seed}
    for name in options.only or parts:
        (folder / name).mkdir()
        begun = time.monotonic()
        results[name] = parts[name](folder / name)
        results[name]["seconds"] = round(time.monotonic() - begun, 1)
        print(name, json.dumps(results[name], indent=1), file=sys.stderr, flush=True)
    results["problems"] = list(problems(results))
    return results


def problems(results: dict[str, Any]) -> list[str]:
    """Return what is not as it must be, a line each."""
    found = list(results.get("fuzz", {}).get("unhandled", []))
    found += [
        f"kills: {name} ended otherwise" for name in results.get("kills", {}).get("different", [])
    ]
    ranks = results.get("ranks", {})
    found += [f"ranks: {name} gave other bits again" for name in ranks.get("not_repeated", [])]
    found += [
        f"ranks: {name} differs by {value:.2g}, allowed {ranks['allowed']:.2g}"
        for name, value in ranks.get("differences", {}).items()
        if value > ranks["allowed"]
    ]
    for what in ("resident_mib", "open_files"):
        measured = results.get("endurance", {}).get(what)
        # Allocators settle for a while: a twentieth; handles must not grow at all.
        room = 1.05 if what == "resident_mib" else 1.0
        if measured and measured["at the end"] > room * measured["after a tenth"]:
            found.append(f"endurance: {what} grew: {measured}")
    return found


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=50)
    add("--inputs", type=int, default=10_000)
    add("--steps", type=int, default=100, help="of the runs on 1, 2 and 4 ranks")
    add("--endurance-steps", type=int, default=10_000)
    add("--seed", type=int, default=0)
    add("--only", nargs="+", choices=["fuzz", "ranks", "kills", "endurance"])
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        results = report(options, Path(folder))
    text = json.dumps(results, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if results["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
