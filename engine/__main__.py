"""``superbert COMMAND``, or ``python -m engine COMMAND``: run a command by its name.

Only the command itself is imported, so that help needs no torch.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import NoReturn

from . import __version__
from .cli.parser import BAD_INPUT, SCRIPT
from .cli.standard_output import exit_with

COMMANDS = {
    "train": "train one encoder on several tasks",
    "evaluate": "score a run",
    "predict": "answer the rows of a file",
    "export": "write a run for transformers, sentence-transformers or onnxruntime",
    "report": "show runs, or the groups of a sweep, as pages, tables and pictures",
    "sweep": "train many settings, and search among them",
    "fill": "show the likeliest words behind [MASK]",
    "glue": "write the files that GLUE's server wants",
    "cache": "show the cache of tokenized data, and make it smaller",
    "env": "show versions, processor, GPUs and the implementations that run here",
}
"""The commands, each a module of this package, and what it does."""


_SHELLS = ("bash",)
_LIBRARY = "libsuperbert"
"""The extension, without which the kernels cannot be imported."""


def run() -> NoReturn:
    """Run the command of this process' command line, and exit with its status."""
    exit_with(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, with the others; return its exit status."""
    given = (sys.argv[1:] if arguments is None else arguments) or ("--help",)
    try:
        return _answer(*given)
    except ImportError as error:
        if error.name != _LIBRARY:
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _answer(name: str, *rest: str) -> int:
    if name in COMMANDS:
        return _run(name, rest)
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"superbert-engine {__version__}")
    elif name == "--completion":
        return _print_completion(*rest[:1])
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"error: {name!a}: no command; {meant}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _run(name: str, arguments: Sequence[str]) -> int:
    command = import_module(f".{name}", __package__)
    if name == "env":  # which runs where nothing else can be imported
        return int(command.main(arguments))
    return int(
        import_module(".cli.common", __package__).status_of(partial(command.main, arguments))
    )


def _print_completion(shell: str = "") -> int:
    if shell not in _SHELLS:
        print(f"error: --completion {shell!a}: expected {', '.join(_SHELLS)}", file=sys.stderr)
        return BAD_INPUT
    completion = import_module(".cli.completion", __package__)
    parsers = {name: import_module(f".{name}", __package__).parser() for name in COMMANDS}
    print(completion.bash_script_of_all(parsers), end="")
    return 0


def _help() -> str:
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {SCRIPT} COMMAND …",
            "",
            "Train one BERT on several tasks, each with a gradient of its own.",
            "",
            *lines,
            "",
            f"{SCRIPT} COMMAND --help shows the options of a command, --version the version, and",
            "--completion bash a script that completes commands, options and settings:",
            f'    eval "$({SCRIPT} --completion bash)"',
        ]
    )


if __name__ == "__main__":
    run()
