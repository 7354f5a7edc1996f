"""Write the data and the recipe of docs/guide-multitask.md's second guide: NLI, STS, retrieval.

    python -m examples.nli_sts_retrieval FOLDER

FOLDER gets ``sentences.toml`` (taken from the guide) and ``sentences`` with JSON lines under the
column names of sentence-transformers' data sets: ``nli`` (premise, hypothesis, label; all-nli,
pair-class), ``triples`` (anchor, positive, negative; all-nli, triplet) and ``sts`` (sentence1,
sentence2, score; stsb).

The grammar tells scenes: who does what and where, perhaps with a detail.  Each concept has several
names and a kind (a hound is an animal).  A hypothesis that follows names the same things in other
words or by their kinds, or leaves details out; one that contradicts has another concept in one
place or denies the scene; a neutral one adds a detail.  Similarity is the mean over the places: 1
for the same concept, 0.5 for the same kind.  So a contradiction is a negative of retrieval, and yet
similar.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.utils.json_text import dump_json

from .new_folder import new_folder

GUIDE = Path(__file__).parents[1] / "docs" / "guide-multitask.md"

SIZES = {
    "nli": {"train": 1200, "dev": 400, "test": 1000},
    "triples": {"train": 800, "dev": 400, "test": 1000},
    "sts": {"train": 400, "dev": 400, "test": 1000},
}
"""Examples of each task in each split."""

LABELS = ("entailment", "neutral", "contradiction")
"""Classes of ``nli``, in the order of the public data set's numbers."""

Row = dict[str, str | float]


class Concept(NamedTuple):
    """One of the things that may stand in a place of a scene.

    Attributes:
        names: of the concept itself.
        kinds: names of its kind, which others share.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]


class Scene(NamedTuple):
    """What a sentence tells: three concepts, and an adjective and a circumstance or none."""

    concepts: tuple[Concept, ...]
    adjective: str
    circumstance: str


def _names(text: str, separator: str = "/") -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(separator))


def _concepts(text: str) -> tuple[Concept, ...]:
    """Read ``kind/kind: name/name, name/name; …``."""
    found = list[Concept]()
    for line in text.split(";"):
        kinds, _, names = line.partition(":")
        kind = _names(kinds)
        found += [Concept(_names(concept), kind) for concept in names.split(",")]
    return tuple(found)


_PLACES = (
    _concepts(
        "person/human: woman/lady, man/gentleman, girl/schoolgirl, boy/lad, nurse/caretaker, "
        "farmer/grower; animal/creature: dog/hound, cat/kitten, horse/pony, parrot/cockatoo"
    ),
    _concepts(
        "makes music/performs: plays the guitar/strums a guitar, sings a song/sings, "
        "beats a drum/drums; moves about/moves: runs/jogs, walks/strolls, dances/twirls, "
        "climbs/clambers; rests/relaxes: sleeps/naps, sits down/takes a seat, lies down/reclines"
    ),
    _concepts(
        "outdoors/outside: in the park/in the garden, on the beach/at the shore, "
        "in the forest/in the woods, on the street/on the road; indoors/inside: "
        "in the kitchen/near the stove, in the office/at the desk, at school/in the classroom, "
        "in the hall/in the lobby"
    ),
)
_ADJECTIVES = _names("young|old|tall|tired|happy|hungry|wet|clever", "|")
_CIRCUMSTANCES = _names(
    "in the morning|at night|with a friend|all alone|before lunch|for an hour|during a storm", "|"
)


def main(arguments: list[str] | None = None) -> None:
    """Write everything."""
    folder = new_folder(arguments)
    write_corpus(folder / "sentences")
    _, recipe, *_ = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "sentences.toml").write_text(recipe, encoding="utf-8")


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Write a file for each task and split; the same seed gives the same bytes.

    A sentence that is the first of an example is so only once, in all tasks and splits.
    """
    folder.mkdir(parents=True)
    rng = random.Random(f"{seed}/sentences")
    firsts = _distinct_scenes(rng)
    makers = {"nli": _inference, "triples": _triple, "sts": _similarity}
    for task, sizes in SIZES.items():
        for split, size in sizes.items():
            rows = (makers[task](rng, *next(firsts)) for _ in range(size))
            text = "".join(f"{dump_json(row)}\n" for row in rows)
            (folder / f"{task}-{split}.jsonl").write_text(text, encoding="utf-8")


