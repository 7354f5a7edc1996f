"""Read the pages of the documentation, for the tests that run what they show.

A page's Python stands in blocks fenced by `````python``, its commands in indented lines or in
blocks fenced by `````bash`` or `````console`` (there after ``$``).
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
_PROGRAM = (
    r"(?:python -m (?:engine|bench|examples|tests)\b|superbert |torchrun |accelerate launch )"
)
_SHOWN = (
    r"((?:torchrun .*?|accelerate launch .*?|python3? )-m (?:superbert\.)?"
    r"(?:engine|bench|examples|tests)\.[a-z][^`\n]*"
    r"|superbert (?!python|make\b|bash\b)[a-z]+(?: [^`\n]*|$))"
)
_AT_START = re.compile(rf"^(?:\$ )?{_SHOWN}", re.MULTILINE)
_WITHIN = re.compile(
    rf"(?:^(?:\$ )?|[|&;(]\s*|\b(?:do|exec|time) |\brun .*?|\b[A-Z_]+=\S+ ){_SHOWN}", re.MULTILINE
)
_BLOCK = re.DOTALL | re.MULTILINE


class Page:
    """A page of ``docs/``, or another Markdown file of the repository.

    Attributes:
        path: the file.
        text: its content.
    """

    def __init__(self, name: str) -> None:
        self.path: Path = REPOSITORY / name if "/" in name or name.isupper() else DOCS / name
        if not self.path.suffix:
            self.path = self.path.with_suffix(".md")
        self.text = self.path.read_text(encoding="utf-8")

    def section(self, title: str) -> str:
        """Return what is below a heading, up to the next one of its level or above."""
        found = re.search(rf"^(#+) {re.escape(title)}$", self.text, re.MULTILINE)
        assert found is not None, f"{self.path.name} has no section {title!r}"
        rest = self.text[found.end() :]
        # Comments of code begin like headings.
        rest = re.sub(r"^```.*?^```", _without_headings, rest, flags=re.DOTALL | re.MULTILINE)
        end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
        return self.text[found.end() :][: end.start() if end else None]

    def blocks(self, language: str, section: str | None = None) -> list[str]:
        """Return the fenced blocks of a language, of one section or the whole page."""
        text = self.text if section is None else self.section(section)
        found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
        return [textwrap.dedent(code) for _, code in found]

    def run_python(self, section: str | None = None, **names: Any) -> dict[str, Any]:
        """Run all Python blocks, one after the other, in one namespace; return it.

        Args:
            section: run those of this section alone.
            names: what the code takes as given.
        """
        blocks = self.blocks("python", section)
        assert blocks, f"{self.path.name} shows no Python"
        scope: dict[str, Any] = {"__name__": "__main__", **names}
        for number, code in enumerate(blocks, 1):
            exec(compile(code, f"{self.path.name}, block {number}", "exec"), scope)
        return scope

    def commands(self, section: str | None = None) -> list[str]:
        """Return the commands of this project, without ``$``, comments and line breaks."""
        text = self.text if section is None else self.section(section)
        text = text.replace("\\\n", " ")
        lines = re.findall(rf"^(?: {{4,}}|\$ )?(?:\$ )?({_PROGRAM}.*)$", text, re.MULTILINE)
        return [re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", line)).strip() for line in lines]

    def shown_commands(self) -> list[str]:
        """Return every command of this project, from ``python`` or ``torchrun`` on.

        Those within a line, such as behind a pipe, and those in the text are among them, but not
        those within what a program prints.
        """
        scripts = re.findall(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", self.text, _BLOCK)
        lines = re.findall(r"^ *```(?:text)?\n(.*?)^ *```", self.text, _BLOCK)
        rest = re.sub(r"^( *)```.*?^\1```", "", self.text, flags=_BLOCK)
        indented = re.findall(r"^ {4}((?:.*\\\n)*.*)$", rest, re.MULTILINE)
        scripts += [re.sub(r"^ {4}", "", text, flags=re.MULTILINE) for text in indented]
        # Code in the text may break where a line ends.
        lines += [" ".join(text.split()) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
        found = [_WITHIN.findall(text.replace("\\\n", "")) for text in scripts]
        found += [_AT_START.findall(text.replace("\\\n", "")) for text in lines]
        commands = [re.sub(r"\s+#(?: .*)?$", "", one).strip() for own in found for one in own]
        return list(dict.fromkeys(commands))


def all_pages() -> list[str]:
    """Return the names of all pages: those of ``docs/``, README, CONTRIBUTING and SECURITY."""
    below = sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCS.rglob("*.md"))
    return [*below, "README", "CONTRIBUTING", "SECURITY"]


def _without_headings(block: re.Match[str]) -> str:
    return re.sub(r"^#", "·", block[0], flags=re.MULTILINE)
