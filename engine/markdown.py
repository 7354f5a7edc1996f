"""Text that came from elsewhere, as it stands in Markdown."""

import re

from .errors import UNPRINTABLE

_SIGNS = re.compile(r"[\\`*_\[\]<>#|~$]")
_BACKTICKS = re.compile("`+")


def escaped(text: str) -> str:
    """Return a text on one line whose signs mean nothing; control characters are spelled out."""
    line = UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.splitlines()))
    return _SIGNS.sub(r"\\\g<0>", line)


def fence(text: str) -> str:
    """Return a line of backticks that none in the text ends."""
    longest = max(map(len, _BACKTICKS.findall(text)), default=0)
    return "`" * max(3, longest + 1)
