"""The same models in Keras 3, for TensorFlow and JAX: `deit.model`'s twin, class for class, with the same files.

Importing this package registers the classes with Keras, so that `keras.saving.load_model` opens their `.keras` files.
"""

from deit.model_keras.blocks import Attention as Attention
from deit.model_keras.blocks import Block as Block
from deit.model_keras.network import TFDeiTForImageClassification as TFDeiTForImageClassification
from deit.model_keras.network import TFDeiTForImageClassificationWithTeacher as TFDeiTForImageClassificationWithTeacher
from deit.model_keras.network import TFDeiTForMaskedImageModeling as TFDeiTForMaskedImageModeling
from deit.model_keras.network import TFDeiTModel as TFDeiTModel
from deit.model_keras.network import TFViTForImageClassification as TFViTForImageClassification
from deit.model_keras.network import TFViTModel as TFViTModel
from deit.model_keras.network import fuse_heads as fuse_heads
