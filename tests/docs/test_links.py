"""Every link and picture of every page leads to something that is there, its anchor too."""

import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

from .pages import DOCS, Page, all_pages

markdown = pytest.importorskip("markdown")
from docs.hooks import command_options, recipe_fields  # noqa: E402

HOST = re.compile(r"[a-z][a-z+.-]*:", re.IGNORECASE)
PAGES = [*all_pages(), "CHANGELOG"]


class Elements(HTMLParser):
    """What a page links to and shows, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "img":
            self.pictures.append((given["src"], given.get("alt", "")))


@functools.cache
def elements(path: Path) -> Elements:
    """Return the elements of a page, with what the site's hooks make of it."""
    text = path.read_text(encoding="utf-8")
    for hook in (command_options, recipe_fields):
        text = hook.on_page_markdown(text)
    return Elements(markdown.markdown(text, extensions=["toc", "tables", "fenced_code"]))


@functools.cache
def api_names(path: Path) -> frozenset[str]:
    """Return the names whose docstrings a page shows; names within them have anchors, too."""
    return frozenset(re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def problem(page: Path, link: str) -> str | None:
    """Return what is wrong with a link of a page, or None."""
    if HOST.match(link):
        return None
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if file.startswith("/") or not target.is_relative_to(REPOSITORY):
        return "leads out of the repository"
    if not target.exists():
        return "no such file"
    if page.is_relative_to(DOCS) and target.is_dir():
        return "a folder, which is no page"
    if not anchor:
        return None
    if target.suffix != ".md":
        return "an anchor in a file that is no page"
    is_known = anchor in elements(target).anchors or any(
        anchor == name or anchor.startswith(f"{name}.") for name in api_names(target)
    )
    return None if is_known else f"{target.name} has no such anchor"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = Page(name).path
    found = {link: problem(page, link) for link in elements(page).links}
    assert {link: wrong for link, wrong in found.items() if wrong is not None} == {}


@pytest.mark.parametrize("name", PAGES)
def test_pictures_are_shown_and_described(name: str) -> None:
    page = Page(name).path
    for source, text in elements(page).pictures:
        assert problem(page, source) is None, source
        assert len(text.split()) >= 3, f"{source}: say in the brackets what it shows"
    linked = [link for link in elements(page).links if link.endswith((".png", ".svg", ".jpg"))]
    assert name == "CHANGELOG" or not linked, "show it: ![what it shows](FILE)"


def test_many_links_are_seen() -> None:
    assert sum(len(elements(Page(name).path).links) for name in PAGES) > 200


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("results.md#with-bf16-instructions", None),
        ("api/recipe.md#lora_rank", None),
        ("commands.md#train--set", None),
        ("api/engine.md#engine.training.step", None),
        ("../SECURITY.md", None),
        ("https://example.org/#anything", None),
        ("no-such.md", "no such file"),
        ("results.md#no-such", "results.md has no such anchor"),
        ("api/recipe.md#no_such_field", "recipe.md has no such anchor"),
        ("#no-such", "index.md has no such anchor"),
        ("/results.md", "leads out of the repository"),
        ("../../elsewhere.md", "leads out of the repository"),
        ("notes", "a folder, which is no page"),
    ],
)
def test_wrong_links_are_found(link: str, wrong: str | None) -> None:
    assert problem(DOCS / "index.md", link) == wrong
