"""The exceptions that are no defects of the engine."""


class InputError(Exception):
    """Bad input: a file, a recipe, a folder or an option.

    The message is one line that says what is wrong, where (file and line, key, option) and what
    to do.  The doors (``engine.train`` and the others) print it and exit with status 2; any other
    exception is a defect of the engine.
    """

    def __init__(self, message: str) -> None:
        # What was given may be part of the message, line ends and all.
        super().__init__(" ".join(message.splitlines()))


class LostRankError(Exception):
    """Another process of the run died or hangs; this one cannot go on alone.

    The message is one line that names it.  The door prints it and exits with status 75
    (``EX_TEMPFAIL``): starting again with ``--resume`` goes on from the last checkpoint.
    """
