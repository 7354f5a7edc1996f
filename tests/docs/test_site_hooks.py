"""What the site's hooks make: the repository's link and pages, tables of fields and of options."""

import collections
import html
import re

import pytest

pytest.importorskip("mkdocs")
from docs.hooks import command_options, recipe_fields, repository
from engine.__main__ import COMMANDS as CLI
from engine.cli import common
from engine.cli.help import recipe_fields as all_fields
from engine.config.recipe import OF_A_PHASE

from .pages import REPOSITORY, Page

RECIPE, COMMANDS = Page("docs/api/recipe"), Page("commands")


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/them/superbert.git", "https://github.com/them/superbert"),
        ("https://github.com/them/superbert", "https://github.com/them/superbert"),
        ("http://git.example.org:8080/a/b/c.git/", "https://git.example.org:8080/a/b/c"),
        ("https://me:secret@gitlab.com/them/superbert.git", "https://gitlab.com/them/superbert"),
        ("https://token@github.com/them/superbert", "https://github.com/them/superbert"),
        ("git@github.com:them/superbert.git", "https://github.com/them/superbert"),
        (
            "ssh://git@git.example.org:2222/them/superbert.git",
            "https://git.example.org/them/superbert",
        ),
        ("ssh://git@git.example.org/them/superbert.git", "https://git.example.org/them/superbert"),
        ("/srv/git/superbert.git", None),
        ("../superbert", None),
        ("file:///srv/git/superbert.git", None),
        ("http://localhost:3000/superbert", None),
        ("server:superbert.git", None),
        ("", None),
    ],
)
def test_the_repositorys_page(remote: str, address: str | None) -> None:
    assert repository.web_address(remote) == address


@pytest.mark.parametrize(
    ("text", "path", "page", "expected"),
    [
        ("[a](docs/results.md#x)", "README.md", "readme.md", "[a](results.md#x)"),
        ("[`a` b](docs/api/recipe.md)", "README.md", "readme.md", "[`a` b](api/recipe.md)"),
        ("[a](SECURITY.md)", "README.md", "readme.md", "[a](security.md)"),
        ("[a](CITATION.cff), b", "README.md", "readme.md", "a, b"),
        ("![a b](docs/pictures/x.png)", "README.md", "readme.md", "![a b](pictures/x.png)"),
        ("[a](../SECURITY.md)", "docs/policy.md", "policy.md", "[a](security.md)"),
        ("[a](../../README.md#x)", "docs/api/x.md", "api/x.md", "[a](../readme.md#x)"),
        ("[a](../bench/step.py)", "docs/x.md", "x.md", "a"),
        ("[a](notes/y.md) [b](#z)", "docs/x.md", "x.md", "[a](notes/y.md) [b](#z)"),
        ("[a](../results.md)", "docs/notes/y.md", "notes/y.md", "[a](../results.md)"),
        ("[a](https://x.org)", "README.md", "readme.md", "[a](https://x.org)"),
        ("```\n[a](bench)\n```", "README.md", "readme.md", "```\n[a](bench)\n```"),
    ],
)
def test_links_of_the_site(text: str, path: str, page: str, expected: str) -> None:
    assert repository.with_site_links(text, path, page) == expected


def test_the_repositorys_pages_are_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    for name, page in repository.ROOT_PAGES.items():
        assert (REPOSITORY / name).is_file()
        assert f": {page}\n" in text


def test_every_field_is_in_one_table() -> None:
    found = collections.Counter(
        field.key
        for names in recipe_fields.MARKER.findall(RECIPE.text)
        for field in recipe_fields.chosen(names)
    )
    assert found == {field.key: 1 for field in all_fields()}


def test_fields_have_anchors_types_defaults_and_meanings() -> None:
    made = recipe_fields.on_page_markdown(RECIPE.text)
    rows = re.findall(
        r'<tr id="([^"]+)"><td>(.*)</td><td>(.*)</td><td>(.*)</td><td>(.*)</td></tr>', made
    )
    fields = {field.key: field for field in all_fields()}
    assert len(rows) == len(fields)
    for key, *cells in rows:
        name, kind, default, meaning = (html.unescape(re.sub("<.*?>", "", c)) for c in cells)
        assert name == key
        assert kind == fields[key].type
        assert default == fields[key].default
        assert len(meaning) > 3
        assert "``" not in meaning
    anchors = {key for key, *_ in rows}
    links = re.findall(r"\[`(\w+)`\]\(#([\w.]+)\)", made)
    assert [name for name, _ in links] == list(OF_A_PHASE)
    assert {anchor for _, anchor in links} <= anchors
    assert "<!--" not in made


def test_no_table_is_of_a_field_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no_such: no such field"):
        recipe_fields.on_page_markdown("<!-- fields: lr no_such -->")


def test_types_in_words() -> None:
    types = {field.key: field.type for field in all_fields()}
    assert types["lr"] == "number, above 0"
    assert types["micro_batches"] == "whole number, from 1 to 256"
    assert types["dropout"] == "number, from 0, below 1"
    assert types["betas"] == "two numbers, from 0, below 1"
    assert types["pooling"] == "cls, mean"
    assert types["freeze_encoder"] == "true or false"
    assert types["tasks.NAME.source.classes"] == "list of texts, or whole number"
    assert types["optimizer_options"] == "table of values"
    assert types["phases"] == "table of tables"


def test_every_command_has_a_section_and_its_options() -> None:
    names = sorted(CLI)
    listed = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \|", COMMANDS.text, re.MULTILINE)
    assert sorted(listed) == [(name, name) for name in names]
    for name in names:
        section = COMMANDS.section(name)
        assert f"python -m engine.{name}" in section
        assert command_options.MARKER.findall(section) == [f"engine.{name}"]
        made = command_options.on_page_markdown(section)
        anchors = re.findall(r'<tr id="([^"]+)">', made)
        parser = command_options.parser_of(f"engine.{name}")
        options = {o for a in parser._actions for o in a.option_strings[-1:]}
        assert {one.removeprefix(name) for one in anchors if "--" in one} == options - {
            *("--help", "--version"),
        }
        assert f"python -m engine.{name} [-h]" in made


def test_usage_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = "<!-- options: engine.sweep -->"
    made = command_options.on_page_markdown(marker)
    monkeypatch.setenv("COLUMNS", "40")
    assert command_options.on_page_markdown(marker) == made


def test_the_page_has_every_exit_status() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", COMMANDS.section("Exit status"), re.MULTILINE)
    statuses = {int(one) for row in rows for one in row.split(",")}
    known = {0, common.DIED, common.BAD_INPUT, common.DIVERGED, common.LOST_RANK, 141}
    assert statuses == known | {common.STOPPED + number for number in (1, 2, 15)}


def test_the_sites_tools_are_pinned() -> None:
    pinned = (REPOSITORY / "requirements-dev.txt").read_text()
    for tool in ("mkdocs", "mkdocstrings", "pymdown-extensions", "pygments"):
        assert re.search(rf"^{tool}==", pinned, re.MULTILINE), tool


def test_make_docs_ends_at_a_warning() -> None:
    """Strictly: mkdocs counts warnings only where it prints them, so not under ``--quiet``."""
    (line,) = re.findall(r"^\t.*mkdocs build.*$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert "-q" not in line
    assert "\nstrict: true\n" in (REPOSITORY / "mkdocs.yml").read_text()
