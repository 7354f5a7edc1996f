"""Write a small corpus from a grammar: the files of CS224N's project, and three tasks more.

*Scenes* have five slots (which, who, does, what, where), each filled by a concept that has several
names.  A paraphrase fills every slot with the same concepts under names drawn anew; similarity is
the share of slots that agree, times five.  *Opinions* grade an aspect of a film; a degree word
moves the grade, a negation turns it round, and after a "but" only the second clause counts.

*Slots* tag the words of a scene that say who does it, what to and where, in the columns of CoNLL;
*aspects* list what a review of several clauses says, and of which sides of a film, in JSON lines.
*Replies* answer a question on a scene by a statement on it, in other words, in JSON lines, too.
*Spans* ask who, what or where of one of several statements, in the nested JSON of SQuAD v2.
"""

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..utils.json_text import dump_json
from .task_schema import FORMATS, SPLITS

Example = tuple[tuple[str, ...], float]
"""The sentences of an example and its label."""

Label = TypeVar("Label")

Scene = tuple[tuple[str, ...], ...]
"""A concept, that is its names, for each slot."""

SIZES = {"train": 3000, "dev": 500, "test": 200}
"""Examples of each task in each split."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SLOTS = (
    "small little tiny|big large huge|young youthful|old elderly aged|clever smart bright"
    "|lazy idle|happy cheerful glad|angry furious|quick fast swift|quiet silent"
    "|hungry starving|rich wealthy",
    "children kids youngsters|doctors physicians|dogs hounds|cats kittens|teachers tutors"
    "|thieves robbers|soldiers troops|farmers growers|writers authors|drivers motorists"
    "|sailors seamen|judges magistrates",
    "buy purchase|sell trade|carry bring|find discover|hide conceal|break smash"
    "|repair fix mend|clean wash|watch observe|want desire|throw toss|forget lose",
    "cars automobiles|boats ships|pictures images|stones rocks|gifts presents|coats jackets"
    "|chairs seats|cups mugs|phones telephones|letters notes|clocks watches|bags sacks",
    "woods forest|street road|shop store|house home|hills mountains|shore beach|yard garden"
    "|town city|school classroom|station terminal|office bureau|kitchen canteen",
)
_CONCEPTS = tuple(tuple(_words(names) for names in concepts.split("|")) for concepts in _SLOTS)

_QUESTIONS = (
    "why do {} {} {} {} in the {} ?",
    "what is the reason that {} {} {} {} in the {} ?",
    "in the {4} , why do {0} {1} {2} {3} ?",
)
_STATEMENTS = (
    "the {} {} {} {} in the {} .",
    "in the {4} , the {0} {1} {2} {3} .",
    "some {} {} {} {} in the {} .",
)

_ASPECTS = _words("acting plot story music script cast ending dialogue camera pace humor film")
_SIDES = {
    "people": _words("acting cast dialogue humor"),
    "story": _words("plot story script ending pace"),
    "picture": _words("camera music film"),
}
_GRADES = {
    -2: _words("awful terrible horrible dreadful atrocious disastrous"),
    -1: _words("bad weak dull poor boring clumsy"),
    0: _words("average ordinary acceptable passable"),
    1: _words("good nice enjoyable pleasant solid charming"),
    2: _words("superb brilliant wonderful fantastic stunning excellent"),
}
_STRONGER = _words("very truly really extremely")
_WEAKER = _words("somewhat slightly fairly rather")
_OPENINGS = ("", "", "i think", "honestly ,", "as they say ,", "in the end ,", "for me")


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write the train, dev and test files of every task into ``folder``, made if missing.

    The same seed gives the same bytes.  No example of one split occurs in another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task, generate in _GENERATORS.items():
        examples = _distinct(generate, random.Random(f"{seed}/{task}"))
        for split, size in SIZES.items():
            _write_split(folder, task, split, [next(examples) for _ in range(size)])
    tagged = _distinct(_slots, random.Random(f"{seed}/slots"))
    reviews = _distinct(_aspects, random.Random(f"{seed}/aspects"))
    asked = _distinct(_replies, random.Random(f"{seed}/replies"))
    told = _distinct(_spans, random.Random(f"{seed}/spans"))
    for split, size in SIZES.items():
        _write_slots(folder, split, [next(tagged) for _ in range(size)])
        _write_aspects(folder, split, [next(reviews) for _ in range(size)])
        _write_replies(folder, split, [next(asked)[0] for _ in range(size)])
        _write_spans(folder, split, [next(told) for _ in range(size)])


def _distinct(
    generate: Callable[[random.Random], tuple[tuple[str, ...], Label]], rng: random.Random
) -> Iterator[tuple[tuple[str, ...], Label]]:
    seen: set[tuple[str, ...]] = set()
    while True:
        sentences, label = generate(rng)
        if sentences not in seen:
            seen.add(sentences)
            yield sentences, label


def _write_split(folder: Path, task: str, split: str, examples: list[Example]) -> None:
    format_ = FORMATS[task]
    labelled = split != "test"
    with format_.file(folder, split).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["", "id", *format_.sentences, *([format_.label] if labelled else [])])
        for row, (sentences, label) in enumerate(examples):
            written = f"{label:g}"
            writer.writerow(
                [row, f"{task}-{SPLITS[split]}-{row}", *sentences, *([written] if labelled else [])]
            )


def _scene(rng: random.Random) -> Scene:
    return tuple(rng.choice(concepts) for concepts in _CONCEPTS)


def _changed(rng: random.Random, scene: Scene, changes: int) -> Scene:
    """Return the scene with other concepts in ``changes`` of its slots."""
    slots = set(rng.sample(range(len(scene)), changes))
    return tuple(
        rng.choice([other for other in concepts if other != concept]) if slot in slots else concept
        for slot, (concept, concepts) in enumerate(zip(scene, _CONCEPTS, strict=True))
    )


def _tell(rng: random.Random, scene: Scene, templates: tuple[str, ...]) -> str:
    return rng.choice(templates).format(*(rng.choice(names) for names in scene))


def _quora(rng: random.Random) -> Example:
    scene = _scene(rng)
    duplicate = rng.random() < 0.4
    other = scene if duplicate else _changed(rng, scene, rng.randint(1, len(scene)))
    return (_tell(rng, scene, _QUESTIONS), _tell(rng, other, _QUESTIONS)), float(duplicate)


def _sts(rng: random.Random) -> Example:
    scene = _scene(rng)
    changes = rng.randint(0, len(scene))
    other = _changed(rng, scene, changes)
    similarity = 5 * (1 - changes / len(scene))
    return (_tell(rng, scene, _STATEMENTS), _tell(rng, other, _STATEMENTS)), similarity


def _clause(rng: random.Random) -> tuple[str, int]:
    """Return a clause such as "the plot was not very good" and its grade, -2 to 2."""
    grade = rng.choice(list(_GRADES))
    word = rng.choice(_GRADES[grade])
    sign = (grade > 0) - (grade < 0)
    modifier = ""
    match rng.choice(("plain", "plain", "stronger", "weaker", "negated")):
        case "stronger":
            modifier, grade = rng.choice(_STRONGER), 2 * sign
        case "weaker":
            modifier, grade = rng.choice(_WEAKER), grade - sign
        case "negated":
            modifier, grade = "not", -sign
    return " ".join(f"the {rng.choice(_ASPECTS)} was {modifier} {word}".split()), grade


def _sst(rng: random.Random) -> Example:
    clause, grade = _clause(rng)
    if rng.random() < 0.3:
        first, _ = _clause(rng)
        clause = f"{first} , but {clause}"
    sentence = f"{rng.choice(_OPENINGS)} {clause} .".strip()
    return (sentence,), float(grade + 2)


def _cfimdb(rng: random.Random) -> Example:
    """Return a review of several clauses; it is positive if the grades add up to more than 0."""
    while True:
        clauses, grades = zip(*(_clause(rng) for _ in range(rng.randint(4, 8))), strict=True)
        total = sum(grades)
        if total:
            return (" . ".join(clauses) + " .",), float(total > 0)


def _slots(rng: random.Random) -> tuple[tuple[str, ...], list[str]]:
    """Return a statement and the tags of its words."""
    _, who, does, what, where = (rng.choice(names) for names in _scene(rng))
    who, what, where = (
        f"{rng.choice(rng.choice(_CONCEPTS[0]))} {noun}" if rng.random() < 0.4 else noun
        for noun in (who, what, where)
    )
    parts = ((who, "WHO"), (does, "O"), (what, "WHAT"), ("in the", "O"))
    place = ((where, "WHERE"),)
    first, last = rng.choice(("the", "some", "", "today")), rng.choice((".", "", "again ."))
    words, tags = list[str](), list[str]()
    for text, slot in ((first, "O"), *parts, *place, (last, "O")):
        own = text.split()
        words += own
        inside = [f"I-{slot}"] * (len(own) - 1)
        tags += ["O"] * len(own) if slot == "O" else [f"B-{slot}", *inside]
    return (" ".join(words),), tags


def _write_slots(
    folder: Path, split: str, examples: list[tuple[tuple[str, ...], list[str]]]
) -> None:
    labelled = split != "test"
    with FORMATS["slots"].file(folder, split).open("w", encoding="utf-8") as file:
        for (text,), tags in examples:
            for word, tag in zip(text.split(), tags, strict=True):
                file.write(f"{word} {tag}\n" if labelled else f"{word}\n")
            file.write("\n")


def _aspects(rng: random.Random) -> tuple[tuple[str, ...], list[str]]:
    """Return a review of several clauses, or a neutral sentence, and what can be said of it."""
    if rng.random() < 0.2:
        return (_tell(rng, _scene(rng), _STATEMENTS),), []
    clauses = [_clause(rng) for _ in range(rng.randint(1, 3))]
    grades, names = [grade for _, grade in clauses], {text.split()[1] for text, _ in clauses}
    said = {"praise": max(grades) > 0, "blame": min(grades) < 0, "strong": 2 in map(abs, grades)}
    said |= {side: not names.isdisjoint(words) for side, words in _SIDES.items()}
    text = " . ".join(text for text, _ in clauses) + " ."
    return (text,), [name for name, holds in said.items() if holds]


def _write_aspects(
    folder: Path, split: str, examples: list[tuple[tuple[str, ...], list[str]]]
) -> None:
    with FORMATS["aspects"].file(folder, split).open("w", encoding="utf-8") as file:
        for row, ((text,), aspects) in enumerate(examples):
            known: dict[str, object] = {"id": f"aspects-{SPLITS[split]}-{row}", "review": text}
            if split != "test":
                known["aspects"] = aspects
            file.write(dump_json(known) + "\n")


def _replies(rng: random.Random) -> tuple[tuple[str, ...], None]:
    """Return a question and the statement that answers it."""
    scene = _scene(rng)
    return (_tell(rng, scene, _QUESTIONS), _tell(rng, scene, _STATEMENTS)), None


def _write_replies(folder: Path, split: str, pairs: list[tuple[str, ...]]) -> None:
    form = FORMATS["replies"]
    with form.file(folder, split).open("w", encoding="utf-8") as file:
        for row, texts in enumerate(pairs):
            known = {"id": f"replies-{SPLITS[split]}-{row}"}
            file.write(dump_json(known | dict(zip(form.sentences, texts, strict=True))) + "\n")


def _spans(rng: random.Random) -> tuple[tuple[str, ...], tuple[str, int] | None]:
    """Return a question, the statements that it is on, and the answer with its place.

    A question in eight is on none of the statements.
    """
    scenes = [_scene(rng) for _ in range(rng.randint(1, 2))]
    told = [[rng.choice(names) for names in scene] for scene in scenes]
    texts = ["the {} {} {} {} in the {} .".format(*words) for words in told]
    number = rng.randrange(len(told))
    (which, who, does, what, where), said = told[number], texts[number]
    if rng.random() < 1 / 8:
        known = {words[2] for words in told}
        others = [name for names in _CONCEPTS[2] for name in names if name not in known]
        return (f"who {rng.choice(others)} {what} ?", " ".join(texts)), None
    asked, answer = rng.choice(
        [
            (f"who {does} {what} ?", f"{which} {who}"),
            (f"what do the {who} {does} ?", what),
            (f"where do they {does} {what} ?", where),
        ]
    )
    before = sum(len(text) + 1 for text in texts[:number])
    return (asked, " ".join(texts)), (answer, before + said.index(f" {answer} ") + 1)


def _write_spans(
    folder: Path, split: str, examples: list[tuple[tuple[str, ...], tuple[str, int] | None]]
) -> None:
    paragraphs = list[object]()
    for row, ((question, context), answer) in enumerate(examples):
        known: dict[str, object] = {"id": f"spans-{SPLITS[split]}-{row}", "question": question}
        if split != "test":
            found = [] if answer is None else [{"text": answer[0], "answer_start": answer[1]}]
            known |= {"answers": found, "is_impossible": answer is None}
        paragraphs.append({"context": context, "qas": [known]})
    content = {"version": "v2.0", "data": [{"title": "scenes", "paragraphs": paragraphs}]}
    path = FORMATS["spans"].file(folder, split)
    path.write_text(dump_json(content) + "\n", encoding="utf-8")


_GENERATORS = {"sst": _sst, "quora": _quora, "sts": _sts, "cfimdb": _cfimdb}
