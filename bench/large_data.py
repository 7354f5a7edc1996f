"""Write a large table of sentence pairs, and measure what preparing it takes.

    python -m bench.large_data --rows 3000000 --out DIR
"""

import argparse
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rng = random.Random(0)
    words = [w for w in Path("/usr/share/dict/words").read_text().split()] if Path("/usr/share/dict/words").exists() else None
    if words is None:
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = ["".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20000)]
        common = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you were all her she there would their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may first then do any like my now over such our man me even most made after also did many off before must well back through years where much your way down should because long each just state people those too mr how little good world make very year still see work life being get here between both under three never know same last another while us might great old against come go".split()
        words += common * 400
    with (options.out / "quora-train.csv").open("w") as file:
        file.write("\tid\tsentence1\tsentence2\tis_duplicate\n")
        for row in range(options.rows):
            a, b = (" ".join(rng.choices(words, k=rng.randint(5, 14))) for _ in range(2))
            file.write(f"{row}\t{row:024x}\t{a}?\t{b}?\t{float(row % 2)}\n")


if __name__ == "__main__":
    main()
