"""The network in PyTorch: the transformer and its heads, what all models share, the losses, the built-in ConvNet.

`outputs` and `loss_rules` load no framework, so the Keras twin shares them.
"""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.model.blocks import Attention as Attention
    from deit.model.blocks import Block as Block
    from deit.model.convnet import ConvNet as ConvNet
    from deit.model.heads import fuse_heads as fuse_heads
    from deit.model.heads import head_probabilities as head_probabilities
    from deit.model.load import load_classifier as load_classifier
    from deit.model.load import load_model as load_model
    from deit.model.network import DeiTForImageClassification as DeiTForImageClassification
    from deit.model.network import DeiTForImageClassificationWithTeacher as DeiTForImageClassificationWithTeacher
    from deit.model.network import DeiTForMaskedImageModeling as DeiTForMaskedImageModeling
    from deit.model.network import DeiTModel as DeiTModel
    from deit.model.network import ViTForImageClassification as ViTForImageClassification
    from deit.model.network import ViTModel as ViTModel
    from deit.model.pretrained import PreTrained as PreTrained

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.model.blocks": ("Attention", "Block"),
        "deit.model.convnet": ("ConvNet",),
        "deit.model.heads": ("fuse_heads", "head_probabilities"),
        "deit.model.load": ("load_classifier", "load_model"),
        "deit.model.network": (
            "DeiTForImageClassification",
            "DeiTForImageClassificationWithTeacher",
            "DeiTForMaskedImageModeling",
            "DeiTModel",
            "ViTForImageClassification",
            "ViTModel",
        ),
        "deit.model.pretrained": ("PreTrained",),
    },
)
