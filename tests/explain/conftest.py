"""What the tests of explanations share."""

import numpy as np
import pytest
from PIL import Image
from support.models import NAMES, trained_folder


@pytest.fixture
def folder(tmp_path):
    """A folder of models, each in a folder of its own, and a photo."""
    trained_folder(tmp_path / "m", labels=NAMES)
    trained_folder(tmp_path / "vit", "plain", NAMES)
    trained_folder(tmp_path / "wide", labels=NAMES, image_size=(8, 20))
    trained_folder(tmp_path / "backbone", "backbone", NAMES)
    trained_folder(tmp_path / "convnet", "convnet", NAMES)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path
