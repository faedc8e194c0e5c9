"""Data-efficient image transformers: model, recipe, distillation. Names are resolved on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deit.host import VERSION as __version__

_HOME = {
    "deit.config": ("DeiTConfig", "ViTConfig", "VARIANTS"),
    "deit.image": ("DeiTImageProcessor", "DeiTFeatureExtractor"),
    "deit.model": ("DeiTModel", "DeiTForMaskedImageModeling", "DeiTForImageClassification",
                   "DeiTForImageClassificationWithTeacher", "ViTModel", "ViTForImageClassification", "fuse_heads"),
    "deit.load": ("load_model",),
    "deit.predict": ("Predictor",),
    "deit.pipelines": ("pipeline",),
}
_KERAS = {"deit.model_keras": (
    "TFDeiTModel", "TFDeiTForMaskedImageModeling", "TFDeiTForImageClassification",
    "TFDeiTForImageClassificationWithTeacher", "TFViTModel", "TFViTForImageClassification")}
"""Need the extra `keras`, so `from deit import *` leaves them out."""
_MODULE_OF = {name: module for module, names in {**_HOME, **_KERAS}.items() for name in names}

if TYPE_CHECKING:
    from deit.config import VARIANTS as VARIANTS
    from deit.config import DeiTConfig as DeiTConfig
    from deit.config import ViTConfig as ViTConfig
    from deit.image import DeiTFeatureExtractor as DeiTFeatureExtractor
    from deit.image import DeiTImageProcessor as DeiTImageProcessor
    from deit.load import load_model as load_model
    from deit.model import DeiTForImageClassification as DeiTForImageClassification
    from deit.model import DeiTForImageClassificationWithTeacher as DeiTForImageClassificationWithTeacher
    from deit.model import DeiTForMaskedImageModeling as DeiTForMaskedImageModeling
    from deit.model import DeiTModel as DeiTModel
    from deit.model import ViTForImageClassification as ViTForImageClassification
    from deit.model import ViTModel as ViTModel
    from deit.model import fuse_heads as fuse_heads
    from deit.model_keras import TFDeiTForImageClassification as TFDeiTForImageClassification
    from deit.model_keras import TFDeiTForImageClassificationWithTeacher as TFDeiTForImageClassificationWithTeacher
    from deit.model_keras import TFDeiTForMaskedImageModeling as TFDeiTForMaskedImageModeling
    from deit.model_keras import TFDeiTModel as TFDeiTModel
    from deit.model_keras import TFViTForImageClassification as TFViTForImageClassification
    from deit.model_keras import TFViTModel as TFViTModel
    from deit.pipelines import pipeline as pipeline
    from deit.predict import Predictor as Predictor

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deit' has no attribute {name!r}; it has {', '.join(__dir__())}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *sorted(_MODULE_OF)]
