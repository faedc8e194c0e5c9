"""The `config.json` of other projects, as the fields of `DeiTConfig`. What the fields can't say is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]

# ------------------------------------------------------------------------------------------------- transformers' DINOv2

_DINOV2: Fields = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
}
"""Defaults of `transformers.Dinov2Config` that are not those of `DeiTConfig`, or that other fields depend on."""


def from_dinov2(values: Mapping[str, Any]) -> Fields:
    """Fields for a config with `model_type: dinov2` (Oquab et al. 2023): a plain ViT with LayerScale."""
    given = {**_DINOV2, **values}
    if given.pop("use_swiglu_ffn", False):
        raise ValueError(
            "use_swiglu_ffn is true; this package's blocks have a plain MLP. Take DINOv2's small, base or large model"
        )
    if "intermediate_size" not in given:
        given["intermediate_size"] = int(given["hidden_size"] * given.pop("mlp_ratio", 4))
    given.setdefault("layer_scale_init_value", given.pop("layerscale_value", 1.0))
    return {
        **given,
        "encoder_stride": given["patch_size"],
        "distillation_token": False,
        "drop_path_schedule": "constant",
    }


REFUSED_TYPES = {
    "dinov2_with_registers": "its models have register tokens, which this package's don't; take a dinov2 model",
    "dinov3_vit": "its models rotate positions and have register tokens, which this package's don't",
    "beit": "its models have relative positions, which this package's don't",
    "siglip": "its models classify by attention pooling, and this package's by the class token",
}
"""Families that people take for ViTs, and why they are not read."""

# --------------------------------------------------------------------------------------------------------------- timm

_SIZES = {  # width, blocks, heads, MLP width
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
"""timm's names for the sizes of its ViTs."""

_VIT = re.compile(r"vit_([a-z]+)_patch(\d+)_(?:(\d+)(?:_(?:in21k|miil|miil_in21k|dino|sam))?|(dinov2))")
_FLEXIVIT = re.compile(r"flexivit_([a-z]+)")
_PARTS_REFUSED = {
    "reg": "has register tokens",
    "clip": "normalises the tokens before the blocks",
    "gap": "classifies by the mean of the patches",
    "siglip": "classifies by attention pooling or by the mean of the patches",
    "rpn": "normalises after the residual branches",
    "xp": "computes attention and MLP side by side",
    "18x2": "computes two blocks side by side",
    "radio": "has register tokens and no last norm",
}
"""Parts of the names of timm's ViTs that this package's blocks can't compute, and why."""


def _vit(architecture: str) -> Fields | None:
    """Fields of one of timm's plain ViTs, by its name. None if it is no plain ViT."""
    changes: Fields = {}
    if (found := _FLEXIVIT.fullmatch(architecture)) is not None:
        size, patch, pixels = found.group(1), 16, 240
        changes = {"position_on_class_token": False}
    elif (found := _VIT.fullmatch(architecture)) is not None:
        size, patch, pixels = found.group(1), int(found.group(2)), int(found.group(3) or 518)
        if found.group(4):
            changes = {"layer_scale_init_value": 1e-5, "drop_path_schedule": "constant"}
        if "_miil" in architecture:
            changes = {"qkv_bias": False}
        if found.group(4) and size == "giant":
            raise ValueError(
                f"timm architecture {architecture!r} has a SwiGLU MLP; this package's blocks have a plain MLP. Take "
                "DINOv2's small, base or large model"
            )
    else:
        return None
    if size not in _SIZES:
        return None
    width, depth, heads, hidden = _SIZES[size]
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "layer_norm_eps": 1e-6,
        "image_size": pixels,
        "patch_size": patch,
        "encoder_stride": patch,
        "distillation_token": False,
        **changes,
    }


_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}


def _as_it_is(name: str) -> Callable[[Any], Fields]:
    # timm writes squares as pairs
    return lambda value: {name: value[0] if isinstance(value, list) and len(set(value)) == 1 else value}


