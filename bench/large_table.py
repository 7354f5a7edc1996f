"""Write a large table of sentence pairs in Quora's columns, the same one under the same seed.

Words are common English ones and others put together from English stems and affixes.  How often
each occurs follows Zipf's law, so that BERT's vocabulary splits the text as it splits real
questions: 1.29 tokens a word, mark included (1.25 in Quora's).  Labels say nothing.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.utils.rng import permutation, uniforms

COLUMNS = ("", "id", "sentence1", "sentence2", "is_duplicate")
"""Quora's: the first, a row's number, has no name."""

_BLOCK = 10_000
"""Rows that are drawn and held at one time."""
_LENGTHS = (4, 14)
"""Fewest and most words of a sentence."""


def _words(text: str) -> list[str]:
    return text.split()


# The most frequent first.
_COMMON = _words("""
the of and to in a is that for it as was with be by on not he i this are or his from at
which but have an had they you were their one all we can her has there been if more when will would
who so no what how why do does my your best way get people make good like india should know use if
time out up about into than them other new some could these two may first then any now our over such
me even most after also did many off before must well back through years where much down because
each just state those too little world very year still see work life being here between both under
never same last another while us might great old against come go think long say which long day find
take learn money english country school start better job facebook google book phone water become
help name feel want need difference mean happen movie language college engineering student women men
girl love read write play study government business company computer science online free write war
history number human car food house body friend live change give look buy every really ever without
someone something anything any using doing going having own next right left small big high low open
long hard real true full early late young public social political international american indian
website video music game account password email android iphone software data program programming""")
_STEMS = _words("""
act add agree aid aim air appear apply argue arm arrive art ask attack attend back bake
band bank base bat bear beat begin bend bet bid bill bind block board boil bond book box brain brand
break breed brush build burn camp care carry cast catch charge chart check choose claim class clean
clear climb close cloud coach coast code collect color comb come cook cool cost count course cover
craft crash create cross crowd cure cut cycle damp dance deal debt deep defend dig dine direct
discover dish divide doubt draft drain draw dream dress drift drink drive drop dry dust earn edge
edit elect end engine enjoy enter even exam expect express face fail fair fall farm fast fear feed
fight file fill film filter fish fit fix flash float flood flow fold follow force form frame freeze
friend front fruit gain garden gate gather glass gold grade grant grass green grip ground group grow
guard guess guide habit hand hang heal hear heat help hide hike hire hold hook hope host hunt ice
inspect invent invest join joke judge jump keep kick kill kind knock land laugh launch law lead leaf
lean learn leave lend level lift light limit link list load lock look loss love machine mail major
manage map mark market master match mean measure melt mend mind mix model move need nest net note
notice object offer open order pack paint pair park part pass past pay peak phone pick plan plant
plate play plot point pole post pour power press print proof pull pump push question race rail rain
raise rank rate reach read reason record reform rent repair report rest ride ring rise river road
rock roll roof root round rule run sail salt sand save scale school score search seat seed seem sell
send sense serve set shade shake shape share sharp shift ship shoot shop short show sing sit skill
sleep slide slip slow smart smell smoke snow soil sort sound speak spell spend spin split sport
spread spring square stage stand start state stay steal steam steel step stick stock stop store
storm stream street stretch strike study style suit surf sweep swim swing switch table talk taste
teach team tear tell test text think throw tick tie time tip tool touch tour track trade train
travel treat tree trend trick trip trust try turn type unit value view visit voice vote wait walk
wall warm wash waste watch wave wear weather weigh wheel wild win wind wish wonder wood word work
worth wrap yard yield zone""")
_INFLECTIONS = ("s", "ing", "ed", "er")
_SUFFIXES = ("ers", "able", "less", "ness", "ly", "ment")
_PREFIXES = ("re", "un", "over")


class Table(NamedTuple):
    """A table that was written.

    Attributes:
        rows: of it, without the header.
        bytes: of the file.
        words: of all sentences, as spaces separate them.
        sha256: of the file.
    """

    rows: int
    bytes: int
    words: int
    sha256: str


def vocabulary() -> list[str]:
    """Return the words, the most frequent first: common ones, stems, and what is made of stems."""
    made = [
        [f"{stem}{suffix}" for stem, suffix in itertools.product(_STEMS, _INFLECTIONS)],
        [f"{stem}{suffix}" for stem, suffix in itertools.product(_STEMS, _SUFFIXES)],
        [f"{prefix}{stem}" for prefix, stem in itertools.product(_PREFIXES, _STEMS)],
    ]
    found = list(_COMMON)
    for number, words in enumerate([_STEMS, *made]):
        order = permutation(len(words), "large table", "vocabulary", number)
        found += [words[place] for place in order.tolist()]
    return list(dict.fromkeys(found))


def zipf_bounds(count: int) -> npt.NDArray[np.float64]:
    """Return the sums of the shares of the first words, ``[count]``: the r-th has 1 / r of them."""
    sums = np.cumsum(1.0 / np.arange(1, count + 1))
    return sums / sums[-1]


def lines(rows: int, seed: int) -> Iterator[tuple[list[str], int]]:
    """Yield the lines of blocks of rows, and the number of their words.

    A row is a function of its number and the seed alone: the rows of a smaller table are the first
    ones of a larger one.
    """
    words = np.array(vocabulary(), dtype=object)
    bounds = zipf_bounds(len(words))
    fewest, most = _LENGTHS
    for start in range(0, rows, _BLOCK):
        drawn = uniforms(2 * _BLOCK, "large table", seed, start, "lengths")
        lengths = fewest + (drawn * (most - fewest + 1)).astype(np.int64)
        ends = np.cumsum(lengths)
        ranks = np.searchsorted(
            bounds, uniforms(int(ends[-1]), "large table", seed, start, "words"), side="right"
        )
        text, places = words[ranks].tolist(), [0, *ends.tolist()]
        sentences = [" ".join(text[a:b]) + "?" for a, b in itertools.pairwise(places)]
        count = min(_BLOCK, rows - start)
        firsts, seconds = sentences[0 : 2 * count : 2], sentences[1 : 2 * count : 2]
        yield (
            [
                f"{number}\t{number:025x}\t{first}\t{second}\t{number % 2}.0\n"
                for number, first, second in zip(
                    range(start, start + count), firsts, seconds, strict=True
                )
            ],
            places[2 * count],
        )


def write(path: Path, rows: int, seed: int) -> Table:
    """Write a table to a new file, in constant memory.

    Args:
        path: of the file.
        rows: of the table.
        seed: decides its sentences.
    """
    digest, size, words = hashlib.sha256(), 0, 0
    with path.open("xb") as opened:

        def put(text: str) -> None:
            nonlocal size
            piece = text.encode()
            digest.update(piece)
            size += opened.write(piece)

        put("\t".join(COLUMNS) + "\n")
        for block, of_block in lines(rows, seed):
            put("".join(block))
            words += of_block
    return Table(rows, size, words, digest.hexdigest())
