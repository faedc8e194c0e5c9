"""Runs whose views are made on the device that trains, beside runs whose loader processes make them."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.models import small
from support.runs import photos, small_recipe

from deit.data.batches import TrainingBatches
from deit.data.folders import read_data
from deit.recipe import SGD, Augment, Compute, Cosine, Data, Erase, Mix, RandAugment, ResizedCrop, steps
from deit.train import checkpoint
from deit.train.loop import train

AUGMENT = Augment(
    crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0)
)
RECIPE = small_recipe(
    model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3),
    data=Data(batch=8, repeats=2),
    optim=SGD(lr=0.02, per_images=8),
    schedule=Cosine(total=steps(12)),
    evaluate=steps(1),
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return read_data(photos(photos(tmp_path_factory.mktemp("photos")), split="val", count=3), holdout=0.1, seed=0)


def recipe(on, **compute):
    return replace(
        RECIPE,
        augment=replace(AUGMENT, on=on),
        compute=Compute(**{"precision": "float32", "workers": 0, **compute}),
    )


def end(given, splits, out):
    """The weights of a whole run, and its losses."""
    train(given, *splits, out, device="cpu", console=Console(quiet=True))
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(checkpoint.saved(out / "checkpoints")[-1]), losses


def test_a_run_learns_from_the_same_views(splits, tmp_path):
    """The first batch differs by a few roundings, and so does what is learnt from twelve."""
    (here, ours), (there, theirs) = (end(recipe(on), splits, tmp_path / on) for on in ("device", "loader"))
    first = [next(TrainingBatches(splits[0], recipe(on)).from_step(0)).pixels for on in ("device", "loader")]
    differences = (first[0] - first[1]).abs()
    assert differences.max() < 20 / 255 / 0.2
    assert (differences > 0).double().mean() < 1e-3
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours == pytest.approx(theirs, abs=1e-3)
    for name, value in there.items():
        if name.startswith("model."):
            torch.testing.assert_close(here[name], value, atol=1e-3, rtol=0, msg=name)


def test_loaders_change_nothing(splits, tmp_path):
    found = [end(recipe("device", workers=workers), splits, tmp_path / str(workers)) for workers in (0, 1, 2)]
    for tensors, losses in found[1:]:
        assert losses == found[0][1]
        assert all(torch.equal(tensors[name], value) for name, value in found[0][0].items())


def test_micro_batches_change_nothing_but_rounding(splits, tmp_path):
    (one, _), (other, _) = (end(recipe("device", accumulate=parts), splits, tmp_path / str(parts)) for parts in (1, 3))
    for name, value in one.items():
        if name.startswith("model."):
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0, msg=name)
