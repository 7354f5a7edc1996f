"""Fields of a source that one split may have otherwise: ``[tasks.NAME.source.of_split.SPLIT]``."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ..utils.field_types import OneOrSeveral, Settings
from .decode import check_encoding
from .dialect import AUTO, Compression, Layout, Quoting

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _split_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("expected the name of a split: letters (a to z) or digits, with _ and -")
    return name


def _one_character(delimiter: str) -> str:
    if delimiter in (AUTO, "tab"):
        return delimiter.replace("tab", "\t")
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise ValueError('expected one character (no quote, no line end) or "tab"')
    return delimiter


Split = Annotated[str, AfterValidator(_split_name)]
"""The name of a split: ``train``, ``dev``, ``test``, or of a further one."""

Column = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
"""The name of a column, or its number as text or as it is."""

_MOST_TEXTS = 18
"""Of retrieval: an anchor, a passage that answers it, and 16 that do not."""

Text = Annotated[tuple[Column, ...], Field(min_length=1, max_length=_MOST_TEXTS)]
"""The column of a sentence, those of a pair, or of retrieval."""

Label = OneOrSeveral[Column]
"""The column of a label, or those of several labels."""

Delimiter = Annotated[str, AfterValidator(_one_character)]
Encoding = Annotated[str, AfterValidator(check_encoding)]


class SplitSource(Settings):
    """The fields of a source that one split has otherwise; those left out are the source's."""

    text: Text | None = None
    """The columns of the sentences in this split."""
    label: Label | None = None
    """The column of the label in this split, or those of several labels."""
    id: Column | None = None
    """The column that names an example in this split; empty: rows are numbered from 0."""
    layout: Literal["auto", Layout] | None = None
    """The layout of this split's file."""
    delimiter: Delimiter | None = None
    """The character between two fields of this split's file."""
    quoting: Quoting | None = None
    """Whether fields of this split's file may stand in double quotes (csv) or not (none)."""
    header: bool | None = None
    """Whether the first row of this split's file names the columns."""
    encoding: Encoding | None = None
    """The encoding of this split's file."""
    compression: Compression | None = None
    """The compression of this split's file."""

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not left out."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}
