"""Parameters and operations as counting tools see them, against `transformers`."""

import pytest
import torch
from support.hugging_face import pair
from support.models import images, small
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "ViTModel")


@pytest.mark.parametrize("name", NAMES)
def test_torchinfo(name):
    torchinfo = pytest.importorskip("torchinfo")
    config = small(distillation_token=name != "ViTModel")
    found, expected = (torchinfo.summary(model, input_data=[images(config)], verbose=0) for model in pair(name, config))
    for count in ("total_params", "trainable_params", "total_mult_adds", "total_output_bytes", "total_param_bytes"):
        assert getattr(found, count) == getattr(expected, count), count
    assert found.total_params == sum(p.numel() for p in pair(name, config)[0].parameters())


@torch.no_grad()
def test_operations_of_a_backbone():
    """Heads read few tokens of the last block, so a classifier needs fewer operations than in transformers."""
    counts = {}
    for name in ("DeiTModel", "DeiTForImageClassification"):
        ours, theirs = pair(name, small(), **({"add_pooling_layer": False} if name == "DeiTModel" else {}))
        ours.set_attn_implementation("eager")
        for who, model in (("ours", ours), ("theirs", theirs)):
            with FlopCounterMode(display=False) as counter:
                model(images(small()))
            counts[name, who] = counter.get_total_flops()
    assert counts["DeiTModel", "ours"] == counts["DeiTModel", "theirs"]
    assert counts["DeiTForImageClassification", "ours"] < counts["DeiTForImageClassification", "theirs"]
