"""Locality guidance: a student's patch tokens learn the feature maps of a convnet."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from support.checks import assert_close, raises_saying
from support.models import saved, small
from support.runs import assert_same_end, photos, small_recipe, stopped_at

from deit import Predictor, load_model
from deit.config import ConvNetConfig, TimmConfig
from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.data.folders import read_data
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import Augment, Compute, Cosine, Data, Distilled, Mix, ResizedCrop, steps
from deit.train import guidance, objectives
from deit.train.build import build_model
from deit.train.labels import LabelCache, teach
from deit.train.loop import train
from deit.train.teacher import Teacher

timm = pytest.importorskip("timm")
CLASSES = ("a", "b", "c")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return read_data(photos(photos(root), split="val", count=3), holdout=0.1, seed=0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of convnets that know the classes, with running statistics that differ from those of a fresh one."""
    root, labels = tmp_path_factory.mktemp("teachers"), dict(enumerate(CLASSES))
    torch.manual_seed(3)
    resnet = TimmClassifier(TimmConfig(architecture="test_resnet", image_size=32, id2label=labels))
    own = ConvNet(ConvNetConfig(widths=(4, 8, 12, 16), depth=1, image_size=32, id2label=labels))
    folders = {}
    for name, model in {"timm": resnet, "convnet": own}.items():
        for _ in range(3):
            model.train()(torch.randn(8, 3, 32, 32))
        folders[name] = str(saved(model.eval(), root / name, DeiTImageProcessor.paper(32)))
    return folders


def recipe_of(teacher, **objective):
    return small_recipe(
        Distilled(teacher=teacher, **{"guidance": 2.0, "kind": "soft"} | objective),
        model=small(image_size=32, patch_size=8, encoder_stride=8, num_labels=None),
        data=Data(batch=8),
        augment=Augment(crop=ResizedCrop(), flip=0.5, mix=Mix(mixup=0.8, cutmix=1.0)),
        schedule=Cosine(total=steps(6)),
        evaluate=steps(2),
        ema=0.9,
    )


def loaded(recipe, split):
    teacher = Teacher.load(recipe.objective.teacher, CLASSES, recipe)
    teacher.read_maps(recipe, split, torch.device("cpu"))
    return teacher


def outputs_of(model, pixels):
    """What the modules of the last three stages give, by hooks."""
    inner = model.model if isinstance(model, TimmClassifier) else model
    if isinstance(inner, ConvNet):
        parts = [part for part in inner.features if isinstance(part, torch.nn.ReLU)][-3:]
    else:
        parts = [inner.layer2, inner.layer3, inner.layer4]
    seen = []
    hooks = [part.register_forward_hook(lambda *given: seen.append(given[2].detach().clone())) for part in parts]
    with torch.no_grad():
        logits = inner(pixels)
    for hook in hooks:
        hook.remove()
    return getattr(logits, "logits", logits), seen


@pytest.mark.parametrize("kind", ["timm", "convnet"])
def test_maps_are_those_of_the_last_stages_at_the_patches(kind, teachers, splits):
    recipe = recipe_of(teachers[kind])
    teacher = loaded(recipe, splits[0])
    looked_at = torch.cat([batch.pixels for batch in EvaluationBatches(splits[0], processor_for(recipe), 8)])
    pixels = looked_at[:20:4] + 0.1 * torch.randn(5, 3, 32, 32)
    model = load_model(teachers[kind]).eval()

    def at_patches(given):
        rows = []
        for each in outputs_of(model, given)[1]:
            side = each.shape[-1]
            if side >= 4:
                each = each.unflatten(2, (4, side // 4)).unflatten(4, (4, side // 4)).mean((3, 5))
            else:
                each = F.interpolate(each, (4, 4), mode="bilinear")
            rows.append(each.permute(0, 2, 3, 1).flatten(1, 2).double().numpy())
        return rows

    measured = [each.reshape(-1, each.shape[-1]) for each in at_patches(looked_at[: len(splits[0])])]
    kept = teacher.kept(pixels, recipe.objective)
    assert_close(kept["log_probability"].exp(), outputs_of(model, pixels)[0].softmax(1), 1e-5)
    for level, (each, seen) in enumerate(zip(at_patches(pixels), measured, strict=True)):
        standardised = (each - seen.mean(0)) / np.maximum(seen.std(0), 1e-5)
        expected = torch.from_numpy(standardised)
        width = min(expected.shape[-1], 24)
        found = kept[f"map_{level}"]
        assert found.dtype == torch.int8
        assert found.shape == (5, 16, width)
        if expected.shape[-1] > width:
            onto = teacher.maps.onto[level].double()
            assert_close(onto.T @ onto, torch.eye(width, dtype=torch.float64), 1e-5)
            expected = expected @ onto
        inside = expected.abs() < 127 / 16
        assert inside.float().mean() > 0.5
        assert ((found / 16 - expected).abs()[inside] < 0.51 / 16).all()
        assert (found[~inside].abs() == 127).all()


def test_the_loss_is_the_mean_over_the_kept_channels():
    draw = torch.Generator().manual_seed(0)
    predicted = [torch.randn(2, 4, 6, generator=draw) for _ in range(3)]
    kept = {
        f"map_{level}": torch.randint(-127, 128, (2, 4, width), generator=draw).to(torch.int8)
        for level, width in enumerate((6, 3, 1))
    }
    expected = 0.0
    for level, width in enumerate((6, 3, 1)):
        theirs = kept[f"map_{level}"].double().numpy() / 16
        expected += np.square(predicted[level].double().numpy()[..., :width] - theirs).mean() / 3
    assert abs(float(guidance.loss(predicted, kept)) - expected) < 1e-4


@pytest.mark.parametrize("kind", ["timm", "convnet"])
def test_a_step_minimises_all_losses_together(kind, teachers, splits):
    """The logged numbers against each part computed by itself, with hooks for the tokens after blocks 1, 2 and 3."""
    recipe = recipe_of(teachers[kind])
    objective = objectives.build(recipe, splits[0], torch.device("cpu"))
    model = build_model(recipe, CLASSES).train()
    batches = TrainingBatches(splits[0], recipe)
    batch = batches.mix(next(batches.from_step(0)).finished())
    tokens = []
    for block in model.deit.blocks:
        block.register_forward_hook(lambda _, __, out: tokens.append(out[0]))
    found = objective(model, batch, None)
    plain = objectives.build(replace(recipe, objective=replace(recipe.objective, guidance=0.0)), splits[0], "cpu")
    without = plain(model, batch, None)
    kept = loaded(recipe, splits[0]).kept(batch.pixels, recipe.objective)
    predicted = [layer(each[:, 2:]) for layer, each in zip(model.guide, tokens[:3], strict=True)]
    assert_close(found["guidance"], guidance.loss(predicted, kept), 1e-5)
    assert_close(found["loss"], without["loss"] + 2.0 * found["guidance"], 1e-5)
    found["loss"].backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "mask" not in name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{"kind": "hard"}, {"kind": "soft", "top_k": 2}], ids=str)
