"""Inference speed of the Keras backbone on the CPU beside keras-hub's, and beside our PyTorch one.

    python bench/keras_speed.py [--rounds 7] [--case "tiny 1"|"tiny 32"|...]

Each contender is a process of its own with all cores; they take turns, round by round, so that what else the machine
does meets all alike. All compute in float32, on the same random pixels: channels first for ours, last for keras-hub's.
Both Keras models, on TensorFlow, are called in three ways: `predict_on_batch`, which Keras compiles with XLA only where
there is a GPU; `tf.function`; and `tf.function` compiled with XLA. The best of the three counts, for ours too. The
PyTorch model is called in inference mode. Appends a record to bench/keras_speed.jsonl: images per second, median over
the rounds, and the ratio of our best to each peer's best, round by round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from train_speed import HERE, answer, contest, machine, run

from deit import VARIANTS, DeiTConfig, weights

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
CASES = {
    f"{size} {batch}": {"variant": f"deit-{size}-distilled-patch16-224", "batch": batch}
    for size in ("tiny", "base")
    for batch in (1, 32)
}
CONTENDERS = (*(f"{name} {way}" for name in ("deit", "keras-hub") for way in ("predict", "graph", "xla")), "pytorch")


def deit_model(config: DeiTConfig, pixels: np.ndarray) -> Any:
    from deit import TFDeiTModel

    model = TFDeiTModel(config, add_pooling_layer=False)
    return model, model.weights, pixels


def hub_model(config: DeiTConfig, pixels: np.ndarray) -> Any:
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


def torch_model(config: DeiTConfig, pixels: np.ndarray) -> Any:
    import torch

    from deit import DeiTModel

    model = DeiTModel(config, add_pooling_layer=False).eval()
    return model, list(model.parameters()), torch.from_numpy(pixels)


def predicted(model: Any, pixels: Any) -> Callable[[], Any]:
    return partial(model.predict_on_batch, pixels)


def as_graph(model: Any, pixels: Any, compiled: bool = False) -> Callable[[], Any]:
    import tensorflow as tf

    return partial(tf.function(model, jit_compile=compiled), tf.constant(pixels))


def inferred(model: Any, pixels: Any) -> Callable[[], Any]:
    import torch

    @torch.inference_mode()
    def call() -> Any:
        return model(pixels)

    return call


MODELS: dict[str, Callable[..., Any]] = {"deit": deit_model, "keras-hub": hub_model, "pytorch": torch_model}
CALLS: dict[str, Callable[..., Callable[[], Any]]] = {
    "predict": predicted,
    "graph": as_graph,
    "xla": partial(as_graph, compiled=True),
    "": inferred,
}


def work(contender: str, variant: str, batch: int) -> None:
    """A contender."""
    name, _, way = contender.partition(" ")
    config = VARIANTS[variant]
    pixels = np.random.default_rng(0).standard_normal((batch, config.num_channels, *config.image_hw), "float32")
    model, parameters, pixels = MODELS[name](config, pixels)
    found, expected = (
        sum(map(math.prod, shapes))
        for shapes in ((parameter.shape for parameter in parameters), weights.manifest(config, "backbone").values())
    )
    assert found == expected, f"{contender} has {found} parameters, expected {expected}"
    answer(CALLS[way](model, pixels))


def measure(case_name: str, rounds: int) -> dict[str, Any]:
    case = CASES[case_name]
    return {
        "case": case_name,
        **case,
        "rounds": rounds,
        **contest(__file__, CONTENDERS, case_name, case["batch"], rounds, "call"),
        **machine("torch", "keras", "tensorflow", "keras_hub"),
    }


if __name__ == "__main__":
    run(__doc__, CASES, measure, work, HERE / "keras_speed.jsonl")
