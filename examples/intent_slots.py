"""Write the data and the recipe of docs/guide-multitask.md's first guide: intents and slots.

    python -m examples.intent_slots FOLDER

FOLDER gets ``assistant.toml`` (taken from the guide) and ``assistant`` with ``train``, ``dev`` and
``test``, each with the three files in which SNIPS and ATIS are handed on: ``seq.in``, ``seq.out``
and ``label``, a sentence a line.

The grammar asks an assistant for things.  A title may be that of a song, a film or a book; most of
its nouns are those of one kind, but any noun may stand in any title, so that some sentences do not
say what they ask for.  A number is an hour, a count or a rating, and some cities are called as
people are: tags depend on the intent, and the intent on the words that are tagged.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from .new_folder import new_folder

GUIDE = Path(__file__).parents[1] / "docs" / "guide-multitask.md"

SIZES = {"train": 240, "dev": 400, "test": 1000}
"""Sentences in each split."""

Example = tuple[tuple[str, ...], tuple[str, ...], str]
"""Words, their tags, and the intent."""


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


_TITLES = {
    "song": _words("heart summer rain kiss tears dancing baby moonlight goodbye radio"),
    "film": _words("avenger empire detective monster galaxy heist zombie spy robot revenge"),
    "book": _words("diary orchard letters daughters history lighthouse widow essays cottage poems"),
}
_ADJECTIVES = _words(
    "silver lonely last broken golden hidden endless midnight wild forgotten blue distant little"
)
_PERSONS = {"song": "artist", "film": "director", "book": "author"}
_FIRST_NAMES = _words("anna james maria peter lucy victor clara hugo nina oscar")
_LAST_NAMES = {
    "song": _words("fields marley austin sparks hill valentine"),
    "film": _words("lang carver lincoln stone webb hitch"),
    "book": _words("bronte woolf florence marsh penn thorne"),
}
_CITIES = _words(
    "austin|lincoln|florence|paris|oslo|lima|new york|cape town|san jose|kyoto|cairo|dublin", "|"
)
_DAYS = _words("today|tonight|tomorrow|on monday|on friday|this weekend|next week", "|")
_NUMBERS = _words("one two three four five six seven eight nine ten")

_OF_TITLES = {
    "song": (
        "play {title}",
        "put on {title} by {person}",
        "i want to hear {title}",
        "play something by {person}",
    ),
    "film": (
        "when does {title} start in {city}",
        "is {title} on {day}",
        "what else was made by {person}",
        "where can i watch {title}",
    ),
    "book": (
        "order {title} by {person}",
        "is {title} out in paperback",
        "what did {person} write",
        "i want to read {title}",
    ),
}
_OF_ANY_TITLE = (
    "find {title}",
    "i want {title} by {person}",
    "get me {title}",
    "show me {title} from {person}",
    "do you have {title}",
    "{title} please",
)
_INTENTS = {"song": "play_music", "film": "find_film", "book": "find_book"}
_OTHERS = {
    "rate_title": (
        "give {title} {rating}",
        "{rating} stars for {title}",
        "{title} deserves {rating} points",
    ),
    "book_table": (
        "a table for {count} in {city} {day}",
        "book a table in {city} at {hour}",
        "we are {count} and hungry {day}",
        "find a place for {count} in {city}",
    ),
    "get_weather": (
        "will it rain in {city} {day}",
        "how warm is {city} {day}",
        "do i need a coat {day} in {city}",
        "show me {city} {day}",
    ),
    "set_alarm": (
        "wake me at {hour} {day}",
        "set it for {hour}",
        "alarm at {hour} {day}",
        "i have to get up {day} at {hour}",
    ),
}

INTENTS = (*_INTENTS.values(), *_OTHERS)
"""Classes of the first task."""

SLOTS = (*_TITLES, *_PERSONS.values(), "city", "day", "hour", "count", "rating")
"""Entities of the second task."""


def main(arguments: list[str] | None = None) -> None:
    """Write everything."""
    folder = new_folder(arguments)
    write_corpus(folder / "assistant")
    recipe, *_ = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "assistant.toml").write_text(recipe, encoding="utf-8")


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Write the three files of each split; the same seed gives the same bytes.

    No sentence stands twice, in one split or in two.
    """
    examples = _distinct(random.Random(f"{seed}/assistant"))
    for split, size in SIZES.items():
        words, tags, intents = zip(*(next(examples) for _ in range(size)), strict=True)
        lines = {
            "seq.in": map(" ".join, words),
            "seq.out": map(" ".join, tags),
            "label": intents,
        }
        (folder / split).mkdir(parents=True)
        for name, column in lines.items():
            text = "".join(f"{line}\n" for line in column)
            (folder / split / name).write_text(text, encoding="utf-8")


def _distinct(rng: random.Random) -> Iterator[Example]:
    seen = set[tuple[str, ...]]()
    while True:
        example = _sentence(rng)
        if example[0] not in seen:
            seen.add(example[0])
            yield example


def _sentence(rng: random.Random) -> Example:
    intent = rng.choice(INTENTS)
    kind = next((kind for kind, name in _INTENTS.items() if name == intent), None)
    if kind is None:
        kind, template = rng.choice([*_TITLES]), rng.choice(_OTHERS[intent])
    else:
        template = rng.choice(_OF_TITLES[kind] if rng.random() < 0.4 else _OF_ANY_TITLE)
    words, tags = list[str](), list[str]()
    for part in template.split():
        if not part.startswith("{"):
            words.append(part)
            tags.append("O")
            continue
        slot, filling = _fill(rng, part.strip("{}"), kind)
        words += filling
        tags += [f"B-{slot}", *[f"I-{slot}"] * (len(filling) - 1)]
    return tuple(words), tuple(tags), intent


def _fill(rng: random.Random, place: str, kind: str) -> tuple[str, list[str]]:
    """Return the slot of a place in a template, and words for it."""
    likely = kind if rng.random() < 0.85 else rng.choice([*_TITLES])
    match place:
        case "title":
            start = rng.choice((["the"], [], []))
            return kind, [*start, rng.choice(_ADJECTIVES), rng.choice(_TITLES[likely])]
        case "person":
            first = [rng.choice(_FIRST_NAMES)] if rng.random() < 0.6 else []
            return _PERSONS[kind], [*first, rng.choice(_LAST_NAMES[likely])]
        case "city":
            return place, rng.choice(_CITIES).split()
        case "day":
            return place, rng.choice(_DAYS).split()
        case _:  # an hour, a count, a rating
            return place, [rng.choice(_NUMBERS)]


if __name__ == "__main__":
    main()
