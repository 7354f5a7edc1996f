"""A series whose statistics are known."""

from pathlib import Path

import pytest

from .made_series import of_point, write_series


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "methods"
    return write_series(folder, ["balance=sum,pcgrad,cagrad"], 4, of_point)
