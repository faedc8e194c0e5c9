"""Every shipped recipe runs, and each kind of run learns as it did when its curve was recorded."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.models import saved, shrink
from support.runs import photos

from deit.config import ConvNetConfig, DeiTConfig, TimmConfig
from deit.data.batches import processor_for
from deit.data.folders import read_data
from deit.model.convnet import ConvNet
from deit.predict.predictor import Predictor
from deit.recipe import (
    LAMB,
    SGD,
    AdamW,
    Affine,
    Augment,
    AutoAugment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Erase,
    Jitter,
    LinearProbe,
    MaskedImage,
    Mix,
    Muon,
    RandAugment,
    Recipe,
    ResizedCrop,
    SimpleCrop,
    Supervised,
    ThreeAugment,
    steps,
)
from deit.recipes import shipped
from deit.train.build import build_model
from deit.train.loop import train

GOLDEN = Path(__file__).parents[1] / "golden" / "curves.json"
QUIET = Console(quiet=True)
FLOAT = Compute(precision="float32", workers=0)
SMALL = DeiTConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=96,
    image_size=16,
    patch_size=4,
    encoder_stride=4,
    layer_norm_eps=1e-6,
    drop_path_rate=0.1,
    distillation_token=False,
    initializer_range=0.06,
)
TOKEN = SMALL.replace(distillation_token=True)
TEACHER = Recipe(
    name="teacher",
    model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
    data=Data(batch=16),
    objective=Supervised(),
    optim=SGD(lr=0.05, per_images=16),
    schedule=Cosine(total=steps(20)),
    augment=Augment(crop=SimpleCrop(), flip=0.5, jitter=Jitter(brightness=0.2)),
    compute=FLOAT,
    evaluate=steps(1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return photos(photos(root, size=72), split="val", count=3, size=72)


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    return train(
        TEACHER,
        *read_data(folder, holdout=0.1, seed=0),
        tmp_path_factory.mktemp("teacher") / "run",
        device="cpu",
        console=QUIET,
    ).model


def kinds(teacher: object) -> dict[str, Recipe]:
    """One recipe for each kind of run; together they use every part that a recipe can have."""
    adamw = AdamW(lr=2e-3, per_images=16, clip=1.0)

    def recipe(name, **parts):
        given = {
            "model": SMALL,
            "data": Data(batch=16),
            "optim": adamw,
            "evaluate": steps(1),
            "compute": FLOAT,
            "schedule": Cosine(total=steps(20), warmup=steps(3)),
            **parts,
        }
        return Recipe(name=name, **given)

    paper = Augment(
        crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0)
    )
    found = [
        TEACHER,
        recipe(
            "supervised", objective=Supervised(smoothing=0.1), augment=paper, ema=0.9, data=Data(batch=16, repeats=3)
        ),
        recipe(
            "deit3",
            objective=Supervised(loss="binary"),
            optim=LAMB(lr=5e-3, per_images=16),
            model=SMALL.replace(
                layer_scale_init_value=0.1, position_on_class_token=False, drop_path_schedule="constant"
            ),
            augment=Augment(
                crop=SimpleCrop(),
                flip=0.5,
                policy=ThreeAugment(),
                jitter=Jitter(brightness=0.3, contrast=0.3, saturation=0.3),
                mix=Mix(mixup=0.8, cutmix=1.0, mode="pair"),
            ),
        ),
        recipe("cosub", objective=Supervised(loss="binary", cosub=True)),
        recipe("hard", model=TOKEN, objective=Distilled(teacher=str(teacher), smoothing=0.1), augment=paper),
        recipe(
            "soft",
            model=TOKEN,
            objective=Distilled(teacher=str(teacher), kind="soft", weight=0.5),
            augment=replace(paper, mix=Mix(cutmix=1.0, mode="element")),
        ),
        recipe(
            "soft_as_original",
            model=TOKEN,
            objective=Distilled(teacher=str(teacher), kind="soft", normalisation="elements", top_k=2),
        ),
        recipe("class_token", objective=Distilled(teacher=str(teacher), token="class")),
        recipe("masked", objective=MaskedImage(unit=8), augment=Augment(crop=ResizedCrop(scale=(0.67, 1.0)), flip=0.5)),
        recipe(
            "muon",
            objective=Supervised(),
            optim=Muon(lr=2e-3, others_lr=2e-3, per_images=16),
            augment=Augment(affine=Affine(rotate=10)),
        ),
        recipe(
            "layer_decay",
            objective=Supervised(),
            optim=AdamW(lr=4e-3, per_images=16, layer_decay=0.7),
            augment=Augment(policy=AutoAugment(std=0.5)),
            compute=replace(FLOAT, accumulate=3, checkpoint_blocks=True),
        ),
    ]
    return {recipe.name: recipe for recipe in found}


def curve(recipe, folder, out):
    """The loss of each step."""
    labelled = not isinstance(recipe.objective, MaskedImage)
    run = train(recipe, *read_data(folder, holdout=0.1, seed=0, labelled=labelled), out, device="cpu", console=QUIET)
    return run, [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", kinds(""))
def test_the_curve_is_as_recorded(name, folder, teacher, tmp_path):
    """After a deliberate change, `PYTHONPATH=tests python tests/train/test_runs.py` writes the file anew. Other
    processors round differently, which twenty steps amplify: hence the tolerance."""
    run, losses = curve(kinds(teacher)[name], folder, tmp_path / "run")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], abs=2e-3)
    assert run.model.is_dir()


def test_the_curves_cover_every_kind():
    recorded = json.loads(GOLDEN.read_text())
    assert recorded.keys() == kinds("").keys()
    assert all(len(losses) == 20 for losses in recorded.values())
    for name in ("teacher", "deit3", "hard", "class_token", "masked", "muon", "layer_decay"):
        assert sum(recorded[name][-5:]) < sum(recorded[name][:5]), name


def toy(recipe: Recipe, teacher: Path, root: Path) -> Recipe:
    """The same experiment, narrow, of a few patches and two steps."""
    model, objective = recipe.model, recipe.objective
    if isinstance(model, DeiTConfig):
        guided = isinstance(objective, Distilled) and objective.guidance > 0
        model = shrink(model, num_labels=None, image_size=4 * model.patch_hw[0], num_hidden_layers=3 if guided else 2)
        if guided:  # which needs three maps
            config = ConvNetConfig(widths=(8, 8, 8), depth=1, image_size=16, id2label=dict(enumerate("abc")))
            teacher = saved(ConvNet(config), root / "guide")
    elif isinstance(model, TimmConfig):
        model = model.replace(architecture="test_resnet", image_size=32)
    else:
        model = model.replace(widths=(8, 8), image_size=16)
    if isinstance(objective, Distilled):
        objective = replace(objective, teacher=str(teacher))
    if recipe.schedule is not None:
        recipe = replace(recipe, schedule=replace(recipe.schedule, total=steps(2), warmup=steps(1)))
    data, start = replace(recipe.data, batch=6), str(root / "start") if recipe.start else ""
    small = replace(recipe, model=model, objective=objective, data=data, compute=FLOAT, start=start)
    if start:
        fresh = replace(TEACHER, model=model, data=data)
        if isinstance(objective, Distilled):
            fresh = replace(fresh, objective=objective)
        build_model(fresh, ("x", "y")).save_pretrained(root / "start")
    return small


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_runs(name, folder, teacher, tmp_path):
    """Two steps on made images; the model it leaves predicts, and prepares images as the recipe says."""
    recipe = toy(shipped()[name](), teacher, tmp_path)
    if isinstance(recipe.objective, LinearProbe):
        run = train(recipe, *read_data(folder, holdout=0.1, seed=0), tmp_path / "run", device="cpu", console=QUIET)
    else:
        run, losses = curve(recipe, folder, tmp_path / "run")
        assert len(losses) >= 1
        assert all(0 < loss < 20 + 3 * getattr(recipe.objective, "guidance", 0) for loss in losses)
    again = Recipe.from_dict(json.loads((tmp_path / "run" / "recipe.json").read_text()))
    assert again == recipe
    if isinstance(recipe.objective, MaskedImage):
        [picture] = (tmp_path / "run" / "reconstructions").iterdir()
        assert picture.name == "update-000000002.png"
    else:
        predictor = Predictor(run.model)
        [found] = predictor([folder / "val" / "a" / "0.png"])
        assert sorted(entry["label"] for entry in found) == ["a", "b", "c"]
        assert predictor.processor == processor_for(recipe)


if __name__ == "__main__":
    import tempfile

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        images = photos(photos(Path(place) / "data", size=72), split="val", count=3, size=72)
        taught = train(
            TEACHER, *read_data(images, holdout=0.1, seed=0), Path(place) / "teacher", device="cpu", console=QUIET
        ).model
        curves = {name: curve(recipe, images, Path(place) / "runs" / name)[1] for name, recipe in kinds(taught).items()}
    GOLDEN.write_text(
        json.dumps({name: [round(loss, 5) for loss in losses] for name, losses in curves.items()}, indent=1) + "\n"
    )
    sys.exit()
