"""Merging of tokens in both frameworks."""

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.models import images, small
from twins import TWIN_OF, as_arrays, assert_alike, distance, given_for, gradients, needs_tensorflow, twins

import deit
from deit.model import merging
from deit.model_keras import merging as twin_merging


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("backbone", {"merge": 3, "image_size": (20, 12)}),
        ("classification", {"merge": 2, "distillation_token": False, "image_size": (20, 12)}),
        ("with_teacher", {"merge": 100, "image_size": (20, 12)}),
    ],
)
def test_the_twins_merge_alike(kind, changes):
    """The same tokens, the same sizes of attention, the same map of patches; with an odd number of patches too."""
    ours, twin = twins(kind, small(**changes))
    given = given_for(ours.config)
    assert_alike(ours, twin, given)
    options = {"output_attentions": True, "output_hidden_states": True}
    assert_alike(ours, twin, given | options)
    with torch.no_grad():
        expected = ours(**given, **options)
    found = twin(**as_arrays(given), **options)
    assert distance(found.token_of_patch, expected.token_of_patch) == 0
    assert [state.shape[1] for state in found.hidden_states] == [state.shape[1] for state in expected.hidden_states]
    assert expected.hidden_states[-1].shape[1] < expected.hidden_states[0].shape[1]


def test_equal_matches_have_one_order():
    """Keys along four axes, whose products are exact, so that only the order of the numbers decides."""
    keys = torch.eye(4)[torch.randint(0, 4, (3, 1, 15), generator=torch.Generator().manual_seed(0))]  # (B, H, N, K)
    for count in (1, 4, 7):
        expected, found = merging.match(keys, count), twin_merging.match(keys.numpy(), count)
        assert distance(tuple(found), tuple(expected)) == 0
        held = torch.arange(1, 16).expand(3, -1)
        ours, twins_own = (
            module.followed(numbers, one, 1)
            for module, numbers, one in ((merging, held, expected), (twin_merging, held.int().numpy(), found))
        )
        assert distance(twins_own, ours) == 0


def test_gradients_are_alike():
    ours, twin = twins("classification", small(merge=4, image_size=24))
    given = {**given_for(ours.config, 3), "labels": torch.tensor([1, 0, 4])}
    ours.train()(**given).loss.backward()
    found = gradients(twin, **as_arrays(given))
    assert set(found) == set(ours._tensors())
    for name, parameter in ours.named_parameters():
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_masked_images_are_refused():
    with raises_saying(ValueError, "found merge=2 in the config", "set merge=0"):
        TWIN_OF["masked_image"](small(merge=2))


@needs_tensorflow
@pytest.mark.parametrize("format", ["tf_saved_model", "litert"])
def test_exports_merge(tmp_path, format):
    """Each export is held to the model before it is kept."""
    _, twin = twins("with_teacher", small(merge=3))
    path = tmp_path / ("model.tflite" if format == "litert" else "model")
    twin.export(path, format=format)
    assert path.exists()


def test_files_of_either_twin(tmp_path):
    ours, twin = twins("classification", small(merge=2))
    twin.save_pretrained(tmp_path / "twin")
    again = deit.DeiTForImageClassification.from_pretrained(tmp_path / "twin")
    assert again.config.merge == 2
    x = images(ours.config)
    torch.testing.assert_close(again(x).logits, ours(x).logits, rtol=0, atol=1e-6)