def _distinct_scenes(rng: random.Random) -> Iterator[tuple[Scene, str]]:
    """Yield scenes with sentences that tell them, no sentence twice."""
    seen = set[str]()
    while True:
        scene = Scene(
            tuple(rng.choice(place) for place in _PLACES),
            rng.choice(_ADJECTIVES) if rng.random() < 0.5 else "",
            rng.choice(_CIRCUMSTANCES) if rng.random() < 0.5 else "",
        )
        text = _tell(rng, scene)
        if text not in seen:
            seen.add(text)
            yield scene, text


def _tell(rng: random.Random, scene: Scene, general: float = 0.0, article: str = "") -> str:
    """Return a sentence; each concept is called by its kind with probability ``general``."""
    who, does, where = (
        rng.choice(concept.kinds if rng.random() < general else concept.names)
        for concept in scene.concepts
    )
    subject = f"{scene.adjective} {who}".strip()
    article = article or rng.choice(("an" if subject[0] in "aeiou" else "a", "the"))
    told = f"{article} {subject} {does} {where}"
    if rng.random() < 0.3 and scene.circumstance:
        return f"{scene.circumstance} , {told}"
    return f"{told} {scene.circumstance}".strip()


def _entailed(rng: random.Random, scene: Scene) -> Scene:
    """Return the scene without some of its details."""
    return scene._replace(
        adjective=rng.choice((scene.adjective, "")),
        circumstance=rng.choice((scene.circumstance, "")),
    )


def _contradiction(rng: random.Random, scene: Scene) -> str:
    if rng.random() < 0.2:
        return _tell(rng, _entailed(rng, scene), 0.3, article="no")
    # Who does it may have company, so that another being contradicts nothing.
    place = rng.choice((1, 2))
    return _tell(rng, _entailed(rng, _with_other(rng, scene, place)), 0.3)


def _with_other(rng: random.Random, scene: Scene, place: int) -> Scene:
    """Return the scene with a concept of another kind in one place."""
    kind = scene.concepts[place].kinds
    other = rng.choice([concept for concept in _PLACES[place] if concept.kinds != kind])
    return scene._replace(concepts=(*scene.concepts[:place], other, *scene.concepts[place + 1 :]))


def _neutral(rng: random.Random, scene: Scene) -> str:
    """Tell what may be true: a further detail, or one more precise than the scene's."""
    told = _entailed(rng, scene)
    adjectives = [word for word in _ADJECTIVES if word != scene.adjective]
    circumstances = [text for text in _CIRCUMSTANCES if text != scene.circumstance]
    if rng.random() < 0.5:
        told = told._replace(adjective=rng.choice(adjectives))
    else:
        told = told._replace(circumstance=rng.choice(circumstances))
    return _tell(rng, told, 0.4)


def _inference(rng: random.Random, scene: Scene, premise: str) -> Row:
    label = rng.choice(LABELS)
    if label == "entailment":
        hypothesis = _tell(rng, _entailed(rng, scene), 0.4)
    else:
        hypothesis = (_neutral if label == "neutral" else _contradiction)(rng, scene)
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _triple(rng: random.Random, scene: Scene, anchor: str) -> Row:
    positive = _tell(rng, _entailed(rng, scene), 0.3)
    return {"anchor": anchor, "positive": positive, "negative": _contradiction(rng, scene)}


def _similarity(rng: random.Random, scene: Scene, first: str) -> Row:
    """Draw another scene that agrees in some places, in the kind at least in some others."""
    concepts, shares = [], []
    for place, concept in zip(_PLACES, scene.concepts, strict=True):
        same_kind = [other for other in place if other.kinds == concept.kinds]
        choices = rng.choice(((concept,), same_kind, place))
        other = rng.choice(choices)
        concepts.append(other)
        shares.append(1.0 if other == concept else 0.5 if other in same_kind else 0.0)
    details = [rng.choice((scene.adjective, "")), rng.choice((scene.circumstance, ""))]
    second = _tell(rng, Scene(tuple(concepts), *details))
    return {"sentence1": first, "sentence2": second, "score": round(sum(shares) / len(shares), 2)}


if __name__ == "__main__":
    main()
