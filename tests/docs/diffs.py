"""The two sides of a diff that a page shows."""


def sides(diff: str) -> tuple[str, str]:
    """Return the code before and after.

    Args:
        diff: lines that begin with ``-``, ``+`` or a blank; empty ones are of both sides.
    """
    before, after = (
        "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] != other)
        for other in "+-"
    )
    return before, after
