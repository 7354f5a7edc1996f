"""Describe the format of a file of examples, by its recipe and its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .addresses import Place

AUTO = "auto"
"""Leaves it to the file: to its ending, its byte order mark, its header."""

Layout = Literal["tabs", "commas", "json", "json_lines", "parquet", "conll", "conllu"]
Quoting = Literal["csv", "none"]
Compression = Literal["auto", "none", "gzip", "bz2", "xz", "zstd"]

LAYOUTS: Mapping[str, Layout] = {
    ".tsv": "tabs",
    ".csv": "commas",
    ".jsonl": "json_lines",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".conllu": "conllu",
}
"""Layouts of files, by their ending."""

DELIMITERS: Mapping[Layout, str] = {"tabs": "\t", "commas": ","}
"""Delimiters between the fields of a row, of the layouts that have one."""

COMPRESSIONS: Mapping[str, Compression] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
}
"""Compression, by the ending behind the file's own: ``train.csv.gz``."""


ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".xlsx")
"""Endings of what holds files rather than being a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The format of a task's files, as far as their names do not decide it."""

    delimiter: str = AUTO
    """The character between two fields of a row."""

    quoting: Quoting = "csv"
    """``csv``: a field may stand in double quotes; ``none``: a quote is a character like others."""

    header: bool = True
    """Whether the first row names the columns; without it they are called 1, 2, …"""

    encoding: str = AUTO
    """A text encoding that Python knows."""

    compression: Compression = "auto"
    """``none`` and the others count whatever the file's ending says."""

    table: str = ""
    """The recipe's table that sets these fields, for messages; empty for a built-in task."""

    def advice(self, setting: str, otherwise: str) -> str:
        """Return what to do about a file: set a field, where a recipe can, or something else."""
        return f"set {self.table}.{setting}, or {otherwise}" if self.table else otherwise


BUILT_IN = Dialect()
"""That of files of which no recipe says anything."""


def endings(path: Place) -> tuple[str, str]:
    """Return the ending that says a file's layout, and the one that says its compression or ''."""
    last = path.suffix.lower()
    if last not in COMPRESSIONS:
        return last, ""
    return path.with_suffix("").suffix.lower(), last
