"""Schemes of tags, against all sequences of three and the definition of an entity."""

from itertools import product

import pytest

from engine.data.tags import check_tags, scheme_of

BIO = ("O", "B-X", "I-X", "B-Y", "I-Y")
BIOES = (*BIO, "E-X", "S-X", "E-Y", "S-Y")


def entities(tags: tuple[str, ...], scheme: str) -> bool:
    """Whether tags can be read as entities, by trying every division into spans."""
    if not tags:
        return True
    if tags[0] == "O":
        return entities(tags[1:], scheme)
    kind = tags[0][1:]
    for length in range(1, len(tags) + 1):
        if scheme == "BIO":
            span = ("B" + kind, *["I" + kind] * (length - 1))
        elif length == 1:
            span = ("S" + kind,)
        else:
            span = ("B" + kind, *["I" + kind] * (length - 2), "E" + kind)
        if tags[:length] == span and entities(tags[length:], scheme):
            return True
    return False


@pytest.mark.parametrize(("scheme", "names"), [("BIO", BIO), ("BIOES", BIOES)])
def test_whatever_is_no_sequence_of_entities_is_refused(scheme: str, names: tuple[str, ...]):
    for length in range(4):
        for tags in product(names, repeat=length):
            if entities(tags, scheme):
                assert tuple(check_tags(tags, scheme)) == tags
            else:
                with pytest.raises(ValueError, match="without its"):
                    check_tags(tags, scheme)


def test_iob1_becomes_bio():
    """B only where an entity follows one of its own type; all sequences of three are allowed."""
    assert check_tags(["I-X", "I-X", "B-X", "I-Y", "O", "I-Y"], "IOB1") == [
        *("B-X", "I-X", "B-X", "B-Y", "O", "B-Y")
    ]
    for tags in product(BIO, repeat=3):
        assert entities(tuple(check_tags(tags, "IOB1")), "BIO")


def test_the_line_says_where():
    with pytest.raises(ValueError, match=r"^I-X without its B-X, word 2$"):
        check_tags(["O", "I-X"], "BIO")
    with pytest.raises(ValueError, match=r"^B-X without its E-X, word 1$"):
        check_tags(["B-X", "O"], "BIOES")


@pytest.mark.parametrize(
    ("names", "given", "found"),
    [
        (BIO, "auto", "BIO"),
        (BIOES, "auto", "BIOES"),
        (("NOUN", "VERB"), "auto", "none"),
        (("O", "X"), "auto", "none"),
        (("O", "B-X", "X-Y"), "auto", "none"),  # some other meaning of a hyphen
        (("B-X", "I-X"), "auto", "none"),
        (BIO, "IOB1", "IOB1"),
        (BIO, "none", "none"),
    ],
)
def test_the_scheme_is_what_the_names_say(names, given, found):
    assert scheme_of(names, given) == found


def test_names_that_are_none_of_the_scheme_are_refused():
    with pytest.raises(ValueError, match="'E-X' is no tag of BIO, which has O, B-TYPE, I-TYPE"):
        scheme_of(BIOES, "BIO")
