"""From bytes to `pixel_values`: decoding, the arithmetic of pixels, and the processor that joins both.

Evaluation and prediction have this one preprocessing. Loads no framework.
"""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.image.decode import ImageError as ImageError
    from deit.image.decode import load_image as load_image
    from deit.image.processor import BatchFeature as BatchFeature
    from deit.image.processor import DeiTFeatureExtractor as DeiTFeatureExtractor
    from deit.image.processor import DeiTImageProcessor as DeiTImageProcessor

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.image.decode": ("ImageError", "load_image"),
        "deit.image.processor": ("BatchFeature", "DeiTFeatureExtractor", "DeiTImageProcessor"),
    },
)
