"""Make the folders beside this file: small random DeiT and ViT models as transformers' TensorFlow classes save them.

Each folder holds what `save_pretrained` wrote (config.json with tf_model.h5, or with a TensorFlow-format
model.safetensors) and golden.npz: the inputs and every output of that model, `loss` as its mean over the batch.
Every weight is random, so none is at a value (0 or 1) that would hide a mistake.

The files were made with Python 3.11, transformers 4.57.6, TensorFlow 2.21.0, tf-keras 2.21.0, h5py 3.14.0,
safetensors 0.8.0 and NumPy 2.4.6. transformers 5 has no TensorFlow classes. To make them again, in an environment of
their own:

    pip install transformers==4.57.6 tensorflow-cpu==2.21.0 tf-keras==2.21.0 h5py==3.14.0 safetensors==0.8.0 pillow
    python make.py
"""

import shutil
from pathlib import Path

import numpy as np
from transformers import (
    DeiTConfig,
    TFDeiTForImageClassification,
    TFDeiTForImageClassificationWithTeacher,
    TFDeiTForMaskedImageModeling,
    TFDeiTModel,
    TFViTForImageClassification,
    ViTConfig,
)

HERE = Path(__file__).resolve().parent
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_channels": 3,
    "num_labels": 3,
    "layer_norm_eps": 1e-6,
}
DRAW = np.random.default_rng(0)
PIXELS = {"pixel_values": DRAW.standard_normal((2, 3, 12, 12), dtype=np.float32)}
MASK = {"bool_masked_pos": DRAW.random((2, 9)) < 0.5}
LABELS = {"labels": np.array([2, 0])}
MODELS = {
    "backbone": (TFDeiTModel, DeiTConfig, {}),
    "masked_image": (TFDeiTForMaskedImageModeling, DeiTConfig, MASK),
    "classification": (TFDeiTForImageClassification, DeiTConfig, LABELS),
    "with_teacher": (TFDeiTForImageClassificationWithTeacher, DeiTConfig, {}),
    "vit": (TFViTForImageClassification, ViTConfig, LABELS),
}


def randomise(model, draw):
    for weight in model.weights:
        kind, values = weight.name.split("/")[-1].split(":")[0], draw.standard_normal(weight.shape)
        if kind == "kernel":  # (inputs, outputs), or (height, width, inputs, outputs)
            values /= np.sqrt(np.prod(weight.shape[:-1]))
        elif kind == "gamma":
            values = 1 + 0.3 * values
        else:  # a bias, a LayerNorm's beta, a token or the positions
            values *= 0.4
        weight.assign(values.astype(np.float32))


def record(model, inputs):
    arrays = dict(inputs)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True, training=False)
    for name, value in outputs.items():
        if isinstance(value, tuple):
            arrays.update({f"{name}_{index}": each.numpy() for index, each in enumerate(value)})
        else:
            arrays[name] = value.numpy().mean() if name == "loss" else value.numpy()
    return arrays


for seed, (folder, (model_class, config_class, targets)) in enumerate(MODELS.items(), start=1):
    model = model_class(config_class(**SHAPE))
    model.build_in_name_scope()  # as from_pretrained does: gives the weights their usual names
    randomise(model, np.random.default_rng(seed))
    saves = {folder: False} | ({f"{folder}_safetensors": True} if folder == "with_teacher" else {})
    for name, safe in saves.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name, safe_serialization=safe)
    np.savez_compressed(HERE / folder / "golden.npz", **record(model, PIXELS | targets))
