"""The one exception by which the engine says that what it was given cannot be used."""


class InputError(Exception):
    """Bad input: a file, a recipe, a folder or an option.

    The message is one line that says what is wrong, where (file and line, key, option) and what
    to do.  The doors (``engine.train`` and the others) print it and exit with status 2; any other
    exception is a defect of the engine.
    """
