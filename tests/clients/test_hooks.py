"""Hooks that people put on modules see what they see in `transformers`, and `DataParallel` passes a model through."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import pair
from support.models import images, small

NAME = "DeiTForImageClassificationWithTeacher"
MODULES = {
    "blocks.2": "layers.2",
    "blocks.2.norm1": "layers.2.layernorm_before",
    "blocks.2.norm2": "layers.2.layernorm_after",
    "blocks.2.mlp": "layers.2.mlp",
    "blocks.2.mlp.fc1": "layers.2.mlp.fc1",
    "blocks.0.mlp.fc2": "layers.0.mlp.fc2",
    "norm": "layernorm",
}


def seen(model, name, x):
    """What a module returns, and the gradient that arrives there."""
    kept = []
    hook = model.deit.get_submodule(name).register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out) or kept[0].retain_grad()
    )
    model(x).logits.square().sum().backward()
    hook.remove()
    return kept[0].detach(), kept[0].grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("ours_at", "theirs_at"), MODULES.items())
def test_all_tokens_reach_a_hook(ours_at, theirs_at, training):
    """Without hooks, the last block computes only the tokens that the heads read."""
    ours, theirs = pair(NAME, small())
    x = images(ours.config)
    assert_close(seen(ours.train(training), ours_at, x), seen(theirs.train(training), theirs_at, x))


def test_a_backward_hook_alone():
    ours, theirs = pair(NAME, small())
    x, kept = images(ours.config), []
    for model, name in ((ours, "blocks.2"), (theirs, "layers.2")):
        model.deit.get_submodule(name).register_full_backward_hook(lambda _, __, out: kept.append(out[0]))
        model(x.clone().requires_grad_()).logits.square().sum().backward()
    assert kept[0].shape == (2, 18, 24)
    assert_close(kept[0], kept[1])


def test_data_parallel():
    ours, theirs = pair(NAME, small())
    x = images(ours.config)
    for training in (True, False):
        found = torch.nn.DataParallel(ours.train(training))(x)
        assert_close(found.logits, torch.nn.DataParallel(theirs.train(training))(x).logits)
        assert_close(found.cls_logits, ours(x).cls_logits)
