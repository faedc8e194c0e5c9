"""`deit.model.losses` in Keras: the same functions of logits, with the same values.

They compute in float32 whatever the logits' type. A class that the model does not have makes the loss NaN, because a
compiled function can't raise.

Their `weights` (B,) are Keras' sample weights, which `deit.model.losses` doesn't have.

B images, C classes or regression targets.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from deit.config import DeiTConfig
from deit.model.loss_rules import (
    Distillation,
    Normalisation,
    check_labels,
    check_soft_teacher,
    distillation_settings,
    problem_type,
)


def _is_whole(x: Any) -> bool:
    return keras.backend.is_int_dtype(x.dtype)


def _mean(values: Any, weights: Any = None) -> Any:
    """Mean over images of values (B, ...), each times its weight (B,), as Keras' losses reduce them."""
    values = ops.mean(ops.reshape(values, (ops.shape(values)[0], -1)), axis=1)
    return ops.mean(values if weights is None else values * ops.reshape(ops.cast(weights, values.dtype), (-1,)))


def cross_entropy(logits: Any, targets: Any, smoothing: float = 0.0, weights: Any = None) -> Any:
    """Cross-entropy, as a mean over images. `targets` are class indices (B,) or probabilities (B, C)."""
    logits = ops.cast(logits, "float32")
    classes = logits.shape[-1]
    if len(targets.shape) == 1:
        known = (targets >= 0) & (targets < classes)
        targets = ops.where(known[:, None], ops.one_hot(targets, classes, dtype="float32"), float("nan"))
    targets = ops.cast(targets, "float32") * (1 - smoothing) + smoothing / classes
    return _mean(-ops.sum(targets * ops.log_softmax(logits), axis=-1), weights)


def classification_loss(logits: Any, labels: Any, config: DeiTConfig, weights: Any = None) -> Any:
    """The loss for `labels`, by `config.problem_type` or by `transformers`' own decision, as in `deit.model.losses`."""
    whole = _is_whole(labels)
    problem = problem_type(config, labels.dtype, whole)
    if problem == "single_label_classification":
        labels = ops.reshape(labels, (-1,))
        check_labels(labels.shape, logits.shape[:1], problem)
        return cross_entropy(logits, labels, weights=weights)
    logits, labels = ops.cast(logits, "float32"), ops.cast(labels, "float32")
    if config.num_labels == 1:
        logits, labels = ops.reshape(logits, (-1,)), ops.reshape(labels, (-1,))
    check_labels(labels.shape, logits.shape, problem)
    if problem == "regression":
        return _mean(ops.square(logits - labels), weights)
    return _mean(ops.softplus(logits) - logits * labels, weights)  # binary cross-entropy


def distillation_loss(
    cls_logits: Any,
    distillation_logits: Any,
    labels: Any,
    teacher: Any,
    *,
    kind: Distillation = "hard",
    weight: float | None = None,
    temperature: float | None = None,
    normalisation: Normalisation = "images",
    smoothing: float = 0.0,
    weights: Any = None,
) -> Any:
    """The loss of a student that has a teacher (Touvron et al. 2020, eq. 2, 3). Arguments as in `deit.model.losses`."""
    weight, tau = distillation_settings(kind, weight, temperature)
    truth = cross_entropy(cls_logits, labels, smoothing, weights)
    if kind == "hard":
        decisions = ops.argmax(teacher, axis=-1) if len(teacher.shape) == 2 else teacher
        taught = cross_entropy(distillation_logits, decisions, weights=weights)
    else:
        check_soft_teacher(distillation_logits.shape, teacher.shape)
        log_p = ops.log_softmax(ops.cast(teacher, "float32") / tau)
        log_q = ops.log_softmax(ops.cast(distillation_logits, "float32") / tau)
        divergence = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)  # (B,)
        taught = tau**2 * _mean(divergence, weights) / (1 if normalisation == "images" else teacher.shape[-1])
    return (1 - weight) * truth + weight * taught


def masked_image_loss(pixels: Any, reconstruction: Any, mask: Any) -> Any:
    """Mean absolute difference over the masked pixels. Arguments as in `deit.model.losses`."""
    height, width = reconstruction.shape[-2:]
    rows, columns = mask.shape[-2:]
    hidden = ops.repeat(ops.repeat(ops.cast(mask, "float32"), height // rows, axis=1), width // columns, axis=2)
    pixels, reconstruction = ops.cast(pixels[..., :height, :width], "float32"), ops.cast(reconstruction, "float32")
    difference = ops.abs(pixels - reconstruction) * hidden[:, None]
    return ops.sum(difference) / (ops.sum(hidden) + 1e-5) / pixels.shape[1]
