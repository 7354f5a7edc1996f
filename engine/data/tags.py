"""Tags of words: the schemes by which they mark entities of several words.

``BIO`` marks the first word of an entity by B-TYPE, its others by I-TYPE, all else by O; ``BIOES``
also its last by E-TYPE, and an entity of one word by S-TYPE; ``IOB1`` has B-TYPE only where an
entity follows another of its type (CoNLL-2003's own files), and is read as BIO.
"""

from collections.abc import Sequence
from typing import Literal

Scheme = Literal["auto", "BIO", "BIOES", "IOB1", "none"]

OUTSIDE = "O"
_BEGINS, _ENDS = ("B", "S"), ("E", "S", OUTSIDE)
_SPELLED = {"BIO": "BI", "BIOES": "BIES", "IOB1": "BI"}


def scheme_of(classes: Sequence[str], scheme: Scheme) -> Scheme:
    """Return the scheme of some tags; ``auto``: as their names say, ``none`` where they say none.

    Raises:
        ValueError: a tag is none of the scheme's.
    """
    prefixes = {name[0] for name in classes if name[1:2] == "-"}
    if scheme == "auto":
        if OUTSIDE not in classes or not prefixes or prefixes - set("BIES"):
            return "none"
        return "BIOES" if prefixes & set("ES") else "BIO"
    if scheme != "none":
        for name in classes:
            if name != OUTSIDE and not (name[:1] in _SPELLED[scheme] and name[1:2] == "-"):
                letters = ", ".join(f"{letter}-TYPE" for letter in _SPELLED[scheme])
                raise ValueError(f"{name!r} is no tag of {scheme}, which has O, {letters}")
    return scheme


def check_tags(tags: Sequence[str], scheme: Scheme) -> Sequence[str]:
    """Return the tags of one text, those of ``IOB1`` as ``BIO``.

    Raises:
        ValueError: an entity has no beginning or, by ``BIOES``, no end; the message says where.
    """
    if scheme == "none":
        return tags
    found: list[str] = []
    before = OUTSIDE
    for number, tag in enumerate([*tags, OUTSIDE]):
        continues = tag[:1] in ("I", "E")
        same = before[:1] in ("B", "I") and before[1:] == tag[1:]
        if continues and not same:
            if scheme != "IOB1":
                raise ValueError(f"{tag} without its B{tag[1:]}, word {number + 1}")
            tag = f"B{tag[1:]}"
        if scheme == "BIOES" and before[:1] in ("B", "I") and not (continues and same):
            raise ValueError(f"{before} without its E{before[1:]}, word {number}")
        found.append(tag)
        before = tag
    return found[:-1]
