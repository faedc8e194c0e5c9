"""What the tests of weight files share."""

import pytest
from support.models import build, small


@pytest.fixture
def saved(tmp_path):
    """A classifier and the folder it was saved in."""
    model = build("classification", small(id2label={0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}))
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"
