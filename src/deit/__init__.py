"""Data-efficient image transformers: model, recipe, distillation. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deit.host import VERSION as __version__
from deit.lazy import offer

if TYPE_CHECKING:
    from deit.config import VARIANTS as VARIANTS
    from deit.config import DeiTConfig as DeiTConfig
    from deit.config import ViTConfig as ViTConfig
    from deit.image.processor import DeiTFeatureExtractor as DeiTFeatureExtractor
    from deit.image.processor import DeiTImageProcessor as DeiTImageProcessor
    from deit.model.heads import fuse_heads as fuse_heads
    from deit.model.load import load_model as load_model
    from deit.model.network import DeiTForImageClassification as DeiTForImageClassification
    from deit.model.network import DeiTForImageClassificationWithTeacher as DeiTForImageClassificationWithTeacher
    from deit.model.network import DeiTForMaskedImageModeling as DeiTForMaskedImageModeling
    from deit.model.network import DeiTModel as DeiTModel
    from deit.model.network import ViTForImageClassification as ViTForImageClassification
    from deit.model.network import ViTModel as ViTModel
    from deit.model_keras.network import TFDeiTForImageClassification as TFDeiTForImageClassification
    from deit.model_keras.network import (
        TFDeiTForImageClassificationWithTeacher as TFDeiTForImageClassificationWithTeacher,
    )
    from deit.model_keras.network import TFDeiTForMaskedImageModeling as TFDeiTForMaskedImageModeling
    from deit.model_keras.network import TFDeiTModel as TFDeiTModel
    from deit.model_keras.network import TFViTForImageClassification as TFViTForImageClassification
    from deit.model_keras.network import TFViTModel as TFViTModel
    from deit.predict.pipelines import pipeline as pipeline
    from deit.predict.predictor import Predictor as Predictor

_HOME = {
    "deit.config": ("DeiTConfig", "ViTConfig", "VARIANTS"),
    "deit.image.processor": ("DeiTImageProcessor", "DeiTFeatureExtractor"),
    "deit.model.network": (
        "DeiTModel",
        "DeiTForMaskedImageModeling",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ViTModel",
        "ViTForImageClassification",
    ),
    "deit.model.heads": ("fuse_heads",),
    "deit.model.load": ("load_model",),
    "deit.predict.predictor": ("Predictor",),
    "deit.predict.pipelines": ("pipeline",),
}
_KERAS = {
    "deit.model_keras": (
        "TFDeiTModel",
        "TFDeiTForMaskedImageModeling",
        "TFDeiTForImageClassification",
        "TFDeiTForImageClassificationWithTeacher",
        "TFViTModel",
        "TFViTForImageClassification",
    )
}
"""These names need the extra `keras`, so `from deit import *` leaves them out."""

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]  # noqa: PLE0604
__getattr__, _names = offer(__name__, {**_HOME, **_KERAS})


def __dir__() -> list[str]:
    return ["__version__", *_names()]
