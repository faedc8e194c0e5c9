"""timm's plain ViTs and DINOv2s: what timm saves answers as it does in timm, and other ViTs are refused by name."""

import json
import math

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, images, scramble

from deit import weights
from deit.config import DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model

timm = pytest.importorskip("timm")

PLAIN = [
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_384",
    "vit_small_patch32_224",
    "vit_small_patch32_384",
    "vit_small_patch16_224",
    "vit_small_patch16_384",
    "vit_small_patch8_224",
    "vit_base_patch32_224",
    "vit_base_patch32_384",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_base_patch8_224",
    "vit_large_patch32_224",
    "vit_large_patch32_384",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
    "vit_large_patch14_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    "vit_base_patch16_224_miil",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "flexivit_small",
    "flexivit_base",
    "flexivit_large",
]


def small_model(architecture, **changes):
    """Two narrow blocks, as timm's own arguments make them."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7, "img_size": 56, **changes}
    return scramble(timm.create_model(architecture, **sizes)).eval()


def folder_of(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@torch.no_grad()
def agree(ours, theirs):
    x = images(ours.config)
    trace = {}
    assert_close(ours(x, trace=trace).logits, theirs(x))
    assert_close(trace["norm"], theirs.forward_features(x))
    assert theirs(x).abs().max() > 0.1


@pytest.mark.parametrize("architecture", PLAIN)
def test_values(architecture, tmp_path):
    theirs = small_model(architecture, img_size=64 if "patch32" in architecture else 56)
    ours, info = CLASS_OF["classification"].from_pretrained(folder_of(theirs, tmp_path), output_loading_info=True)
    assert not any(info.values())
    agree(ours, theirs)


@pytest.mark.parametrize("architecture", PLAIN)
def test_full_size(architecture):
    """What shapes tell, and what they don't: heads and the norms' epsilon."""
    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    config = DeiTConfig.from_dict({"architecture": architecture, "num_classes": theirs.num_classes})
    shapes = weights.manifest(config, "classification")
    named = weights.from_ours({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "timm")
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        name: tuple(p.shape) for name, p in theirs.named_parameters()
    }
    assert sum(map(math.prod, shapes.values())) == sum(p.numel() for p in theirs.parameters())
    assert theirs.blocks[0].attn.num_heads == config.num_attention_heads
    assert {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)} == {config.layer_norm_eps}
    assert config.image_hw == theirs.patch_embed.img_size


@pytest.mark.parametrize(
    "changes",
    [
        {"no_embed_class": True},
        {"init_values": 0.1},
        {"qkv_bias": False},
        {"mlp_ratio": 3},
        {"in_chans": 1},
        {"img_size": [32, 48]},
        {"patch_size": 8},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "quick_gelu"},
        {"dynamic_img_size": True},
        {"class_token": True, "fc_norm": False, "pre_norm": False, "reg_tokens": 0, "qk_norm": False},
    ],
    ids=str,
)
def test_arguments_that_have_a_field(changes, tmp_path):
    """timm itself writes only what its caller keeps in `model_args`."""
    theirs = small_model("vit_tiny_patch16_224", **{"img_size": 48, **changes})
    folder_of(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48}
    config["model_args"] = {**sizes, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    agree(load_model(tmp_path), theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reg_tokens": 4}, "set reg_tokens=4; this package computes only reg_tokens=0"),
        ({"class_token": False, "global_pool": "avg"}, "global_pool is 'avg'; this package classifies by the class"),
        ({"global_pool": "map"}, "global_pool is 'map'; this package classifies by the class token"),
        ({"fc_norm": True}, "set fc_norm=True; this package computes only fc_norm=None"),
        ({"pre_norm": True}, "set pre_norm=True; this package computes only pre_norm=False"),
        ({"qk_norm": True}, "set qk_norm=True; this package computes only qk_norm=False"),
        ({"drop_rate": 0.1}, "set drop_rate=0.1; this package computes only drop_rate=0"),
        ({"act_layer": "mish"}, "act_layer is 'mish'; this package computes gelu, gelu_tanh"),
        ({"norm_layer": "rmsnorm"}, "hold 'norm_layer', which this package cannot honour; it knows act_layer, "),
    ],
)
def test_refused_arguments(arguments, said):
    with raises_saying(ValueError, "timm's ", said):
        DeiTConfig.from_dict({"architecture": "vit_base_patch16_224", "model_args": arguments})


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("vit_small_patch14_reg4_dinov2", "it has register tokens"),
        ("vit_giant_patch14_dinov2", "has a SwiGLU MLP"),
        ("vit_base_patch16_clip_224", "it normalises the tokens before the blocks"),
        ("vit_medium_patch16_gap_256", "it classifies by the mean of the patches"),
        ("vit_base_patch16_siglip_224", "it classifies by attention pooling"),
        ("vit_base_patch16_rpn_224", "it normalises after the residual branches"),
        ("vit_small_patch16_18x2_224", "it computes two blocks side by side"),
        ("vit_base_patch16_xp_224", "it computes attention and MLP side by side"),
        ("vit_base_patch16_radio_v3", "it has register tokens"),
        ("vit_xsmall_patch16_clip_224", "it normalises the tokens before the blocks"),
        ("eva_large_patch14_196", "is not one of this family"),
        ("convnext_tiny", "is not one of this family"),
    ],
)
def test_refused_architectures(architecture, why):
    assert timm.is_model(architecture)
    with raises_saying(ValueError, f"timm architecture {architecture!r}", why):
        DeiTConfig.from_dict({"architecture": architecture})


def test_no_other_vit_of_timm_is_taken_for_a_plain_one():
    for architecture in timm.list_models(module="vision_transformer"):
        try:
            DeiTConfig.from_dict({"architecture": architecture})
        except ValueError:
            continue
        assert architecture in PLAIN, architecture


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reg_tokens": 2}, "have no register tokens"),
        ({"global_pool": "avg"}, "not by a normalised mean"),
        ({"qk_norm": True}, "doesn't normalise queries and keys"),
        ({"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 4}, "expects (24, 96)"),
    ],
    ids=["registers", "mean", "qk_norm", "swiglu"],
)
def test_tensors_of_other_vits_are_refused(changes, said, tmp_path):
    """A file without config.json, or with one that says nothing of the change."""
    theirs = small_model("vit_tiny_patch16_224", img_size=32, **changes)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = DeiTConfig(**sizes, image_size=32, distillation_token=False, num_labels=7)
    with raises_saying(ValueError, "vit.pth", said):
        CLASS_OF["classification"].from_pretrained(tmp_path / "vit.pth", config=config)


def test_preprocessing_of_the_folder(tmp_path):
    folder_of(small_model("vit_tiny_patch16_224"), tmp_path)
    processor = DeiTImageProcessor.of_model(tmp_path, DeiTConfig.from_pretrained(tmp_path))
    cfg = timm.create_model("vit_tiny_patch16_224").pretrained_cfg
    assert processor.image_mean == tuple(cfg["mean"])
    assert processor.crop_ratio == pytest.approx(cfg["crop_pct"], abs=0.01)
