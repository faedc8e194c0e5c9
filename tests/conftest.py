"""What every test runs under, and fixtures that many share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
from PIL import Image

pytest.register_assert_rewrite("support")  # so that a failing helper shows the values, as a test does

from support.models import NAMES, trained_folder  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def quiet_transformers():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def photos(tmp_path):
    """Two files of noise: a small PNG and a wide JPEG."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "small.png", tmp_path / "wide.jpg"]
    for path, size in zip(paths, [(20, 30, 3), (90, 160, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def distilled(tmp_path):
    """The folder of a small distilled model of `LABELS`."""
    return trained_folder(tmp_path / "model", labels=NAMES)
