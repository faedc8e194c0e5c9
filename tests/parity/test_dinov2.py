"""DINOv2's files, by value: those of `transformers`, of timm (test_timm_vit.py) and of facebookresearch/dinov2."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.checks import assert_close, raises_saying
from support.models import scramble
from support.pictures import noise, smooth, worst
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from deit.config import DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.model.network import DeiTForImageClassification, DeiTModel, ViTModel

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 70, "num_labels": 5}
VARIATIONS = [
    {},
    {"mlp_ratio": 2, "hidden_act": "gelu_new"},
    {"qkv_bias": False, "layer_norm_eps": 1e-3, "patch_size": 10},
    {"use_mask_token": False, "num_channels": 1},
]


def theirs(name="Dinov2Model", **changes):
    config = transformers.Dinov2Config(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = scramble(getattr(transformers, name)(config)).eval()
    for parameter in (p for n, p in model.named_parameters() if "layer_scale" in n):
        parameter.data += 1
    return model


def pixels(config, *size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, config.num_channels, *(size or (config.image_size, config.image_size)), generator=generator)


@torch.no_grad()
def agree(ours, model, *size):
    x = pixels(model.config, *size)
    options = {"interpolate_pos_encoding": True} if size else {}
    found, expected = ours(x, output_hidden_states=True, **options), model(x, output_hidden_states=True)
    assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert_close(found.hidden_states, expected.hidden_states)
    assert expected.last_hidden_state.abs().max() > 0.1


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
def test_values(changes, tmp_path):
    model = theirs(**changes)
    model.save_pretrained(tmp_path)
    ours, info = DeiTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (ours.mask_token is not None) == changes.get("use_mask_token", True)
    agree(ours, model)
    agree(load_model(tmp_path), model)
    agree(ViTModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("size", [(42, 42), (98, 98), (70, 42), (84, 98)])
def test_images_of_another_size(size, tmp_path):
    """The published models are made for 518 pixels and mostly used at 224. Both resize the positions alike."""
    model = theirs()
    model.save_pretrained(tmp_path)
    agree(DeiTModel.from_pretrained(tmp_path), model, *size)
    with torch.no_grad():
        resized = DeiTModel.from_pretrained(tmp_path, image_size=size)
        x = pixels(model.config, *size)
        assert_close(resized(x).last_hidden_state, model(x).last_hidden_state)
    with raises_saying(
        ValueError, f"images are {size[0]}x{size[1]}, this model takes 70x70", "interpolate_pos_encoding"
    ):
        DeiTModel.from_pretrained(tmp_path)(x)


def test_hidden_patches(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    ours, x = DeiTModel.from_pretrained(tmp_path), pixels(model.config)
    mask = torch.rand(2, 25, generator=torch.Generator().manual_seed(2)) < 0.5
    with torch.no_grad():
        assert_close(ours(x, bool_masked_pos=mask).last_hidden_state, model(x, bool_masked_pos=mask).last_hidden_state)


def test_names_in_memory(tmp_path):
    model = theirs()
    config = DeiTConfig.from_dict(model.config.to_dict())
    agree(DeiTModel.from_pretrained(None, config=config, state_dict=model.state_dict()), model)
    classifier = theirs("Dinov2ForImageClassification")
    ours = DeiTModel.from_pretrained(None, config=config, state_dict=classifier.state_dict())
    agree(ours, classifier.dinov2)


def test_stochastic_depth_is_the_same_in_all_blocks(tmp_path):
    theirs(drop_path_rate=0.3).save_pretrained(tmp_path)
    assert DeiTConfig.from_pretrained(tmp_path).drop_path_rates == [0.3, 0.3, 0.3]


def test_defaults():
    """A config.json may leave out what is transformers' default."""
    config, default = DeiTConfig.from_dict({"model_type": "dinov2"}), transformers.Dinov2Config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "qkv_bias"):
        assert getattr(config, name) == getattr(default, name), name
    assert config.layer_norm_eps == default.layer_norm_eps
    assert config.layer_scale_init_value == default.layerscale_value
    assert config.intermediate_size == default.hidden_size * default.mlp_ratio


def test_what_is_saved_reads_back(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    DeiTModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "deit3"
    agree(DeiTModel.from_pretrained(tmp_path / "ours"), model)


def test_its_classifier_is_refused(tmp_path):
    """It reads the class token and the mean of the patches. A fresh head starts from zero bias, not from theirs."""
    model = theirs("Dinov2ForImageClassification")
    model.save_pretrained(tmp_path)
    parts = ("reads the class token and the mean of the patches (48 inputs)", "the class token alone (24)", "DeiTModel")
    for load in (DeiTForImageClassification.from_pretrained, load_model):
        with raises_saying(ValueError, str(tmp_path), *parts, "ignore_mismatched_sizes=True to train a fresh"):
            load(tmp_path)
    agree(DeiTModel.from_pretrained(tmp_path), model.dinov2)
    with pytest.warns(UserWarning, match=r"does not give classifier\.weight, classifier\.bias: initialised anew"):
        ours = DeiTForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    agree(ours.deit, model.dinov2)
    assert not ours.classifier.bias.any()
    assert ours.classifier.weight.shape == (5, 24)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is true; this package's blocks have a plain MLP"),
        ("Dinov2WithRegisters", {}, "model_type is 'dinov2_with_registers'; its models have register tokens"),
    ],
)
def test_refused_configs_and_tensors(name, changes, said, tmp_path):
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    with raises_saying(ValueError, str(tmp_path), said):
        DeiTModel.from_pretrained(tmp_path)
    plain = DeiTConfig.from_dict(transformers.Dinov2Config(**SIZES).to_dict())
    with raises_saying(
        ValueError, "no rule for tensor", "register tokens" if "Reg" in name else "a plain MLP, no SwiGLU"
    ):
        DeiTModel.from_pretrained(tmp_path, config=plain)


def test_the_original_file(tmp_path):
    """facebookresearch/dinov2 uses timm's names, and has a mask token of shape (1, D)."""
    timm = pytest.importorskip("timm")
    model = scramble(timm.create_model("vit_small_patch14_dinov2", depth=12, img_size=70)).eval()
    mask = torch.full((1, 384), 0.5)
    torch.save({**model.state_dict(), "mask_token": mask}, tmp_path / "dinov2_vits14_pretrain.pth")
    ours = DeiTModel.from_pretrained(tmp_path / "dinov2_vits14_pretrain.pth")
    assert (ours.config.num_attention_heads, ours.config.image_hw, ours.config.layer_norm_eps) == (6, (70, 70), 1e-6)
    assert_close(ours.mask_token, mask[None], 0)
    x = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(ours(x).last_hidden_state, model.forward_features(x))


def test_an_incomplete_file(tmp_path):
    theirs().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.layer_scale1.lambda1"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with raises_saying(ValueError, "lacks deit.blocks.1.scale1, which this model's config asks for"):
        DeiTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ],
    ids=["defaults", "published"],
)
def test_its_preprocessing(options, tmp_path):
    """The processor of the published models is transformers' BitImageProcessor."""
    processor = BitImageProcessorPil(**options)
    processor.save_pretrained(tmp_path)
    images = [smooth(180, 301), Image.fromarray(noise(300, 260))]
    for file in (processor.to_dict(), {"image_processor_type": "BitImageProcessor", **options}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
        ours = DeiTImageProcessor.from_pretrained(tmp_path)(images).pixel_values
        for one, other in zip(ours, processor(images).pixel_values, strict=True):
            assert worst(one, other) <= 1e-5
