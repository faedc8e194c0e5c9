"""Faults of other projects that no run here may have."""

import json
import math
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.models import small
from support.objectives import MIXED, QUIET, B, recipe_for
from support.runs import photos

from deit.config import ConvNetConfig
from deit.data import policies
from deit.data.batches import TrainingBatches
from deit.data.folders import read_data
from deit.recipe import SGD, Compute, Cosine, Data, RandAugment, Supervised, steps
from deit.train import checkpoint, loop, objectives, stepping
from deit.train.loop import train


def test_repeated_augmentation_of_few_images_in_one_process(given):
    """facebookresearch/deit: the sampler rounds down to 256 images, so fewer are none, and one process repeats
    nothing. Here 21 images, three views each: in three epochs all of them three times, and none is dropped."""
    batches = TrainingBatches(given[0], recipe_for(Supervised(), data=Data(batch=9, repeats=3)))
    assert batches.steps_per_epoch == 21 / 9
    keys = np.concatenate([batches.keys(step) for step in range(7)])
    assert len(keys) == 63 == 3 * 21
    assert set(Counter(keys[:, 1]).values()) == {3}
    assert len(set(map(tuple, keys[:, 1:]))) == 63
    assert len(set(keys[:21, 1])) == 7  # an epoch is as many views as images: a third of these
    pixels = next(batches.from_step(0)).pixels
    assert keys[0, 1] == keys[1, 1]
    assert not torch.equal(pixels[0], pixels[1])


def run(recipe, splits, out, **options):
    train(recipe, *splits, out, device="cpu", console=QUIET, **options)
    tensors = load_file(checkpoint.saved(out / "checkpoints")[-1])
    return tensors, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_bits(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("layout", ["val", "held_out"])
def test_the_best_model_is_not_chosen_on_the_test_set(tmp_path, layout):
    """facebookresearch/deit: the best checkpoint was that of the test set. Here a folder test full of rubbish, with a
    class and a file that no split may have, changes nothing, to the bit."""
    root = photos(tmp_path / "data", count=5)
    if layout == "val":
        photos(root, split="val", count=2)
    else:
        for folder in list((root / "train").iterdir()):
            shutil.move(folder, root / folder.name)
        (root / "train").rmdir()
    recipe = recipe_for(Supervised(), model=ConvNetConfig(widths=(4,), depth=1, image_size=16), evaluate=steps(2))
    splits = read_data(root, holdout=0.2, seed=0)
    expected = run(recipe, splits, tmp_path / "one")
    (root / "test" / "unknown").mkdir(parents=True)
    (root / "test" / "a").mkdir()
    for place in ("unknown/0.png", "a/0.png", "loose.png"):
        (root / "test" / place).write_bytes(b"rubbish")
    assert read_data(root, holdout=0.2, seed=0) == splits
    assert not any((root / "test") in path.parents for split in splits for path in split.files)
    found = run(recipe, read_data(root, holdout=0.2, seed=0), tmp_path / "other")
    assert same_bits(found[0], expected[0])
    assert [row["val_accuracy"] for row in found[1]] == [row["val_accuracy"] for row in expected[1]]
    assert [row["bad_images"] for row in found[1]] == [0, 0, 0]


def test_everything_random_comes_from_the_recipes_seed(given, tmp_path):
    """facebookresearch/deit: RandAugment drew from generators that nobody seeded. Here no global generator matters."""
    recipe = recipe_for(
        Supervised(),
        model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3, hidden_dropout_prob=0.1),
        augment=replace(MIXED, policy=RandAugment(std=0.5)),
    )
    found = []
    for i, seed in enumerate((0, 0, 1)):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        found.append(run(replace(recipe, seed=seed), given[:2], tmp_path / str(i))[0])
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_the_learning_rate_moves_with_every_update_of_the_first_epochs(given, tmp_path, monkeypatch):
    """facebookresearch/deit: the rate was set by epoch, and after it: epochs 0 and 1 both ran at 1e-6. Here 2.625
    steps are an epoch, two epochs warm up, and a resumed run takes the next rate."""
    used: list[float] = []
    update = stepping.take

    def watched(work, *rest):
        used.extend({group["lr"] for group in work.optimizers.optimizers[0].param_groups})
        return update(work, *rest)

    monkeypatch.setattr(stepping, "take", watched)
    recipe = recipe_for(
        Supervised(),
        optim=SGD(lr=0.5, per_images=B),
        compute=Compute(precision="float32", workers=0, save_minutes=0),
        schedule=Cosine(total=steps(8), warmup=steps(5), floor=0.1),
    )
    run(recipe, given[:2], tmp_path)
    rise = [1e-6 + (0.5 - 1e-6) * step / 5 for step in range(5)]
    fall = [0.1 + 0.4 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert used == pytest.approx(rise + fall)
    whole = used.copy()
    used.clear()
    checkpoint.saved(tmp_path / "checkpoints")[-1].unlink()
    run(recipe, given[:2], tmp_path, resume=True)
    assert used == whole[-len(used) :]
    assert used


def test_the_average_is_what_is_scored_and_it_is_resumed(given, tmp_path, monkeypatch):
    """facebookresearch/deit: the average of the weights was saved and never evaluated, and silently not resumed."""
    scored = []
    judge = objectives.SupervisedObjective.judge

    def watched(self, model, *rest):
        scored.append(model.classifier.weight.detach().clone())
        return judge(self, model, *rest)

    monkeypatch.setattr(objectives.SupervisedObjective, "judge", watched)
    recipe = recipe_for(Supervised(), ema=0.8, evaluate=steps(3))
    tensors, _ = run(recipe, given[:2], tmp_path / "whole")
    assert torch.equal(scored[-1], tensors["ema.classifier.weight"])
    assert not torch.equal(scored[-1], tensors["model.classifier.weight"])

    update = stepping.take

    def disturbed(work, state, *rest):
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(work, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "take", disturbed)
        with pytest.raises(loop.Stopped):
            run(recipe, given[:2], tmp_path / "parts")
    [saved] = checkpoint.saved(tmp_path / "parts" / "checkpoints")
    assert 3 < load_file(saved)["ema.updates"] < 6
    again, _ = run(recipe, given[:2], tmp_path / "parts", resume=True)
    assert again["ema.updates"] == 6
    assert same_bits(again, tensors)


@pytest.mark.parametrize(("bits", "kept"), [(0, 0b0), (1, 0b1000_0000), (4, 0b1111_0000), (8, 0b1111_1111)])
def test_posterize_down_to_no_bits(bits, kept):
    """timm: `rand-m9-mstd0.5-inc1` asks for 0 bits where a strength reaches 10, which Pillow refuses."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, 255 - levels], -1))
    found = np.asarray(policies.OPERATIONS["Posterize"].apply(image, bits, (0, 0, 0)))
    assert np.array_equal(found, np.asarray(image) & kept)
    strongest = policies.OPERATIONS["PosterizeIncreasing"]
    assert int(strongest.argument(10)) == 0
