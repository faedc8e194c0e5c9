"""A model in both frameworks with the same random weights, and where they part."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the time goes into compiling for a single call.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from typing import Any

import numpy as np
import pytest
import torch
from support.models import build, images, mask_for

model_keras = pytest.importorskip("deit.model_keras", reason="Keras is not installed")

import keras  # noqa: E402

from deit.config import DeiTConfig  # noqa: E402

TWIN_OF = {
    "backbone": model_keras.TFDeiTModel,
    "masked_image": model_keras.TFDeiTForMaskedImageModeling,
    "classification": model_keras.TFDeiTForImageClassification,
    "with_teacher": model_keras.TFDeiTForImageClassificationWithTeacher,
}
BACKEND = keras.backend.backend()
needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT is written by TensorFlow only")
SLOW_ON_JAX = [pytest.mark.slow] if BACKEND == "jax" else []
"""JAX compiles each operation for each shape, which takes most of the time of these tests."""


def slow_on_jax(test):
    """A test of much that is the same on TensorFlow, where it runs always."""
    return pytest.mark.slow(test) if BACKEND == "jax" else test


def twins(kind: str, config: DeiTConfig, seed: int = 0, dtype: Any = None, **options: Any) -> tuple[Any, Any]:
    """The PyTorch model and the Keras one, in evaluation mode, with the same random weights."""
    ours = build(kind, config, seed, **options)
    twin = TWIN_OF[kind](config, dtype=dtype, **options)
    twin.set_tensors(arrays(ours))
    return ours, twin


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model._tensors().items()}


def given_for(config: DeiTConfig, count: int = 2, size: Any = None, mask: bool = False) -> dict[str, torch.Tensor]:
    given = {"pixel_values": images(config, count, size)}
    return given | ({"bool_masked_pos": mask_for(config, count, size)} if mask else {})


def as_arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def to_numpy(value: Any) -> np.ndarray:
    value = value.detach() if isinstance(value, torch.Tensor) else value
    return np.asarray(keras.ops.convert_to_numpy(value) if not isinstance(value, torch.Tensor) else value, "float32")


def assert_alike(ours: Any, twin: Any, given: dict[str, Any], atol: float = 1e-5) -> None:
    """Same fields and the same values; where not, names the first layer that differs."""
    expected_trace: dict[str, Any] = {}
    found_trace: dict[str, Any] = {}
    with torch.no_grad():
        expected = ours(**given)
        ours(**given, trace=expected_trace)
    found = twin(**as_arrays(given))
    assert list(found.keys()) == list(expected.keys())
    worst = {name: distance(found[name], expected[name]) for name in expected}
    if not max(worst.values()) <= atol:
        twin(**as_arrays(given), trace=found_trace)
        assert list(found_trace) == list(expected_trace)
        for name, value in expected_trace.items():
            assert distance(found_trace[name], value) <= atol, f"{name} is the first to differ: {worst}"
        raise AssertionError(f"no layer differs, but the outputs do: {worst}")


def distance(found: Any, expected: Any) -> float:
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        return max(distance(one, other) for one, other in zip(found, expected, strict=True))
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max()) if found.size else 0.0


def gradients(twin: Any, **given: Any) -> dict[str, np.ndarray]:
    """Of the model's own loss in training, by the names and in the shapes of `weights.manifest`."""
    variables = twin._variables()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = twin(**given, training=True).loss
        found = tape.gradient(loss, [v.value for v in variables.values()])
    else:
        import jax

        trainable = [v.value for v in twin.trainable_variables]
        fixed = [v.value for v in twin.non_trainable_variables]

        def loss_of(values):
            return twin.stateless_call(values, fixed, **given, training=True)[0].loss

        by_path = dict(zip([v.path for v in twin.trainable_variables], jax.grad(loss_of)(trainable), strict=True))
        found = [by_path[v.path] for v in variables.values()]
    shapes = twin._manifest()
    dense = [
        np.zeros(v.shape, "float32") if g is None else to_numpy(g)
        for g, v in zip(found, variables.values(), strict=True)
    ]
    return {
        name: g.T.reshape(shapes[name]) if name.endswith(".weight") else g
        for name, g in zip(variables, dense, strict=True)
    }
