"""The losses that training minimises, as functions of logits. B images, C classes or regression targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.config import DeiTConfig
from deit.model.loss_rules import (
    Distillation,
    Normalisation,
    check_labels,
    check_soft_teacher,
    distillation_settings,
    problem_type,
)


def cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy, as a mean over images. `targets` are class indices (B,) or probabilities (B, C).

    With `class_weights` (C,), each label's loss is multiplied by the weight of its class. A mixed image has two labels,
    so its loss is the sum over both of share * weight * loss of that label.

    The sum is divided by the number of images. `torch.nn.CrossEntropyLoss` divides it by the sum of their weights, and
    then the value would depend on how a batch is divided among processes. Over all training images both are the same,
    because balanced weights have the mean 1 there.

    Smoothing is part of a label's loss: the smoothed label keeps the weight of its class. PyTorch gives the smoothed
    part the weights of all classes instead. If one class is rare, its large weight would then be in every image's loss.
    """
    if class_weights is not None:
        weighted = _shares(logits, targets) * class_weights.to(logits.dtype)  # (B, C)
        spread = smoothing / logits.shape[-1] * weighted.sum(-1, keepdim=True)  # (B, 1)
        return F.cross_entropy(logits, (1 - smoothing) * weighted + spread)
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets.long()
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def _shares(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, C): each class's share of an image's label, in the type of the logits."""
    if targets.dim() == 1:
        targets = F.one_hot(targets.long(), logits.shape[-1])
    return targets.to(logits.dtype)


def binary_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, as a mean over images and classes (Touvron et al. 2022, DeiT III).

    `targets` are class indices (B,) or shares (B, C). Every class with a share counts as present: two mixed images have
    both of their classes.

    With `class_weights` (C,), an image's loss is multiplied by the weight of its class, and that of a mixed image by
    the mean of its two weights by their shares. The sum is divided by the number of images.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets.long(), logits.shape[-1])
    present = (targets > 0).to(logits.dtype)
    if class_weights is None:
        return F.binary_cross_entropy_with_logits(logits, present)
    by_image = F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(-1)  # (B,)
    return (by_image * (targets.to(logits.dtype) @ class_weights.to(logits.dtype))).mean()


def cosub_loss(
    one: Tensor,
    other: Tensor,
    targets: Tensor,
    *,
    binary: bool,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Co-training of two submodels (Touvron et al. 2022, "Co-training 2^L submodels", eq. 1).

    Each submodel's logits (B, C) learn from the labels and from the other submodel. These four losses have a quarter of
    the weight each. Nothing flows back into a submodel that acts as the teacher. `class_weights` weigh the two losses
    of the labels.
    """
    if binary:
        total = sum(binary_cross_entropy(logits, targets, class_weights) for logits in (one, other)) + sum(
            F.binary_cross_entropy_with_logits(logits, teacher.detach().sigmoid())
            for logits, teacher in ((one, other), (other, one))
        )
    else:
        total = sum(cross_entropy(logits, targets, smoothing, class_weights) for logits in (one, other)) + sum(
            F.cross_entropy(logits, teacher.detach().softmax(-1)) for logits, teacher in ((one, other), (other, one))
        )
    return total / 4  # type: ignore[return-value]


def classification_loss(
    logits: Tensor, labels: Tensor, config: DeiTConfig, items: Tensor | int | None = None
) -> Tensor:
    """The loss that `transformers` computes for `labels`, by `config.problem_type` or by its own decision.

    It decides like this. One target: regression (mean squared error). Whole numbers: one class for each image
    (cross-entropy over (B,)). Otherwise: multi-label (binary cross-entropy over (B, C)).

    The mean over the labels, or with `items` their sum divided by that number: the labels of a whole step, if it is
    made of several batches.
    """
    reduction = "mean" if items is None else "sum"
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    problem = problem_type(config, labels.dtype, whole)
    if problem == "single_label_classification":
        check_labels(labels.reshape(-1).shape, logits.shape[:1], problem)
        return _per_item(F.cross_entropy(logits, labels.reshape(-1).long(), reduction=reduction), items)
    labels = labels.to(logits.dtype)
    if config.num_labels == 1:
        logits, labels = logits.reshape(-1), labels.reshape(-1)
    check_labels(labels.shape, logits.shape, problem)
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return _per_item(loss(logits, labels, reduction=reduction), items)


def _per_item(total: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return total
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def distillation_loss(
    cls_logits: Tensor,
    distillation_logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    kind: Distillation = "hard",
    weight: float | None = None,
    temperature: float | None = None,
    normalisation: Normalisation = "images",
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The loss of a student that has a teacher (Touvron et al. 2020, section 4), as a mean over images.

    hard, eq. 3: `(1 - weight) CE(cls, labels) + weight CE(distillation, argmax teacher)`.
    soft, eq. 2: `(1 - weight) CE(cls, labels) + weight tau^2 KL(teacher / tau || distillation / tau)`.
    The defaults are the paper's: weight 1/2 for hard; weight 0.1 and tau 3 for soft.

    Args:
        cls_logits: (B, C), of the class token's head, which learns from the labels.
        distillation_logits: (B, C), of the head that learns from the teacher. A model without a distillation token
            passes the same logits twice.
        labels: class indices (B,) or probabilities (B, C).
        teacher: the teacher's logits (B, C). Hard distillation also takes the teacher's decisions (B,).
        normalisation: "images" divides KL by the number of images. "elements" divides it by images times classes, as
            the original code does.
        smoothing: label smoothing, 0 to below 1. The teacher's decisions are never smoothed.
        class_weights: (C,), as for `cross_entropy`. They weigh the loss of the labels only.
    """
    weight, tau = distillation_settings(kind, weight, temperature)
    truth = cross_entropy(cls_logits, labels, smoothing, class_weights)
    if kind == "hard":
        decisions = teacher.argmax(-1) if teacher.dim() == 2 else teacher
        taught = cross_entropy(distillation_logits, decisions)
    else:
        check_soft_teacher(distillation_logits.shape, teacher.shape)
        divergence = F.kl_div(
            F.log_softmax(distillation_logits / tau, dim=-1),
            F.log_softmax(teacher.to(distillation_logits.dtype) / tau, dim=-1),
            reduction="sum",
            log_target=True,
        )
        taught = tau**2 * divergence / (len(teacher) if normalisation == "images" else teacher.numel())
    return (1 - weight) * truth + weight * taught


def masked_image_loss(pixels: Tensor, reconstruction: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the masked pixels (SimMIM, Xie et al. 2021, section 3.4).

    Args:
        pixels: (B, channels, height, width). A border that no whole patch covers is left out.
        reconstruction: (B, channels, rows * patch height, columns * patch width).
        mask: (B, rows, columns), true where the patch was hidden.
    """
    height, width = reconstruction.shape[-2:]
    rows, columns = mask.shape[-2:]
    # Counted in float32 whatever the model's type, because float16 ends at 65504.
    hidden = mask.float().repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
    difference = (pixels[..., :height, :width] - reconstruction).abs() * hidden.unsqueeze(1)
    # The small constant keeps an empty mask at zero instead of NaN; the value is transformers'.
    return difference.sum() / (hidden.sum() + 1e-5) / pixels.shape[1]
