"""Quantises graphs to 8 bits with NNCF, and finds the layers that 8 bits hurt most."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Layers = Mapping[str, nn.Linear | nn.Conv2d]
"""The layers of the PyTorch model that multiply with weights, by name."""

_RANKED = 32
"""Maximum number of images that rank the layers."""


def quantised_onnx(
    model: Any, layers: Layers, calibration: Sequence[np.ndarray], kept: Sequence[str], *, transformer: bool
) -> tuple[Any, list[str]]:
    """Returns an ONNX model in int8, and the names of its layers in float: those in `kept`, and those that NNCF leaves
    so, such as squeeze-and-excitation.

    `calibration` holds images (1, C, H, W), which set the ranges of the inputs. Raises `ValueError` if a layer is not
    found in the graph.
    """
    nodes = [node.name for node in model.graph.node]
    given = [{"pixel_values": pixels} for pixels in calibration]
    return _quantised(model, layers, given, kept, nodes, _onnx_weights, transformer)


def quantised_openvino(
    model: Any, layers: Layers, calibration: Sequence[np.ndarray], kept: Sequence[str], *, transformer: bool
) -> tuple[Any, list[str]]:
    """Does the same as `quantised_onnx` for an OpenVINO model."""
    nodes = [node.get_friendly_name() for node in model.get_ops()]
    return _quantised(model, layers, calibration, kept, nodes, _openvino_weights, transformer)


def _onnx_weights(model: Any) -> dict[str, np.ndarray]:
    """The constants of the nodes that multiply with one. In int8, a node multiplies with what is made of a constant."""
    import onnx

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.name: onnx.numpy_helper.to_array(values[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in values
    }


def _openvino_weights(model: Any) -> dict[str, np.ndarray]:
    """The same for OpenVINO."""
    weights = {}
    for node in model.get_ops():
        if node.get_type_name() in ("MatMul", "Convolution", "GroupConvolution"):
            constant = node.input_value(1).get_node()
            if constant.get_type_name() == "Constant":
                values = constant.get_data()
                if node.get_type_name() == "GroupConvolution":  # (groups, outputs of a group, inputs, height, width)
                    values = values.reshape(-1, *values.shape[2:])
                weights[node.get_friendly_name()] = values
    return weights


def _quantised(
    model: Any,
    layers: Layers,
    calibration: Sequence[Any],
    kept: Sequence[str],
    nodes: Sequence[str],
    weights_of: Callable[[Any], Mapping[str, np.ndarray]],
    transformer: bool,
) -> tuple[Any, list[str]]:
    """Quantises a graph. `nodes` names all of its nodes.

    Products inside attention stay in float, because runtimes then recognise the attention. Sums and norms stay in float
    because 8 bits hurt a transformer most there and save little time.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    # NNCF's correction of biases ignores the padding at image borders, which cost a ConvNet at 16 pixels 5 points. Its
    # default ranges are means over images, which clip half of them, and probabilities moved twice as far.
    settings = AdvancedQuantizationParameters(
        disable_bias_correction=True, activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    node_of = _nodes_of(layers, weights_of(model))
    chosen = {node for layer, node in node_of.items() if layer not in kept}
    with redirect_stdout(io.StringIO()):  # NNCF prints a progress bar for each pass
        quantised = nncf.quantize(
            model,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            advanced_parameters=settings,
            ignored_scope=nncf.IgnoredScope(names=[name for name in nodes if name not in chosen], validate=False),
        )
    left = weights_of(quantised)
    return quantised, [layer for layer, node in node_of.items() if node in left]


def _nodes_of(layers: Mapping[str, nn.Module], weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Finds the node that multiplies with each layer's weights.

    It compares values, because exporters rename and transpose weights, and multiply the factors of a norm into their
    rows.
    """
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
                f"the layer {layer} is not found in the exported graph, so int8 is not possible; take a float format, "
                "and please report this"
            )
        found[layer] = same[0]
        del left[same[0]]
    return found


def _directions(weights: np.ndarray) -> np.ndarray:
    """The absolute values of weights as rows of length 1, (outputs, inputs)."""
    rows = np.abs(weights.reshape(len(weights), -1).astype(np.float64))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


@torch.inference_mode()
def by_sensitivity(logits: nn.Module, layers: Layers, calibration: Sequence[np.ndarray]) -> list[str]:
    """Names of the layers, in the order of how far each one alone moves the logits if it is rounded to 8 bits.

    The worst layer comes first. The logits are those of up to 32 of the `calibration` images.
    """
    pixels = torch.from_numpy(np.concatenate(calibration[:: math.ceil(len(calibration) / _RANKED)]))
    exact = logits(pixels)["logits"]
    moved = {}
    for name, layer in layers.items():
        with _rounded(layer):
            moved[name] = float((logits(pixels)["logits"] - exact).square().mean())
    return sorted(moved, key=lambda name: -moved[name])


@contextmanager
def _rounded(layer: nn.Linear | nn.Conv2d) -> Iterator[None]:
    """Rounds the weights and inputs of a layer to 8 bits.

    Weights are rounded symmetrically around zero, for each output channel. Inputs are rounded in steps of their whole
    range.
    """
    exact = layer.weight
    step = exact.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (exact.dim() - 1)) / 127

    apply = layer.forward

    def with_rounded_input(x: Tensor) -> Tensor:
        low, high = x.aminmax()
        width = ((high - low) / 255).clamp(min=1e-12)
        return apply(((x - low) / width).round() * width + low)

    layer.weight = nn.Parameter((exact / step).round() * step, requires_grad=False)
    # No hook, because the last block would compute more tokens for it.
    layer.forward = with_rounded_input  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del layer.forward
        layer.weight = exact
