"""What a model is: its sizes, options and labels. Loads no framework.

`DeiTConfig` is written and read as Hugging Face's `config.json`; `VARIANTS` holds the published architectures.
"""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.config.deit import ACTIVATIONS as ACTIVATIONS
    from deit.config.deit import IMAGENET_MEAN as IMAGENET_MEAN
    from deit.config.deit import IMAGENET_STD as IMAGENET_STD
    from deit.config.deit import VARIANTS as VARIANTS
    from deit.config.deit import DeiTConfig as DeiTConfig
    from deit.config.deit import ViTConfig as ViTConfig
    from deit.config.others import ConvNetConfig as ConvNetConfig
    from deit.config.others import ModelConfig as ModelConfig
    from deit.config.others import TimmConfig as TimmConfig
    from deit.config.others import config_of as config_of
    from deit.config.others import read_config as read_config
    from deit.config.values import MAX_LABELS as MAX_LABELS

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.config.deit": ("ACTIVATIONS", "DeiTConfig", "IMAGENET_MEAN", "IMAGENET_STD", "VARIANTS", "ViTConfig"),
        "deit.config.others": ("ConvNetConfig", "ModelConfig", "TimmConfig", "config_of", "read_config"),
        "deit.config.values": ("MAX_LABELS",),
    },
)
