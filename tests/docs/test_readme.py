"""The README names everything of a kind that it says it names."""

import re

from engine.gradients.balancing import METHODS
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_balancing_method_is_listed_and_counted() -> None:
    (listed,) = re.findall(r"--set balance=NAME`: (.*?), or `torchjd", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == set(METHODS)
    assert f"PCGrad (Yu et al. 2020) or one of {len(METHODS) - 1} other methods" in README
