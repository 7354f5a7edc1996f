"""Every command that a page shows is one that its program takes."""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from engine.cli.help import recipe_fields
from engine.cli.options import overrides
from engine.config import recipe as recipes
from engine.utils.errors import InputError

from .pages import Page, all_pages

COMMANDS = list(
    dict.fromkeys((page, text) for page in all_pages() for text in Page(page).shown_commands())
)
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|…|\.\.\.")
OPEN = {"tasks.NAME.source.files", "tasks.NAME.source.splits", "balancing.fixed"} | {
    *("balancing.preferences", "optimizer_options", "phases")
}
"""Fields that are tables with keys of the user's own."""


class Parsed(Exception):  # noqa: N818
    """What a program's own parser made of a command; nothing of the program runs after it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def words_of(command: str) -> tuple[list[str], str, list[str]]:
    """Return what starts a module, the module, and its arguments, up to a pipe or the like."""
    for quote in "'\"":  # the end of a script that is quoted as a whole
        if command.count(quote) % 2:
            command = command.rpartition(quote)[0]
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in lexer:
        if re.fullmatch(r"[|&;<>()]+", word):
            break
        words.append(word)
    if words[0] == "superbert":
        return ["python"], f"engine.{words[1]}", words[2:]
    at = words.index("-m")
    return words[:at], words[at + 1].removeprefix("superbert."), words[at + 2 :]


def parse(module: str, words: list[str]) -> argparse.Namespace:
    """Give words to the parser of a module's ``main``; fail on those that it does not take."""
    of_class = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(of_class(parser, with_values(parser, words)))

    found = importlib.util.find_spec(module)
    assert found is not None, f"no module {module}"
    name = f"{module}.__main__" if found.submodule_search_locations else module
    program = importlib.import_module(name)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", [module, *words]),
        pytest.raises((Parsed, SystemExit)) as parsed,
    ):
        program.main()
    if isinstance(parsed.value, SystemExit):  # --help, --version, or what it does not take
        assert parsed.value.code == 0
        return argparse.Namespace()
    return parsed.value.options


def with_values(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Return the words with numbers for placeholders of numbers, and without what is left out."""
    numbers = {
        option
        for action in parser._actions
        if action.type is not None and action.type.__name__ in ("int", "float", "positive")
        for option in action.option_strings
    }
    given, option = [], ""
    for word in words:
        shown = re.sub(r"^\[(--[\w-]+)\]$", r"\1", word)  # [--option]: may be left out
        if shown in ("…", "..."):
            continue
        if shown.startswith("--"):
            option = shown
        given.append("1" if option in numbers and PLACEHOLDER.fullmatch(shown) else shown)
    return given


def settings(options: argparse.Namespace) -> Iterator[str]:
    """Yield ``KEY=VALUE`` of all options that set fields of a recipe."""
    for name in ("set", "grid", "tune", "draw"):
        for group in getattr(options, name, None) or []:
            yield from group if isinstance(group, list | tuple) else [group]


def is_field(key: str) -> bool:
    """Tell whether a recipe may have the field; names in capitals stand for any."""
    phase = re.fullmatch(r"phases\.[\w-]+\.(.+)", key)
    if phase:
        return phase[1].split(".")[0] in recipes.OF_A_PHASE and is_field(phase[1])
    known = [field.key for field in recipe_fields()] + [f"{name}.NAME" for name in OPEN]
    patterns = (re.escape(name).replace("NAME", r"[\w-]+") for name in known)
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def test_many_commands_are_found() -> None:
    assert len(COMMANDS) > 120
    assert {page for page, _ in COMMANDS} >= {"README", "docs/commands.md", "docs/results.md"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_programs_take_the_commands_that_pages_show(page: str, command: str) -> None:
    launcher, module, words = words_of(command)
    if launcher[0] == "torchrun":
        given = [re.sub(r"^(N|\$\w+)$", "2", word) for word in launcher[1:]]
        parse_torchrun([*given, "-m", module])
    if not words:  # the program is named
        assert importlib.util.find_spec(module) is not None
        return
    if module == "pytest":
        return
    options = parse(module, words)
    given = list(settings(options))
    for setting in given:
        key, separator, _ = setting.partition("=")
        assert separator, f"{setting}: no KEY=VALUE"
        assert PLACEHOLDER.fullmatch(key) or is_field(key), f"{key}: no field of a recipe"
    names = getattr(options, "recipe", None)
    names = [names] if isinstance(names, str) else names or []
    if hasattr(options, "on_bad_row") and hasattr(options, "set"):
        for name in names:
            if name.endswith(".toml") or PLACEHOLDER.fullmatch(name):
                continue
            # What stands for a value is left out, but not what stands for a model's name.
            pairs = [(one, one.partition("=")[2]) for one in overrides(options)]
            own = [one for one, value in pairs if not PLACEHOLDER.fullmatch(value)]
            recipes.load(name, own)


@pytest.mark.parametrize(
    "command",
    [
        "python -m engine.trian demo --seed 1",
        "python -m engine.train demo --sed 1",
        "python -m engine.train demo --set learningrate=1",
        "python -m engine.train demo --set tasks.topics.head=single",
        "python -m engine.train no_such_recipe --seed 1",
        "python -m engine.train demo --set lr=-1",
        "python -m engine.predict runs/demo --task sst",
        "torchrun --processes 2 -m engine.train demo --seed 1",
        "superbert trian demo --seed 1",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, InputError)):
        test_programs_take_the_commands_that_pages_show("", command)


def test_commands_are_found_wherever_they_stand(tmp_path: Any) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "Run `python -m engine.cache`, or `superbert\ncache --keep 1G`; not superbert things.\n\n"
        "    printf 'a' | python -m engine.predict RUN --task sst \\\n"
        "        --input - --output -\n"
        "    superbert train demo        # a comment\n\n"
        "```bash\ntorchrun --nproc-per-node 2 -m engine.train demo && echo done\n```\n\n"
        '    eval "$(superbert train --completion bash)"\n\n'
        "    docker run superbert python -m engine.cache --keep 2G\n\n"
        "```text\nerror: no file; see python -m engine.train --help\n```\n\n"
        "Not `error: see python -m engine.sweep --help`, nor `from superbert import kernels`.\n\n"
        "```python\nimport superbert  # superbert train\n```\n"
    )
    page = Page("README")
    page.text = path.read_text()
    found = page.shown_commands()
    assert [words_of(command)[1:] for command in found] == [
        ("engine.train", ["demo"]),
        ("engine.predict", ["RUN", "--task", "sst", "--input", "-", "--output", "-"]),
        ("engine.train", ["demo"]),
        ("engine.train", ["--completion", "bash"]),
        ("engine.cache", ["--keep", "2G"]),
        ("engine.cache", []),
        ("engine.cache", ["--keep", "1G"]),
    ]