def test_stored_maps_are_the_teachers_bit_by_bit(precision, settings, teachers, splits, tmp_path):
    recipe = recipe_of(teachers["timm"], **settings)
    recipe = replace(recipe, compute=Compute(precision=precision, workers=0))
    teach(recipe, splits[0], tmp_path, epochs=2, device="cpu", console=QUIET)
    cache, teacher = LabelCache.open(tmp_path, splits[0], recipe), loaded(recipe, splits[0])
    batches = TrainingBatches(splits[0], recipe, cycle=cache.steps)
    for step, batch in enumerate(islice(batches.from_step(0), cache.steps + 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            expected = teacher.kept(batches.mix(batch).pixels, recipe.objective)
        found = cache.kept(step, batch.positions)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name]), name
    unguided = replace(recipe, objective=replace(recipe.objective, guidance=0.0))
    with raises_saying(ValueError, "was taught with other views", "maps"):
        LabelCache.open(tmp_path, splits[0], unguided)


def run(recipe, splits, out, **options):
    return train(recipe, *splits, out, device="cpu", console=QUIET, **options)


def test_a_guided_run_resumes_to_the_bit_and_leaves_an_ordinary_model(teachers, splits, tmp_path):
    recipe = recipe_of(teachers["timm"])
    run(recipe, splits, tmp_path / "whole")
    with stopped_at(3, objectives.DistilledObjective):
        run(recipe, splits, tmp_path / "broken")
    run(recipe, splits, tmp_path / "broken", resume=True)
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    unguided = replace(recipe, objective=replace(recipe.objective, guidance=0.0))
    run(unguided, splits, tmp_path / "plain")
    found, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "plain"))
    assert found.keys() == plain.keys()
    assert len(Predictor(tmp_path / "whole" / "model")([splits[1].files[0]])[0]) == 3
    assert type(load_model(tmp_path / "whole" / "model")).__name__ == "DeiTForImageClassificationWithTeacher"


def test_a_guided_student_learns_the_maps(teachers, splits, tmp_path):
    """The error falls below 1, which is what a student reaches that knows the means alone."""
    recipe = replace(recipe_of(teachers["convnet"], guidance=5.0), schedule=Cosine(total=steps(60)), augment=Augment())
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e-2), evaluate=steps(20))
    run(recipe, splits, tmp_path)
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "guidance" in line]
    errors = [json.loads(line)["guidance"] for line in rows]
    assert errors[-1] < 0.7 * errors[0]


MODULES = """
import torch
from torch import nn

class Net(nn.Module):
    classes, mean, std = ("a", "b", "c"), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))

    def forward(self, x):
        return self.layers(x)

class Another(Net):
    def forward_intermediates(self, x, indices):
        return x, [x] * indices

    def forward_head(self, x):
        return 1 - self(x)
"""


@pytest.mark.parametrize(
    ("name", "said"), [("Net", "gives no 3 feature maps"), ("Another", "gives other logits when it gives feature maps")]
)
def test_teachers_without_maps_are_refused(name, said, splits, tmp_path):
    (tmp_path / "modules.py").write_text(MODULES)
    teacher = f"{tmp_path / 'modules.py'}:{name}"
    with raises_saying(ValueError, f"teacher {teacher} {said}", "set objective.guidance=0"):
        objectives.build(recipe_of(teacher), splits[0], torch.device("cpu"))


@pytest.mark.parametrize(
    ("objective", "parts", "said"),
    [
        ({"guidance": -1.0}, {}, ("guidance must be from 0.0 to 1000.0, found -1.0",)),
        ({"guidance": float("nan")}, {}, ("guidance must be from",)),
        ({"token": "class"}, {}, ("guidance is for a student with a distillation token",)),
        ({}, {"model": small(num_hidden_layers=2)}, ("at least three blocks", "set model.merge=0")),
        ({}, {"model": small(merge=2)}, ("at least three blocks", "set model.merge=0")),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(objective, parts, said):
    with raises_saying(ValueError, *said):
        replace(recipe_of("t", **objective), **parts)
