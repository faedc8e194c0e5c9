"""What the tests of weight files share."""

import pytest
from support.models import LABELS, build, small


@pytest.fixture
def saved(tmp_path):
    """A classifier and the folder it was saved in."""
    model = build("classification", small(id2label=LABELS))
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"
