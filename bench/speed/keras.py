"""Inference speed of our Keras backbone on the CPU, beside keras-hub's backbone and our PyTorch backbone.

    python -m bench.speed.keras [--rounds 7] [--case "tiny 1"|"tiny 32"|...]

All models compute in float32 on the same random pixels, with channels first for ours and last for keras-hub's. Both
Keras models run on TensorFlow and are called in three ways: `predict_on_batch`, which Keras compiles with XLA only if
there is a GPU; `tf.function`; and `tf.function` compiled with XLA. The PyTorch model is called in inference mode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Comparison, answer
from deit import VARIANTS, DeiTConfig, weights

CASES = {
    f"{size} {batch}": {"variant": f"deit-{size}-distilled-patch16-224", "batch": batch}
    for size in ("tiny", "base")
    for batch in (1, 32)
}
CONTENDERS = (*(f"{name} {way}" for name in ("deit", "keras-hub") for way in ("predict", "graph", "xla")), "pytorch")

Built = tuple[Any, Iterable[Any], Any]
"""A model, its parameters, and the pixels as it takes them. Only the contenders that need a framework load it."""
Call = Callable[[], Any]


def deit_model(config: DeiTConfig, pixels: np.ndarray) -> Built:
    from deit import TFDeiTModel

    model = TFDeiTModel(config, add_pooling_layer=False)
    return model, model.weights, pixels


def hub_model(config: DeiTConfig, pixels: np.ndarray) -> Built:
    from keras_hub.models import DeiTBackbone

    model = DeiTBackbone(
        image_shape=(*config.image_hw, config.num_channels),
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        layer_norm_epsilon=config.layer_norm_eps,
        use_mha_bias=config.qkv_bias,
    )
    return model, model.weights, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def torch_model(config: DeiTConfig, pixels: np.ndarray) -> Built:
    import torch

    from deit import DeiTModel

    model = DeiTModel(config, add_pooling_layer=False).eval()
    return model, model.parameters(), torch.from_numpy(pixels)


def predicted(model: Any, pixels: Any) -> Call:
    return partial(model.predict_on_batch, pixels)


def as_graph(model: Any, pixels: Any, compiled: bool = False) -> Call:
    import tensorflow as tf

    return partial(tf.function(model, jit_compile=compiled), tf.constant(pixels))


def inferred(model: Any, pixels: Any) -> Call:
    import torch

    @torch.inference_mode()
    def call() -> Any:
        return model(pixels)

    return call


MODELS: dict[str, Callable[[DeiTConfig, np.ndarray], Built]] = {
    "deit": deit_model,
    "keras-hub": hub_model,
    "pytorch": torch_model,
}
CALLS: dict[str, Callable[[Any, Any], Call]] = {
    "predict": predicted,
    "graph": as_graph,
    "xla": partial(as_graph, compiled=True),
    "": inferred,
}


def work(contender: str, variant: str, batch: int) -> None:
    """Calls a contender on a batch whenever it is asked to."""
    name, _, way = contender.partition(" ")
    config = VARIANTS[variant]
    random = np.random.default_rng(0)
    pixels = random.standard_normal((batch, config.num_channels, *config.image_hw), np.float32)
    model, parameters, taken = MODELS[name](config, pixels)
    found = sum(math.prod(parameter.shape) for parameter in parameters)
    expected = sum(map(math.prod, weights.manifest(config, "backbone").values()))
    assert found == expected, f"{contender} has {found} parameters, expected {expected}"
    answer(CALLS[way](model, taken))


COMPARISON = Comparison(
    module="bench.speed.keras",
    description=__doc__,
    records=Path(__file__).with_suffix(".jsonl"),
    cases=CASES,
    contenders=lambda case: CONTENDERS,
    work=work,
    step="call",
    images="batch",
    packages=("torch", "keras", "tensorflow", "keras_hub"),
)

if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    COMPARISON.main()
