"""Read plain text as examples: one a line, the sentences of a pair with a tab between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from ..utils.untrusted_io import file_size, parse_json
from .addresses import Place
from .blocks import Block, blocks_of, with_text
from .decode import decode, undecoded
from .decompress import decompressed
from .dialect import BUILT_IN, DELIMITERS
from .first_line import has_columns
from .rows import BadRowError, Row, Rows, block_pieces
from .task_schema import TaskSchema


def text_rows(file: IO[bytes], path: Place, format_: TaskSchema, *, sure: bool = True) -> Rows:
    """Return the lines of plain text as the rows of a table without labels and ids.

    Args:
        file: its bytes: UTF-8, or as its byte order mark says.
        path: where it comes from, for error messages; compressed as its ending says.
        format_: of the task.  A line is the sentence, or the two of a pair with a tab between
            them, or the words with blanks between them.
        sure: whether it is known to be text; what looks like a table is refused otherwise.

    Raises:
        InputError: there is no line; also while rows are read.
    """
    text, notes = decode(decompressed(file, file_size(file), path, BUILT_IN), path, BUILT_IN)
    found = with_text(blocks_of(text, path))
    if found is None:
        raise InputError(f"empty, {path}; give a sentence a line")
    beginning, blocks = found
    if not sure:
        _refuse_table(beginning.partition("\n")[0].removesuffix("\r"), path, format_)
    return Rows(block_pieces(blocks, _TextLines(path, format_)), notes)


def _refuse_table(first_line: str, path: Place, format_: TaskSchema) -> None:
    """Refuse a first line that is a header, or a JSON object.

    Raises:
        InputError: it is one.
    """
    columns = format_.columns(labelled=False)
    named = (has_columns(first_line, columns, sign, "csv", header=True) for sign in _SIGNS)
    what = "names the columns of a table" if any(named) else ""
    if first_line.lstrip().startswith("{"):
        try:
            parse_json(first_line)
            what = "is a JSON object"
        except ValueError:
            pass  # a sentence that begins with a brace
    if what:
        raise InputError(
            f"{path}: its first line {what}; give --input-format tsv, csv or jsonl, "
            "or text if it is a sentence"
        )


_SIGNS = (*DELIMITERS.values(), ";")


@dataclass(frozen=True, slots=True)
class _TextLines:
    """Lines that are an example each."""

    path: Place
    format: TaskSchema

    def __call__(self, block: Block) -> Iterator[Row]:
        """Yield the rows of a block."""
        for number, line in block.lines:
            try:
                yield Row(f"{self.path}:{number}", _texts(line, self.format))
            except BadRowError as bad:
                yield Row(f"{self.path}:{number}", bad)


def _texts(line: str, format_: TaskSchema) -> list[str]:
    """Return the texts of a line, one for each column.

    Raises:
        BadRowError: the line has none, or not as many.
    """
    if found := undecoded(line):
        raise BadRowError("not UTF-8", found, "correct the line")
    if "\0" in line:
        raise BadRowError("NUL character", f"at {line.index(chr(0)) + 1}", "correct the line")
    if not line.strip():
        raise BadRowError("empty line", "nothing in it", "correct the line")
    if format_.labels == "words":
        return [dump_json(line.split())]  # a list, so that a bracket is a word like others
    if len(format_.sentences) == 1:
        return [line]
    texts = line.split("\t")
    if len(texts) != len(format_.sentences):
        wanted = f"expected {len(format_.sentences)} with a tab between them"
        raise BadRowError("number of sentences", f"{len(texts)}, {wanted}", "correct the line")
    return texts