_ARGUMENTS: dict[str, Callable[[Any], Fields]] = {
    "img_size": _as_it_is("image_size"),
    "patch_size": lambda value: {**_as_it_is("patch_size")(value), **_as_it_is("encoder_stride")(value)},
    "in_chans": _as_it_is("num_channels"),
    "embed_dim": _as_it_is("hidden_size"),
    "depth": _as_it_is("num_hidden_layers"),
    "num_heads": _as_it_is("num_attention_heads"),
    "init_values": _as_it_is("layer_scale_init_value"),
    "drop_path_rate": _as_it_is("drop_path_rate"),
    "attn_drop_rate": _as_it_is("attention_probs_dropout_prob"),
    "qkv_bias": _as_it_is("qkv_bias"),
    "num_classes": _as_it_is("num_labels"),
    "no_embed_class": lambda value: {"position_on_class_token": not value},
    "act_layer": lambda value: {"hidden_act": _ACTS[value]},
}
"""The arguments of timm's `VisionTransformer` that have a field here."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "class_token": (True,),
    "fc_norm": (None, False),
    "final_norm": (True,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "reg_tokens": (0,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "drop_rate": (0,),
    "patch_drop_rate": (0,),
    "pos_drop_rate": (0,),
    "proj_drop_rate": (0,),
    "dynamic_img_size": (True, False),  # which adds sizes of images, and changes no answer at the model's own size
    "dynamic_img_pad": (False,),
}
"""Arguments that have no field here, and the values with which timm computes what this package does."""


def from_timm(values: Mapping[str, Any], published: Mapping[str, Fields]) -> Fields:
    """Fields for timm's `config.json`, which names an architecture; `model_args` holds the changes to it.

    `published` are the fields of the DeiT family, by its names.
    """
    architecture = str(values["architecture"]).split(".")[0]
    base = published.get(architecture.replace("_", "-")) or _vit(architecture)
    if base is None:
        why = [reason for part, reason in _PARTS_REFUSED.items() if re.search(rf"_{part}\d*_", architecture + "_")]
        raise ValueError(
            f"timm architecture {values['architecture']!r} is not one of this family"
            + (f" (it {' and '.join(why)})" if why else "")
            + f"; known are {', '.join(name.replace('-', '_') for name in published)}, vit_SIZE_patchP_PIXELS with a "
            f"SIZE among {', '.join(_SIZES)}, vit_SIZE_patch14_dinov2 and flexivit_SIZE"
        )
    arguments = dict(values.get("model_args") or {})
    ratio = arguments.pop("mlp_ratio", None)
    pools = {arguments.pop("global_pool", "token"), values.get("global_pool", "token")} - {"token"}
    if pools:
        raise ValueError(f"timm's global_pool is {_listed(sorted(pools))}; this package classifies by the class token")
    fields: Fields = {**base, "num_labels": values.get("num_classes", 1000)}
    for name, value in arguments.items():
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise ValueError(
                    f"timm's model_args set {name}={value!r}; this package computes only {name}={_ONLY[name][0]!r}"
                )
            continue
        if name not in _ARGUMENTS:
            raise ValueError(
                f"timm's model_args hold {name!r}, which this package cannot honour; "
                f"it knows {', '.join(sorted((*_ARGUMENTS, 'mlp_ratio')))}"
            )
        if name == "act_layer" and value not in _ACTS:
            raise ValueError(f"timm's act_layer is {value!r}; this package computes {', '.join(_ACTS)}")
        fields |= _ARGUMENTS[name](value)
    if ratio is not None or fields["hidden_size"] != base["hidden_size"]:
        usual = base["intermediate_size"] / base["hidden_size"]
        fields["intermediate_size"] = int(fields["hidden_size"] * (ratio or usual))
    cfg = values.get("pretrained_cfg") or {}
    if isinstance(labels := values.get("label_names") or cfg.get("label_names"), list):
        fields["id2label"] = dict(enumerate(labels))
    return {**fields, **({"pretrained_cfg": cfg} if cfg else {})}


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
