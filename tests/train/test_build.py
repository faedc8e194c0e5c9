"""From a recipe to its model: fresh, or with another run's weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import build, small
from support.runs import small_recipe

from deit.config import ConvNetConfig
from deit.files import CheckpointError
from deit.model.convnet import ConvNet
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
)
from deit.recipe import Distilled, MaskedImage, Recipe, Supervised, override
from deit.train.build import build_model, find_sources
from deit.weights.hub import write_tensors
from deit.weights.names import resize_matrix

CLASSES = ("a", "b", "c", "d", "e")


def recipe_for(objective, *, start="", **changes):
    token = not isinstance(objective, Supervised | MaskedImage) and objective.token == "distillation"
    return small_recipe(objective, model=small(**{"distillation_token": token, **changes}), start=start)


def saved(folder, kind="classification", classes=CLASSES, **changes):
    model = build(
        kind,
        small(distillation_token=kind == "with_teacher", num_labels=None, id2label=dict(enumerate(classes)), **changes),
        seed=3,
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Supervised(), DeiTForImageClassification),
        (Distilled(teacher="t"), DeiTForImageClassificationWithTeacher),
        (Distilled(teacher="t", token="class"), DeiTForImageClassification),
        (MaskedImage(unit=8), DeiTForMaskedImageModeling),
    ],
)
def test_the_class_follows_the_objective(objective, expected):
    model = build_model(recipe_for(objective), CLASSES)
    assert type(model) is expected
    assert list(model.config.id2label.values()) == list(CLASSES)


def test_fresh_values_depend_on_the_seed_alone():
    recipe = recipe_for(Supervised())
    torch.manual_seed(99)
    one, other = build_model(recipe, CLASSES), build_model(recipe, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(build_model(replace(recipe, seed=1), CLASSES).deit.position, one.deit.position)


def test_the_convnet():
    recipe = replace(recipe_for(Supervised()), model=ConvNetConfig(widths=(4, 8), depth=1))
    model = build_model(recipe, CLASSES)
    assert isinstance(model, ConvNet)
    assert model.classifier.out_features == 5


def state(model):
    return dict(model.state_dict())


def test_a_start_with_the_same_labels_is_taken_whole(tmp_path):
    """Of a checkpoint saved at 16 pixels and trained on at 16: every tensor."""
    before = saved(tmp_path)
    after = state(build_model(recipe_for(Supervised(), start=str(tmp_path), drop_path_rate=0.2), CLASSES))
    for name, value in state(before).items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("classes", [CLASSES[:3], tuple(reversed(CLASSES)), ("v", "w", "x", "y", "z")])
def test_a_start_with_other_labels_gets_a_fresh_head(tmp_path, classes):
    before = state(saved(tmp_path))
    recipe = recipe_for(Supervised(), start=str(tmp_path))
    after, fresh = state(build_model(recipe, classes)), state(build_model(replace(recipe, start=""), classes))
    for name in after:
        expected = fresh if name.startswith("classifier.") else before
        assert torch.equal(after[name], expected[name]), name


def test_positions_are_resized_as_the_model_resizes_them(tmp_path):
    """16 to 24x32 pixels: by the same matrices as `resize_to`, and by hand."""
    before = saved(tmp_path, "with_teacher")
    model = build_model(recipe_for(Distilled(teacher="t"), start=str(tmp_path), image_size=(24, 32)), CLASSES)
    expected = before.deit.position.detach().numpy().astype(np.float64)
    grid = np.einsum("rR,sS,RSd->rsd", resize_matrix(4, 6), resize_matrix(4, 8), expected[0, 2:].reshape(4, 4, -1))
    found = model.deit.position.detach().numpy()
    np.testing.assert_allclose(found[0, 2:], grid.reshape(48, -1), atol=1e-6)
    np.testing.assert_array_equal(found[0, :2], expected[0, :2].astype(np.float32))
    torch.testing.assert_close(model.deit.position, before.resize_to((24, 32)).deit.position, atol=1e-6, rtol=0)


def test_larger_patches_of_enlarged_images_embed_as_before(tmp_path):
    """16 pixels in patches of 4, and the same patches enlarged to 8x6."""
    before = saved(tmp_path)
    model = build_model(recipe_for(Supervised(), start=str(tmp_path), image_size=(32, 24), patch_size=(8, 6)), CLASSES)
    assert torch.equal(model.deit.position, before.deit.position), "the grid stays"
    patches = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 4, 4))  # rows and columns of patches, then pixels
    large = np.einsum("hH,wW,bcrsHW->bcrhsw", resize_matrix(4, 8), resize_matrix(4, 6), patches).reshape(2, 3, 32, 24)
    plain = patches.transpose(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)
    found, expected = (
        one.deit.patch(torch.from_numpy(pixels).float()) for one, pixels in ((model, large), (before, plain))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_smaller_patches_are_the_nearest(tmp_path):
    """Of 8 pixels to 4: least squares over all patches, and positions for four times as many."""
    before = saved(tmp_path, patch_size=8)
    model = build_model(recipe_for(Supervised(), start=str(tmp_path)), CLASSES)
    down = np.kron(resize_matrix(8, 4), resize_matrix(8, 4))  # (16, 64)
    old = before.deit.patch.weight.detach().double().numpy().reshape(24, 3, 64)
    expected = np.stack([np.linalg.lstsq(down.T, kernel.T, rcond=None)[0].T for kernel in old])  # (24, 3, 16)
    np.testing.assert_allclose(model.deit.patch.weight.detach().numpy().reshape(24, 3, 16), expected, atol=1e-6)
    assert model.deit.position.shape == (1, 17, 24)
    assert torch.equal(model.deit.patch.bias, before.deit.patch.bias)


def test_a_distillation_token_is_added_and_left_out(tmp_path):
    plain = saved(tmp_path / "plain")
    recipe = recipe_for(Distilled(teacher="t"), start=str(tmp_path / "plain"))
    added, fresh = build_model(recipe, CLASSES), build_model(replace(recipe, start=""), CLASSES)
    assert torch.equal(added.deit.position[:, 0], plain.deit.position[:, 0])
    assert torch.equal(added.deit.position[:, 2:], plain.deit.position[:, 1:])
    for name in ("deit.distillation_token", "cls_classifier.weight", "distillation_classifier.weight"):
        assert torch.equal(state(added)[name], state(fresh)[name]), name
    assert torch.equal(added.deit.position[:, 1], fresh.deit.position[:, 1])
    assert torch.equal(added.deit.blocks[1].mlp.fc1.weight, plain.deit.blocks[1].mlp.fc1.weight)

    distilled = saved(tmp_path / "distilled", "with_teacher")
    model = build_model(recipe_for(Supervised(), start=str(tmp_path / "distilled")), CLASSES)
    assert model.deit.distillation_token is None
    assert torch.equal(model.deit.position, distilled.deit.position[:, [0, *range(2, 18)]])


def test_pretrained_on_masked_images(tmp_path):
    before = saved(tmp_path, "masked_image")
    model = build_model(recipe_for(Supervised(), start=str(tmp_path)), CLASSES)
    assert torch.equal(model.deit.patch.weight, before.deit.patch.weight)
    again = build_model(recipe_for(MaskedImage(unit=8), start=str(tmp_path)), CLASSES)
    assert torch.equal(again.decoder.weight, before.decoder.weight)
    assert torch.equal(again.deit.mask_token, before.deit.mask_token)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 48}, "hidden_size=24, the recipe's model has 48"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=3, the recipe's model has 2"),
        ({"layer_scale_init_value": 1e-4}, "layer_scale_init_value=None"),
        ({"position_on_class_token": False}, "position_on_class_token=True"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, found):
    saved(tmp_path)
    with raises_saying(ValueError, found, "choose another start"):
        build_model(recipe_for(Supervised(), start=str(tmp_path), **changes), CLASSES)


def test_an_incomplete_start_is_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.encoder.layer.1.output.dense.bias"]
    write_tensors(tmp_path, tensors)
    with raises_saying(CheckpointError, "lacks deit.blocks.1.mlp.fc2.bias"):
        build_model(recipe_for(Supervised(), start=str(tmp_path)), CLASSES)


def test_no_start_is_written_in_one_way():
    """None, none on the command line, null in a recipe.json and nothing: random weights."""
    started = replace(recipe_for(Supervised()), start="somewhere")
    alone = replace(started, start=None)
    assert alone == recipe_for(Supervised())
    assert alone.to_dict()["start"] == ""
    for setting in ("start=none", "start=None", "start=''"):
        assert override(started, [setting]).to_dict() == alone.to_dict()
    assert Recipe.from_dict({**started.to_dict(), "start": None}).to_dict() == alone.to_dict()
    fresh, again = build_model(alone, CLASSES), build_model(recipe_for(Supervised()), CLASSES)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), again.parameters(), strict=True))


def test_a_start_that_is_not_there_names_the_setting(tmp_path):
    recipe = recipe_for(Supervised(), start=str(tmp_path / "gone"))
    for call in (find_sources, lambda recipe: build_model(recipe, CLASSES)):
        with raises_saying(
            FileNotFoundError,
            f"the recipe starts from {tmp_path / 'gone'}: {tmp_path / 'gone'} does not exist",
            "--set start=FOLDER, or train from scratch with --set start=none",
        ):
            call(recipe)
    saved(tmp_path / "gone")
    find_sources(recipe)


def test_labels_of_a_start_are_the_same_however_an_accent_is_written(tmp_path):
    model = saved(tmp_path, classes=("cafe\u0301", "dog"))
    built = build_model(recipe_for(Supervised(), start=str(tmp_path)), ("caf\u00e9", "dog"))
    assert torch.equal(built.classifier.weight, model.classifier.weight)
