"""``python -m engine.env``: versions, processor, GPUs, and the implementations that run here."""

from collections.abc import Iterator, Sequence

from .cli.parser import Parser
from .cli.standard_output import exit_with
from .runtime.environment import Facts, describe_environment
from .utils.json_text import dump_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    facts = describe_environment()
    print(dump_json(facts, indent=2) if options.json else "\n".join(_lines(facts)))
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.env",
        description="Show what a report of a problem needs: versions, processor, GPUs, compilers, "
        "and which implementation of each operator runs here.  It names no user, no host and no "
        "folder, works where the extension is not built, and fails on nothing.",
    )
    how = made.add_argument_group("how to show it")
    how.add_argument("--json", action="store_true", help="as JSON (default: as text)")
    return made


def _lines(facts: Facts, indent: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list):
            yield f"{indent}{name}: {', '.join(map(str, value)) or 'none'}"
        else:
            yield f"{indent}{name}: {value}"


if __name__ == "__main__":
    exit_with(main)
