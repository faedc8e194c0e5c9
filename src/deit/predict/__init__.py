"""From image files to labels. The commands, the pipelines and the server all use one `Predictor` for this."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.predict.bulk import find_images as find_images
    from deit.predict.parts import Part as Part
    from deit.predict.parts import missing_parts as missing_parts
    from deit.predict.pipelines import pipeline as pipeline
    from deit.predict.predictor import Answer as Answer
    from deit.predict.predictor import Predictor as Predictor

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.predict.bulk": ("find_images",),
        "deit.predict.parts": ("Part", "missing_parts"),
        "deit.predict.pipelines": ("pipeline",),
        "deit.predict.predictor": ("Answer", "Predictor"),
    },
)
