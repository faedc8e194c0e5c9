"""What the tests of reports share."""

import numpy as np
import pytest
from PIL import Image
from support.models import trained_folder
from support.reports import QUIET
from support.runs import photos

from deit.cli import main
from deit.evaluate.models import examine_files


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A distilled model, and its evaluation on images of which one is unreadable and one is gone by now."""
    root = tmp_path_factory.mktemp("maps")
    draw = np.random.default_rng(0)
    for i in range(40):
        file = root / "data" / "abcde"[i % 5] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        areas = draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(areas).resize((30, 24), Image.Resampling.NEAREST).save(file)
    (root / "data" / "a" / "00.png").write_bytes(b"no image")
    trained_folder(root / "model", image_size=(16, 24))
    return examine_files(root / "model", root / "data", device="cpu", console=QUIET)


SHORT = """
from deit.config import DeiTConfig
from deit.recipe import *

def short():
    return Recipe(
        name="short", data=Data(batch=8), objective=Supervised(), optim=AdamW(lr=1e-3, per_images=8),
        model=DeiTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48,
                         image_size=16, patch_size=4, encoder_stride=4, distillation_token=False),
        schedule=Cosine(total=steps(15)), compute=Compute(precision="float32", workers=0), evaluate=steps(5))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data without a folder val, a recipe, and the run of the command."""
    root = tmp_path_factory.mktemp("report")
    photos(photos(root / "data", count=12), split="test", count=6)
    (root / "recipes.py").write_text(SHORT)
    assert (
        main(
            [
                "train",
                f"{root / 'recipes.py'}:short",
                "--data",
                str(root / "data"),
                "--out",
                str(root / "run"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    return root
