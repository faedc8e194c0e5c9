"""captum's attributions and the class activation maps of `grad-cam`, against the same on `transformers`."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import pair
from support.models import images, small
from torch import nn

NAME = "DeiTForImageClassificationWithTeacher"


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.fixture(params=[False, True], ids=["evaluation", "training"])
def models(request):
    """Both with the layers that are explained: in the last block, after it, in the middle, and the patches'."""
    ours, theirs = (model.train(request.param) for model in pair(NAME, small()))
    mine, yours = ours.deit, theirs.deit
    return (
        (Logits(ours), [mine.blocks[-1].norm1, mine.norm, mine.blocks[1].attention.out, mine.patch]),
        (
            Logits(theirs),
            [
                yours.layers[-1].layernorm_before,
                yours.layernorm,
                yours.layers[1].attention.o_proj,
                yours.embeddings.patch_embeddings.projection,
            ],
        ),
    )


X, TARGETS = images(small()), torch.tensor([1, 3])


def test_integrated_gradients(models):
    attr = pytest.importorskip("captum.attr")
    found, expected = (attr.IntegratedGradients(model).attribute(X, target=TARGETS, n_steps=8) for model, _ in models)
    assert_close(found, expected)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("method", ["Saliency", "InputXGradient", "Occlusion"])
def test_other_attributions_of_pixels(models, method):
    attr = pytest.importorskip("captum.attr")
    pixels = X.clone().requires_grad_()
    options = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4)} if method == "Occlusion" else {}
    found, expected = (getattr(attr, method)(model).attribute(pixels, target=TARGETS, **options) for model, _ in models)
    assert_close(found, expected)


@pytest.mark.parametrize("method", ["LayerGradCam", "LayerActivation", "LayerGradientXActivation"])
def test_attributions_of_layers(models, method):
    attr = pytest.importorskip("captum.attr")
    for i in range(4):
        options = {} if method == "LayerActivation" else {"target": TARGETS}
        found, expected = (getattr(attr, method)(model, layers[i]).attribute(X, **options) for model, layers in models)
        assert_close(found, expected)
    assert expected.abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM", "EigenCAM"])
def test_class_activation_maps(models, method):
    cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def patches(tokens):
        return tokens[:, 2:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)

    maps = []
    for model, layers in models:
        with getattr(cam, method)(model=model, target_layers=layers[:1], reshape_transform=patches) as explain:
            maps.append(explain(input_tensor=X.clone(), targets=[ClassifierOutputTarget(int(t)) for t in TARGETS]))
    assert maps[0].shape == (2, 16, 16)
    assert maps[1].max() > 0.1
    assert_close(maps[0], maps[1], 1e-4)
