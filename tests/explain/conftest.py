"""What the tests of explanations share."""

import numpy as np
import pytest
from PIL import Image
from support.models import LABELS, build, small

from deit.config import ConvNetConfig
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet


@pytest.fixture
def folder(tmp_path):
    for name, kind, changes in [
        ("m", "with_teacher", {}),
        ("vit", "classification", {"distillation_token": False}),
        ("wide", "with_teacher", {"image_size": (8, 20)}),
        ("backbone", "backbone", {}),
    ]:
        config = small(id2label=LABELS, num_labels=None, **changes)
        build(kind, config).save_pretrained(tmp_path / name)
        DeiTImageProcessor.paper(config.image_size).save_pretrained(tmp_path / name)
    ConvNet(ConvNetConfig(widths=(4,), depth=1)).save_pretrained(tmp_path / "convnet")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "convnet")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path
