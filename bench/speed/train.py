"""Training speed on the CPU, beside timm and transformers: steps of DeiT-Ti with distillation token.

    python -m bench.speed.train [--rounds 7] [--case "32/4"|"224/16"|...] [--avx2]

A step is the forward pass, the cross-entropies of both heads (with labels and a teacher's decisions), the backward
pass, and fused AdamW. The peers run in their own float32 and in bfloat16 autocast. With `--avx2`, all run in float32,
without instructions newer than AVX2.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Comparison, answer

CASES = {
    "32/4": {"image": 32, "patch": 4, "batch": 128, "drop_path": 0.0},
    "32/4 stochastic depth": {"image": 32, "patch": 4, "batch": 128, "drop_path": 0.1},
    "224/16": {"image": 224, "patch": 16, "batch": 16, "drop_path": 0.0},
    "224/16 stochastic depth": {"image": 224, "patch": 16, "batch": 16, "drop_path": 0.1},
}
CONTENDERS = ("deit", "timm float32", "timm bfloat16", "transformers float32", "transformers bfloat16")
WIDTH, DEPTH, HEADS, CLASSES = 192, 12, 3, 10

Heads = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels to the logits of the class head and of the distillation head."""


def deit_model(image: int, patch: int, drop_path: float) -> tuple[nn.Module, Heads]:
    from deit import DeiTConfig, DeiTForImageClassificationWithTeacher
    from deit.machine import keep_memory

    keep_memory()
    config = DeiTConfig(**_settings(image, patch), layer_norm_eps=1e-6, encoder_stride=patch, drop_path_rate=drop_path)
    return _with_heads(DeiTForImageClassificationWithTeacher(config))


def timm_model(image: int, patch: int, drop_path: float) -> tuple[nn.Module, Heads]:
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=image,
        patch_size=patch,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        drop_path_rate=drop_path,
    )
    model.set_distilled_training(True)
    return model, model


def transformers_model(image: int, patch: int, drop_path: float) -> tuple[nn.Module, Heads]:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    assert not drop_path, "transformers has no stochastic depth"
    return _with_heads(DeiTForImageClassificationWithTeacher(DeiTConfig(**_settings(image, patch))))


def _settings(image: int, patch: int) -> dict[str, Any]:
    """The settings with the same names in transformers' configuration and ours."""
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "image_size": image,
        "patch_size": patch,
        "num_labels": CLASSES,
    }


def _with_heads(model: nn.Module) -> tuple[nn.Module, Heads]:
    both = operator.attrgetter("cls_logits", "distillation_logits")
    return model, lambda pixels: both(model(pixels))


MODELS = {"deit": deit_model, "timm": timm_model, "transformers": transformers_model}


def contenders(case: Mapping[str, Any]) -> list[str]:
    return [name for name in CONTENDERS if not (case["drop_path"] and name.startswith("transformers"))]


def held(case: Mapping[str, Any]) -> list[str]:
    return ["deit float32", *(name for name in contenders(case) if name.endswith("float32"))]


def work(
    contender: str,
    image: int,
    patch: int,
    batch: int,
    drop_path: float,
    take: Callable[[Callable[[], None]], None] = answer,
) -> None:
    """Trains a contender on random pixels, for as many steps as `take` wants."""
    from deit.machine import resolve_precision

    name, _, precision = contender.partition(" ")
    torch.manual_seed(0)
    model, heads = MODELS[name](image, patch, drop_path)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = getattr(torch, precision) if precision else resolve_precision("auto", torch.device("cpu"))
    pixels, labels = torch.randn(batch, 3, image, image), torch.randint(CLASSES, (batch,))
    taught = torch.randint(CLASSES, (batch,))

    def update() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            own, distilled = heads(pixels)
        loss = (F.cross_entropy(own.float(), labels) + F.cross_entropy(distilled.float(), taught)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    take(update)


COMPARISON = Comparison(
    module="bench.speed.train",
    description=__doc__,
    records=Path(__file__).with_suffix(".jsonl"),
    cases=CASES,
    contenders=contenders,
    held=held,
    work=work,
    step="update",
    images="batch",
    packages=("torch", "timm", "transformers"),
)

if __name__ == "__main__":
    COMPARISON.main()
