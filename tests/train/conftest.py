"""What the tests of training share."""

import pytest
from support.objectives import TEACHER
from support.runs import photos

from deit.data.folders import read_data


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Training images, validation images, and the name of a teacher."""
    root = tmp_path_factory.mktemp("given")
    (root / "teacher.py").write_text(TEACHER)
    splits = read_data(photos(photos(root / "data"), split="val", count=3), holdout=0.1, seed=0)
    return *splits, f"{root / 'teacher.py'}:make"
