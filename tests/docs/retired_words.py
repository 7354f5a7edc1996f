"""Refuse retired words: ``python -m tests.docs.retired_words`` lists each with its place.

Comments, docstrings and identifiers of Python files are searched, and whole pages of Markdown; not
string literals, such as the old names that still work and warn.  Exempt are the changelog and the
page on migrating, which name what was.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from ..conftest import REPOSITORY

EXEMPT = {
    *("CHANGELOG.md", "docs/migrating.md"),
    *("tests/docs/retired_words.py", "tests/docs/test_retired_words.py"),
}


class Retired(NamedTuple):
    """A retired word.

    Attributes:
        pattern: a regular expression, matched as a word of text, or of an identifier that
            underscores join; in text without regard to case.
        instead: what to say.
        identifiers_only: ordinary English in text, so looked for in Python's identifiers alone, as
            a whole and with its case.
    """

    pattern: str
    instead: str
    identifiers_only: bool = False


def _names(instead_of: dict[str, str]) -> tuple[Retired, ...]:
    return tuple(Retired(old, new, identifiers_only=True) for old, new in instead_of.items())


RETIRED = (
    # Metaphors.
    Retired("doors?", "command, entry point, function"),
    Retired("rooms", "package, module"),
    Retired("house", "project, layout"),
    Retired("strangers?", "untrusted files"),
    Retired("wip(?:e[ds]?|ing)", "zero"),
    Retired("bad days", "failures"),
    Retired("(?:lying|lie|lies) ready", "preinstalled"),
    Retired("(?:brings?|bringing|brought) along", "hold, have"),
    Retired("listened to", "needs backward hooks"),
    Retired("(?:is|are|was|were|be) parted", "split, divided"),
    Retired("parted (?:into|among)", "split, divided"),
    # Titles of pages.
    Retired("Models in and out", "Loading and exporting models"),
    Retired("What a change owes", "Required tests"),
    # Modules and folders.
    Retired(
        r"engine[./](?:door|fields|frozen|many|names|options|order|origins|pack|part|parts|read|"
        r"reading|record|rooms|rows|sample|saver|settings|shapes|sinks|states|step_lines|stop|"
        r"traffic|watch|wording|card|pictures|huggingface|exchange|failure|formats)",
        "the module's place now (docs/how-it-works.md, Folders)",
    ),
    Retired(r"kernels[./](?:hf|doors|layer_norm_doors)", "kernels.integrations"),
    Retired(r"layer_norm_doors", "layer_norm_compat"),
    Retired(r"tests[./](?:faults|doors|algorithm1|spoil)", "tests.robustness and others"),
    Retired(
        r"bench[./](?:peers|step_parts|new_user)", "baselines, step_breakdown, readme_walkthrough"
    ),
    # Fields of a recipe.
    Retired("watch_layers", "log_layer_cosines_every"),
    Retired(
        r"--set (?:\S+ )*['\"]?(?:surgery|order|limit|sinks)=\S+",
        "balance_granularity, task_schedule, max_train_examples, loggers",
    ),
    Retired(
        r"(?:tasks\.\w+\.(?:features|first(?!_))|objectives\.\w+\.limit)",
        "tasks.NAME.head, tasks.NAME.first_n, objectives.NAME.max_per_source",
    ),
    # Identifiers.
    *_names(
        {
            "Alone": "NoSync",
            "Balance": "Balancer",
            "Cell": "RunSpec",
            "Decision": "BalancerOutput",
            "EXTENTS": "GRANULARITIES",
            "Extent": "Granularity",
            "FileFormat": "TaskSchema",
            "Order": "TaskSchedule",
            "Parts": "ParamGroups",
            "Saver": "AsyncWriter",
            "Training": "Trainer",
            "Turn": "ScheduledBatch",
            "algorithm1": "reference_pcgrad",
            "auxiliary_pcgrad": "main_aux",
            "beside": "adapter, sibling, neighbour",
            "columns_reached_by": "columns_used_by",
            "first_site": "first_dropout_id",
            "first_state": "initial_state",
            "in_turn": "main_first",
            "is_sound": "is_worth_saving",
            "num_sites": "num_dropouts",
            "operator_checks": "the *_checks module of the operator's folder",
            "publish": "gather_params",
            "reached_by": "tasks_using",
            "regions": "segments",
            "run_door": "run_cli",
            "spoilt": "corrupted",
            "value_checks": "validation",
            "wipe_": "zero_rows_",
            "with_states": "precompute_hidden_states",
        }
    ),
)

_TEXT = [
    (re.compile(rf"(?<![^\W_]){r.pattern}(?![^\W_])", re.I), r)
    for r in RETIRED
    if not r.identifiers_only
]
_IDENTIFIERS = {r.pattern: r for r in RETIRED if r.identifiers_only}


def find_in_text(text: str) -> Iterator[tuple[int, str, Retired]]:
    """Yield the line (from 0), the word and its entry for each retired word of a text."""
    for number, line in enumerate(text.split("\n")):
        for pattern, entry in _TEXT:
            yield from ((number, found[0], entry) for found in pattern.finditer(line))


def find_in_python(source: str) -> Iterator[tuple[int, str, Retired]]:
    """Yield the same for comments, docstrings and identifiers."""
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0] - 1
        is_docstring = token.type == tokenize.STRING and begins_statement
        if token.type in (tokenize.COMMENT, tokenize.NAME) or is_docstring:
            for number, word, entry in find_in_text(token.string):
                yield line + number, word, entry
        if token.type == tokenize.NAME and token.string in _IDENTIFIERS:
            yield line, token.string, _IDENTIFIERS[token.string]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def find_in(path: str) -> Iterator[str]:
    """Yield a line of output for each retired word of a file of the repository."""
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    for line, word, entry in (find_in_python if path.endswith(".py") else find_in_text)(text):
        yield f"{path}:{line + 1}: {word!r} is retired; say: {entry.instead}"


def searched_files() -> list[str]:
    """Return the files of the repository that are searched."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md"]
    names = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [
        name
        for name in names.stdout.splitlines()
        if name not in EXEMPT and (REPOSITORY / name).is_file()
    ]


if __name__ == "__main__":
    found = [line for path in searched_files() for line in find_in(path)]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
