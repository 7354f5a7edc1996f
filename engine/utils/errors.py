"""Exceptions for bad input, diverged runs and lost ranks."""

import re

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which terminals obey, those that end lines or turn the order of what is
shown, and halves of characters, which no file can hold."""


def escape(text: str, form: str = "", keep: str = "") -> str:
    """Spell out unprintable characters.

    Args:
        text: with any.
        form: a format of their numbers; empty for Python's own.
        keep: those that stay.
    """

    def spelt(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        return form.format(ord(character)) if form else ascii(character)[1:-1]

    return UNPRINTABLE.sub(spelt, text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class InputError(Exception):
    """Bad input: a file, a recipe, a folder or an option.

    The message is one line that says what is wrong, where (file and line, key, option) and what
    to do.  The commands (``engine.train`` and the others) print it and exit with status 2; any
    other exception is a defect of the engine.
    """

    def __init__(self, message: str) -> None:
        # What was given may be part of the message, with line ends and whatever a terminal obeys.
        line = " ".join(message.splitlines())
        super().__init__(escape(line))


class DivergedError(InputError):
    """Loss, gradients, weights or outputs of the model are not finite any more.

    The message is one line that says what, after which step, what to do, and which checkpoint
    stays.  The commands print it and exit with status 3.
    """


class OutOfMemoryError(InputError):
    """Memory does not suffice for what is asked for; the message says what to make smaller."""


class LostRankError(Exception):
    """Another process of the run died or hangs; this one cannot go on alone.

    The message is one line that names it.  The command prints it and exits with status 75
    (``EX_TEMPFAIL``): starting again with ``--resume`` goes on from the last checkpoint.
    """


class DriftError(LostRankError):
    """The processes of the run compute with different weights or random state.

    All of them raise it.  The message is one line that says which ranks, after which step, what
    differs, and which checkpoint stays.  The command ends as by a lost rank.
    """
