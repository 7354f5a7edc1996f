"""Prepare text for pictures: no formulas, no missing glyphs, short."""

import unicodedata
from functools import cache
from types import MappingProxyType
from typing import Any

from matplotlib.font_manager import FontProperties, findfont, get_font

_FONT = "DejaVu Sans"
"""Comes with matplotlib."""

LITERAL: Any = MappingProxyType(
    {"font.family": _FONT, "text.parse_math": False, "text.usetex": False}
)
"""The settings of matplotlib under which text is drawn as it is."""

_LONGEST = 28
"""Characters of a label."""
_END = 8
"""Of these, those behind the gap in a longer name."""


def label(name: str) -> str:
    r"""Return a name as it can be drawn, and told from others.

    What the font has no glyph for, or what would not be seen, is spelled out (``\u4f60``); a long
    name loses its middle.
    """
    text = "".join(c if _is_drawn(c) else ascii(c)[1:-1] for c in name)
    if not text.strip():
        return repr(text)
    if len(text) > _LONGEST:
        return f"{text[: _LONGEST - _END - 1]}…{text[-_END:]}"
    return text


def _is_drawn(character: str) -> bool:
    if character == " " or "!" <= character <= "~":
        return True
    hidden = unicodedata.category(character)[0] in "CZ"  # controls, directions, odd spaces
    return not hidden and ord(character) in _glyphs()


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())
