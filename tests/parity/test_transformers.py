"""Every class against `transformers`, by value: outputs, losses, gradients, and files in both directions."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import CLASSES, config_for, family_of, hf_prefix, inputs_for, pair
from support.models import images, loss_of, scramble, shrink, small

import deit
from deit import weights
from deit.config import VARIANTS

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def gradients(model, **given):
    model.zero_grad()
    out = model(**given)
    (out.loss if "loss" in out else loss_of(out)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(ours, theirs, given, attn="eager") -> None:
    """Outputs, in training and evaluation, under each of our kernels."""
    theirs.set_attn_implementation(attn)
    for training in (False, True):
        with torch.no_grad():
            expected = theirs.train(training)(**given, output_hidden_states=True, output_attentions=attn == "eager")
        expected = {key: value for key, value in expected.items() if key != "attentions" or attn == "eager"}
        assert all(value.abs().max() > 1e-2 for key, value in expected.items() if key == "last_hidden_state")
        for implementation in ("eager", "sdpa", "auto"):
            ours.set_attn_implementation(implementation)
            with torch.no_grad():
                found = ours.train(training)(**given, output_hidden_states=True, output_attentions=attn == "eager")
            assert_close(dict(found.items()), expected)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CLASSES)
def test_values(name, seed):
    config = config_for(name, seed)
    options = {"add_pooling_layer": seed % 3 > 0, "use_mask_token": seed % 2 > 0} if name.endswith("Model") else {}
    ours, theirs = pair(name, config, seed, **options)
    for attn in ("eager", "sdpa"):
        check(ours, theirs, inputs_for(name, config, **options), attn)


@pytest.mark.parametrize("variant", [name for name, v in VARIANTS.items() if v.model_type != "deit3"])
def test_variants(variant):
    config = shrink(VARIANTS[variant])
    name = "DeiTForImageClassificationWithTeacher" if config.distillation_token else "ViTForImageClassification"
    ours, theirs = pair(name, config)
    check(ours, theirs, {"pixel_values": images(config, 1)}, "sdpa")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name, seed):
    config = config_for(name, seed + 100)
    options = {"use_mask_token": seed % 2 > 0} if name.endswith("Model") else {}
    ours, theirs = pair(name, config, seed, **options)
    given = inputs_for(name, config, **options)
    expected = gradients(theirs, **given)
    base = weights.BASE if CLASSES[name] == "backbone" else ""
    for implementation in ("eager", "sdpa"):
        ours.set_attn_implementation(implementation)
        found = {base + key: value for key, value in gradients(ours, **given).items()}
        assert set(found) == {base + key for key, _ in ours.named_parameters()}
        assert_close(weights.from_ours(found, "hf5", prefix=hf_prefix(name)), expected, 1e-4)
    assert max(grad.abs().max() for grad in expected.values()) > 1e-2


@pytest.mark.parametrize("size", [(20, 20), (8, 24), (13, 31), (16, 16)])
@pytest.mark.parametrize("name", ["DeiTModel", "ViTModel", "DeiTForImageClassificationWithTeacher"])
def test_interpolated_positions(name, size):
    config = small(distillation_token=family_of(name) == "DeiT")
    ours, theirs = pair(name, config)
    given = {"pixel_values": images(config, 2, size), "interpolate_pos_encoding": True}
    check(ours, theirs, given, "eager")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CLASSES)
def test_files_of_theirs(name, seed, tmp_path):
    config = config_for(name, seed + 200)
    _, theirs = pair(name, config, seed)
    theirs.save_pretrained(tmp_path, max_shard_size="2KB" if seed else "5GB")
    assert (tmp_path / "model.safetensors").exists() == (seed == 0)
    cls = getattr(deit, name, deit.DeiTForMaskedImageModeling)
    ours, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info == {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": [], "error_msgs": []}
    assert not ours.training
    check(ours, theirs, inputs_for(name, config), "sdpa")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CLASSES)
def test_files_of_ours(name, seed, tmp_path):
    config = config_for(name, seed + 300)
    ours, _ = pair(name, config, seed)
    ours.save_pretrained(tmp_path, max_shard_size="2KB" if seed else "5GB")
    assert (tmp_path / "model.safetensors").exists() == (seed == 0)
    auto = {
        "backbone": "AutoModel",
        "masked_image": "AutoModelForMaskedImageModeling",
        "classification": "AutoModelForImageClassification",
    }.get(CLASSES[name], name)
    theirs, info = getattr(transformers, auto).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert type(theirs).__name__ == name
    assert not any(info.values())
    check(ours, theirs, inputs_for(name, config))
    again = getattr(deit, name, deit.DeiTForMaskedImageModeling).from_pretrained(tmp_path)
    assert again.config.to_dict() == ours.config.replace(extra=again.config.extra).to_dict()
    assert_close(again.state_dict(), ours.state_dict(), 0)


def test_memory_names_of_transformers_5(tmp_path):
    """`torch.save(model.state_dict())` holds version 5's own names, which no folder of theirs does."""
    config = small(layer_norm_eps=1e-6)
    ours, theirs = pair("DeiTForImageClassificationWithTeacher", config)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    loaded = deit.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    assert_close(loaded.state_dict(), ours.state_dict(), 0)


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_of_transformers_4(sharded, tmp_path):
    config = small()
    ours, theirs = pair("DeiTForImageClassification", config)
    named = weights.from_ours(ours._tensors(), "hf")
    theirs.config.save_pretrained(tmp_path)
    if sharded:
        files = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(named)}
        for file in set(files.values()):
            torch.save({name: named[name] for name in named if files[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": files}
        (tmp_path / "pytorch_model.bin.index.json").write_text(transformers.utils.generic.json.dumps(index))
    else:
        torch.save(named, tmp_path / "pytorch_model.bin")
    loaded = deit.DeiTForImageClassification.from_pretrained(tmp_path)
    check(loaded, theirs, inputs_for("DeiTForImageClassification", config))


def test_full_size_tiny():
    config = VARIANTS["deit-tiny-distilled-patch16-224"]
    ours, theirs = pair("DeiTForImageClassificationWithTeacher", config)
    x = images(config, 1)
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x).logits)


def test_outputs_access():
    """Attribute, key, index, slice, order, length and tuples are those of their `ModelOutput`."""
    config = small()
    ours, theirs = pair("DeiTForImageClassificationWithTeacher", config)
    x = images(config)
    with torch.no_grad():
        for extra in ({}, {"output_hidden_states": True, "output_attentions": True}):
            found, expected = ours(x, **extra), theirs(x, **extra)
            assert list(found.keys()) == list(expected.keys())
            assert list(found) == list(expected)
            assert len(found) == len(expected)
            assert_close(found.to_tuple(), expected.to_tuple())
            assert_close(tuple(found.values()), tuple(expected.values()))
            assert_close(found[0], expected[0])
            assert_close(found[1:3], expected[1:3])
            assert_close(ours(x, return_dict=False, **extra), theirs(x, return_dict=False, **extra))
            assert found.hidden_states is (None if not extra else found["hidden_states"])
            assert ("attentions" in found) == ("attentions" in expected) == bool(extra)
    assert found.get("logits") is found.logits
    assert found.get("loss", "none") == "none"
    assert found.loss is None
    with pytest.raises(KeyError, match=r"'loss' is not in this output, which has logits, cls_logits"):
        found["loss"]


def test_defaults_of_config_reach_forward():
    config = small(output_hidden_states=True, output_attentions=True, return_dict=False)
    ours, theirs = pair("DeiTModel", config)
    x = images(config)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


def test_scramble_leaves_nothing_at_its_start():
    """The comparisons above would prove little on tokens and positions that are still zero."""
    _, theirs = pair("DeiTForMaskedImageModeling", small())
    assert all(p.std() > 0.1 for p in scramble(theirs).parameters() if p.numel() > 1)
