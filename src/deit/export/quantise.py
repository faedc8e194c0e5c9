"""Graphs in 8 bits by NNCF, layer by layer, and the layers that 8 bits hurt most."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Layers = Mapping[str, nn.Linear | nn.Conv2d]
"""What multiplies with weights in the PyTorch model, by name."""

_RANKED = 32
"""Images that layers are ranked by."""


def quantised_onnx(
    model: Any, layers: Layers, calibration: Sequence[np.ndarray], kept: Sequence[str], *, transformer: bool
) -> Any:
    """An ONNX model in int8, but for the layers in `kept`; ranges are those over `calibration`, images of (1, C, H, W).

    Raises `ValueError` where a layer is not found in the graph.
    """
    import onnx

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        node.name: onnx.numpy_helper.to_array(values[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in values
    }
    nodes = [node.name for node in model.graph.node]
    given = [{"pixel_values": pixels} for pixels in calibration]
    return _quantised(model, layers, given, kept, nodes, weights, transformer)


def quantised_openvino(
    model: Any, layers: Layers, calibration: Sequence[np.ndarray], kept: Sequence[str], *, transformer: bool
) -> Any:
    """The same of an OpenVINO model."""
    weights = {}
    for node in model.get_ops():
        if node.get_type_name() in ("MatMul", "Convolution"):
            constant = node.input_value(1).get_node()
            if constant.get_type_name() == "Constant":
                weights[node.get_friendly_name()] = constant.get_data()
    nodes = [node.get_friendly_name() for node in model.get_ops()]
    return _quantised(model, layers, calibration, kept, nodes, weights, transformer)


def _quantised(
    model: Any,
    layers: Layers,
    calibration: Sequence[Any],
    kept: Sequence[str],
    nodes: Sequence[str],
    weights: Mapping[str, np.ndarray],
    transformer: bool,
) -> Any:
    """`nodes` are the names of all nodes of the graph, `weights` the constants of those that multiply with one.

    What is inside attention, and every sum and norm, stays in float: the first so that runtimes know it for attention,
    the others because 8 bits hurt a transformer most there, for little time saved.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    # NNCF's correction of biases assumes images without borders: it took 5 points from a ConvNet at 16 pixels. Its
    # ranges are means over images, beyond which half of these are cut: probabilities moved twice as far.
    settings = AdvancedQuantizationParameters(
        disable_bias_correction=True, activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    node_of = _nodes_of(layers, weights)
    chosen = {node for layer, node in node_of.items() if layer not in kept}
    with redirect_stdout(io.StringIO()):  # a progress bar for each of its passes
        return nncf.quantize(
            model,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            advanced_parameters=settings,
            ignored_scope=nncf.IgnoredScope(names=[name for name in nodes if name not in chosen], validate=False),
        )


def _nodes_of(layers: Mapping[str, nn.Module], weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """For each layer the node that multiplies with its weights, found by their values: exporters rename and transpose
    them, and multiply the factors of a norm into their rows."""
    left = {name: _directions(values) for name, values in weights.items()}
    turned = {name: _directions(values.T) for name, values in weights.items() if values.ndim == 2}
    found = {}
    for layer, module in layers.items():
        own = _directions(module.weight.detach().numpy())  # type: ignore[operator]
        same = [
            name
            for name in left
            if any(
                other is not None and other.shape == own.shape and np.allclose(other, own, atol=1e-4)
                for other in (left[name], turned.get(name))
            )
        ]
        if not same:
            raise ValueError(
                f"the layer {layer} is not found in the exported graph, so int8 can't be had; please "
                "report it, and take a float format"
            )
        found[layer] = same[0]
        del left[same[0]]
    return found


def _directions(weights: np.ndarray) -> np.ndarray:
    """Absolute values, (outputs, inputs), of rows brought to length 1."""
    rows = np.abs(weights.reshape(len(weights), -1).astype(np.float64))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


@torch.inference_mode()
def by_sensitivity(logits: nn.Module, layers: Layers, calibration: Sequence[np.ndarray]) -> list[str]:
    """Names of the layers, first the one whose rounding to 8 bits, alone, moves the logits of some of the `calibration`
    most."""
    pixels = torch.from_numpy(np.concatenate(calibration[:: math.ceil(len(calibration) / _RANKED)]))
    exact = logits(pixels)["logits"]
    moved = {}
    for name, layer in layers.items():
        with _rounded(layer):
            moved[name] = float((logits(pixels)["logits"] - exact).square().mean())
    return sorted(moved, key=lambda name: -moved[name])


@contextmanager
def _rounded(layer: nn.Linear | nn.Conv2d) -> Iterator[None]:
    """Weights and inputs of a layer in 8 bits: weights symmetric around zero for each output channel, the input in
    steps of its whole range."""
    exact = layer.weight
    step = exact.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (exact.dim() - 1)) / 127

    def round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = inputs[0].aminmax()
        width = ((high - low) / 255).clamp(min=1e-12)
        return (((inputs[0] - low) / width).round() * width + low,)

    layer.weight = nn.Parameter((exact / step).round() * step, requires_grad=False)
    handle = layer.register_forward_pre_hook(round_input)
    try:
        yield
    finally:
        handle.remove()
        layer.weight = exact
