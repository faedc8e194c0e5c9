"""Small models whose values are all random, the folders that training would leave of them, and inputs for them."""

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deit.config import ACTIVATIONS, ConvNetConfig, DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    PreTrained,
)

NAMES = ("ant", "bee", "cat", "dog", "eel")
LABELS = dict(enumerate(NAMES))
CLASS_OF = {
    "backbone": DeiTModel,
    "masked_image": DeiTForMaskedImageModeling,
    "classification": DeiTForImageClassification,
    "with_teacher": DeiTForImageClassificationWithTeacher,
}


def shrink(config: DeiTConfig, **changes: Any) -> DeiTConfig:
    """The same architecture, narrow and two blocks deep."""
    width = 8 * config.num_attention_heads
    return config.replace(
        **{"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_labels": 7, **changes}
    )


def small(**changes: Any) -> DeiTConfig:
    return DeiTConfig(
        **{
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": 16,
            "patch_size": 4,
            "encoder_stride": 4,
            "layer_norm_eps": 1e-6,
            "num_labels": 5,
            **changes,
        }
    )


def random_config(seed: int, *, square: bool = False, **changes: Any) -> DeiTConfig:
    """Sizes and options drawn from `seed`. `square`: image and patch both one number, with whole patches."""
    draw = random.Random(seed)
    heads, patch = draw.choice([1, 2, 3, 4]), draw.choice([2, 3, 4])
    width = heads * draw.choice([4, 6, 8])
    image: Any = patch * draw.randint(2, 5)
    if not square and draw.random() < 0.6:
        patch = (patch, draw.choice([2, 3, 5]))
        image = (patch[0] * draw.randint(1, 4) + draw.randint(0, 1), patch[1] * draw.randint(2, 4))
    fields = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randint(1, 4),
        "intermediate_size": draw.choice([5, 16, 32]),
        "hidden_act": draw.choice(ACTIVATIONS),
        "image_size": image,
        "patch_size": patch,
        "encoder_stride": patch if square else 16,
        "num_channels": draw.choice([1, 3, 4]),
        "qkv_bias": draw.random() < 0.5,
        "layer_norm_eps": draw.choice([1e-12, 1e-6, 1e-3]),
        "pooler_output_size": draw.choice([None, 3, 20]),
        "pooler_act": draw.choice(ACTIVATIONS),
        "num_labels": draw.choice([0, 1, 2, 9]),
    }
    return DeiTConfig(**{**fields, **changes})


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> Any:
    """Random values for every parameter, large enough that no term of the computation is negligible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(0.3 * noise + (1.0 if gain or name.endswith(("scale1", "scale2", "gamma")) else 0.0))
        elif any(word in name for word in ("token", "pos")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    return model


def build(kind: str, config: DeiTConfig, seed: int = 0, **options: Any) -> PreTrained:
    return scramble(CLASS_OF[kind](config, **options), seed).eval()


def saved(model: Any, folder: Path | str, processor: DeiTImageProcessor | None = None) -> Path:
    """The folder, with the model in it and a processor: the paper's for the size of the model, if none is given."""
    model.save_pretrained(folder)
    (processor or DeiTImageProcessor.paper(model.config.image_size)).save_pretrained(folder)
    return Path(folder)


def trained_folder(
    folder: Path | str,
    kind: str = "with_teacher",
    labels: Iterable[str] = "abcde",
    *,
    seed: int = 0,
    processor: DeiTImageProcessor | None = None,
    **changes: Any,
) -> Path:
    """The folder of a small model with its processor and its labels, as training leaves it.

    `kind` is one of `CLASS_OF`, "plain" for a classifier without distillation token, or "convnet". `changes` are
    fields of its config."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(labels)), **changes}
    if kind == "convnet":
        config = ConvNetConfig(**{"widths": (4,), "depth": 1, "image_size": 16, **fields})
        return saved(scramble(ConvNet(config), seed).eval(), folder, processor)
    if kind == "plain":
        kind, fields = "classification", {"distillation_token": False, **fields}
    return saved(build(kind, small(num_labels=None, **fields), seed), folder, processor)


def images(config: DeiTConfig, count: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.num_channels, *(size or config.image_hw), generator=generator)


def mask_for(config: DeiTConfig, count: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    rows, columns = config.grid_of(*(size or config.image_hw))
    mask = torch.rand(count, rows * columns, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0], mask[:, -1] = True, False
    return mask


def loss_of(output: Any) -> torch.Tensor:
    """A number that depends on every tensor of an output, with gradients of moderate size."""
    tensors = [
        output[name]
        for name in ("last_hidden_state", "pooler_output", "reconstruction", "logits", "cls_logits")
        if name in output
    ]
    generator = torch.Generator().manual_seed(3)
    return sum((t * torch.randn(t.shape, generator=generator)).mean() for t in tensors)


def logits_of(out):
    """By token, and the number of its row among all tokens."""
    if "cls_logits" in out:
        return {"class": (0, out.cls_logits), "distillation": (1, out.distillation_logits)}
    return {"class": (0, out.logits)}
