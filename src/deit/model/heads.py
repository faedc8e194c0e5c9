"""From the logits of a classifier's heads to scores. B images, C classes."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from deit.choices import Head, Scoring
from deit.model.outputs import DeiTForImageClassificationWithTeacherOutput, ModelOutput


def fuse_heads(cls_logits: Tensor, distillation_logits: Tensor, head: Head = "fused") -> Tensor:
    """Class probabilities (B, C) from the two heads' logits (B, C).

    - `fused`: softmax of the mean of the logits (the original code, `transformers`, timm).
    - `softmax`: mean of the softmaxes (the paper, section 4: "we add the softmax output by the two classifiers").
    - `class`, `distillation`: one head alone.
    """
    match head:
        case "fused":
            return ((cls_logits + distillation_logits) / 2).softmax(-1)
        case "softmax":
            return (cls_logits.softmax(-1) + distillation_logits.softmax(-1)) / 2
        case "class":
            return cls_logits.softmax(-1)
        case "distillation":
            return distillation_logits.softmax(-1)
    raise ValueError(f"head={head!r} is not known; choose fused, class, distillation or softmax")


def head_probabilities(output: ModelOutput, temperature: float = 1.0) -> dict[Head, Tensor]:
    """Class probabilities (B, C) of every head, from a classifier's output. Logits are divided by `temperature`.

    A classifier with a single head has the same probabilities under `fused` and `class`.
    """
    if isinstance(output, DeiTForImageClassificationWithTeacherOutput):
        heads: tuple[Head, ...] = get_args(Head)
        both = output.cls_logits.float() / temperature, output.distillation_logits.float() / temperature
        return {head: fuse_heads(*both, head) for head in heads}
    alone = (output["logits"].float() / temperature).softmax(-1)
    return {"fused": alone, "class": alone}


def head_scores(output: ModelOutput, scoring: Scoring = "softmax", temperature: float = 1.0) -> dict[Head, Tensor]:
    """Scores (B, C) by every head of a classifier's output.

    `softmax`: the probabilities of classes that exclude each other (`head_probabilities`). `sigmoid`: the probability
    of each label by itself. `none`: the logits. The last two have no head `softmax`, because they have no softmaxes
    whose mean it could be.
    """
    if scoring == "softmax":
        return head_probabilities(output, temperature)
    fields = {"fused": "logits", "class": "logits"}
    if isinstance(output, DeiTForImageClassificationWithTeacherOutput):
        fields = {"fused": "logits", "class": "cls_logits", "distillation": "distillation_logits"}
    logits: dict[Any, Tensor] = {head: output[name].float() / temperature for head, name in fields.items()}
    return {head: scores.sigmoid() if scoring == "sigmoid" else scores for head, scores in logits.items()}
