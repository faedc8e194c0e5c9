"""Recipes as records: the shipped ones against their papers' numbers, `--set`, and the ways to name one.

`python tests/test_recipe.py` writes anew what is derived from the recipes: the golden record and the table of
docs/recipes.md.
"""

import inspect
import json
import re
import shlex
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from support.checks import raises_saying
from support.models import shrink

from deit.config import VARIANTS, DeiTConfig
from deit.data.batches import processor_for
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
)
from deit.recipe import (
    LAMB,
    SGD,
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Duration,
    Erase,
    Jitter,
    LinearProbe,
    MaskedImage,
    Mix,
    RandAugment,
    Recipe,
    ResizedCrop,
    SimpleCrop,
    Supervised,
    ThreeAugment,
    epochs,
    override,
    steps,
)
from deit.recipes import find, shipped, summary
from deit.recipes.deit import deit_base, deit_tiny, deit_tiny_distilled
from deit.recipes.digits import digits
from deit.recipes.finetune import finetune, finetune_distilled
from deit.train.build import build_model
from deit.train.guidance import GuidedStudent

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
NAMES = list(shipped())
IMAGENET = 1_281_167


def recipe_of(name):
    return shipped()[name]()


def flat(values, prefix=""):
    """Every leaf of a nested dictionary by its dotted path."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def records():
    return {name: flat(recipe_of(name).to_dict()) for name in NAMES}


def sections(function):
    """What a recipe's docstring says after Source:, Expected: and Ours:, in one line each."""
    parts = re.split(r"^(Source|Expected|Ours): ", inspect.getdoc(function), flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def table():
    """The table of docs/recipes.md: what every recipe's docstring says."""
    lines = ["| recipe | what | source | expected | ours |", "|---|---|---|---|---|"]
    for name, function in shipped().items():
        said = sections(function)
        lines.append(f"| `{name}` | {summary(function)} | {said['Source']} | {said['Expected']} | {said['Ours']} |")
    return "\n".join(lines)


def differences(recipe, changed):
    """The settings that differ, as the changed recipe has them."""
    before, after = flat(recipe.to_dict()), flat(changed.to_dict())
    return {path: after.get(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


# -------------------------------------------------------------------------------------------------- what is shipped


def test_the_numbers_of_every_recipe_are_as_recorded():
    """A changed experiment shows as a changed number: after a deliberate change, write the file anew with
    `python tests/test_recipe.py`."""
    assert json.loads(json.dumps(records())) == json.loads(GOLDEN.read_text())


def test_the_page_shows_exactly_the_shipped_recipes():
    text = PAGE.read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == NAMES
    assert table() in text, "write it anew with `python tests/test_recipe.py`"


def accepted(setting):
    """Whether some recipe takes a setting as it stands in a shell command."""
    for name in ("deit_tiny", "deit_tiny_distilled", "deit_tiny_distilled_soft", "finetune"):
        try:
            override(recipe_of(name), shlex.split(setting))
            return True
        except ValueError:
            pass
    return False


def test_every_setting_on_the_page_and_in_the_docstrings_is_one():
    texts = [PAGE.read_text(), *(function.__doc__ for function in shipped().values())]
    found = {setting for text in texts for setting in re.findall(r'--set ("[^"]*"|[^\s`]+)', text)}
    found -= {"FIELD=VALUE"}
    assert len(found) > 15
    assert [setting for setting in sorted(found) if "(" in setting and not setting.startswith('"')] == []  # for a shell
    assert [setting for setting in sorted(found) if not accepted(setting)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_it_comes_from(name):
    function = shipped()[name]
    assert recipe_of(name).name == name
    assert summary(function) == function.__doc__.splitlines()[0]
    assert summary(function).endswith(".")
    said = sections(function)
    assert list(said) == ["Source", "Expected", "Ours"]
    assert all(len(text) > 4 for text in said.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_its_record(name):
    recipe = recipe_of(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert "id2label" not in recipe.to_dict()["model"]  # labels are the data's


def test_recipes_come_in_the_order_of_their_files():
    expected = []
    for path in sorted(Path(inspect.getfile(deit_base)).parent.glob("[a-z]*.py")):
        expected += re.findall(r"^def ([a-z]\w*)\(.*\) -> Recipe:", path.read_text(), re.MULTILINE)
    assert expected == NAMES
    assert {"deit_base_distilled", "deit3_huge", "simmim", "finetune_distilled", "digits"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds(name):
    """Narrow, and without its start: the class of model that its objective trains, with the data's labels."""
    recipe = recipe_of(name)
    if isinstance(recipe.model, DeiTConfig):
        recipe = replace(recipe, model=shrink(recipe.model, num_labels=2, num_hidden_layers=3))
    if isinstance(recipe.objective, LinearProbe):  # which no recipe can have without a start
        recipe = replace(
            recipe, objective=Supervised(), optim=AdamW(lr=1e-3, per_images=8), schedule=Cosine(total=epochs(1))
        )
    recipe = replace(recipe, start="", statistics="batch")
    with torch.device("meta"):
        model = build_model(recipe, ["cat", "dog", "cow"])
    assert next(model.parameters()).is_meta
    objective = recipe.objective
    token = isinstance(objective, Distilled) and objective.token == "distillation"
    if isinstance(recipe.model, DeiTConfig):
        assert type(model) is (
            DeiTForMaskedImageModeling
            if isinstance(objective, MaskedImage)
            else GuidedStudent
            if token and objective.guidance
            else DeiTForImageClassificationWithTeacher
            if token
            else DeiTForImageClassification
        )
        assert recipe.model.distillation_token is token
    assert list(model.config.id2label.values()) == ["cat", "dog", "cow"]


def test_every_start_is_of_the_same_architecture():
    """A hub name is a variant of the recipe's architecture; a run's model is that of a recipe that is shipped."""
    started = {name: recipe_of(name) for name in NAMES if recipe_of(name).start not in ("", "installed")}
    assert len(started) >= 15
    for name, recipe in started.items():
        owner, variant = recipe.start.removesuffix("/model").split("/")
        assert owner in ("facebook", "runs")
        other = VARIANTS[variant] if owner == "facebook" else recipe_of(variant).model
        free = {"image_size": other.image_size, "num_labels": 2, "drop_path_rate": other.drop_path_rate}
        if variant == "cifar10_coarse":  # whose patches are larger on purpose
            free |= {"patch_size": other.patch_size, "encoder_stride": other.encoder_stride}
        assert recipe.model.replace(**free) == other.replace(num_labels=2), name


# ------------------------------------------------------------------------------------- against the papers' numbers


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deit_tiny", 5_717_416),
        ("deit_small", 22_050_664),
        ("deit_base", 86_567_656),
        ("deit_tiny_distilled", 5_910_800),
        ("deit_small_distilled", 22_436_432),
        ("deit_base_distilled", 87_338_192),
        ("deit_base_384", 86_859_496),
        ("deit_base_distilled_384", 87_630_032),
        ("transfer_inat18", 86_567_656),
        ("deit_tiny_hard", 5_717_416),
        ("simmim_finetune", 86_567_656),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(name, count):
    with torch.device("meta"):
        model = build_model(replace(recipe_of(name), start=""), [str(i) for i in range(1000)])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "timms", "pixels"),
    [
        ("deit3_small", "deit3_small_patch16_224", 224),
        ("deit3_medium", "deit3_medium_patch16_224", 224),
        ("deit3_base", "deit3_base_patch16_224", 192),
        ("deit3_large", "deit3_large_patch16_224", 192),
        ("deit3_huge", "deit3_huge_patch14_224", 160),
        ("deit3_small_384", "deit3_small_patch16_384", 384),
    ],
)
def test_parameters_of_deit3_are_timms(name, timms, pixels):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build_model(replace(recipe_of(name), start=""), [str(i) for i in range(1000)])
        theirs = timm.create_model(timms, img_size=pixels)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def settings(recipe):
    """Peak learning rate at the recipe's batch, weight decay, batch, repeats, epochs, warm-up, floor, drop path."""
    optim, schedule = recipe.optim, recipe.schedule
    assert {schedule.total.unit, schedule.warmup.unit} == {"epochs"}
    return (
        pytest.approx(optim.lr * recipe.data.batch / optim.per_images),
        optim.weight_decay,
        recipe.data.batch,
        recipe.data.repeats,
        schedule.total.amount,
        schedule.warmup.amount,
        schedule.floor,
        recipe.model.drop_path_rate,
    )


DEIT = (1e-3, 0.05, 1024, 3, 300, 5, 1e-5, 0.1)
DEIT_1000 = (*DEIT[:4], 1000, *DEIT[5:])
DEIT_384 = (5e-6, 1e-8, 512, 3, 30, 5, 5e-6, 0.1)
TRANSFER = (0.01, 1e-4, 768, 3, 1000, 5, 1e-5, 0.0)
INAT = (7.5e-5, 0.05, 768, 3, 360, 5, 1e-5, 0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (f"deit_{size}{kind}", DEIT)
            for size in ("tiny", "small", "base")
            for kind in ("", "_distilled", "_hard", "_soft")
        ),
        *((f"deit_{size}_distilled_1000", DEIT_1000) for size in ("tiny", "small", "base")),
        ("deit_tiny_distilled_soft", DEIT),
        ("deit_base_384", DEIT_384),
        ("deit_base_distilled_384", DEIT_384),
        ("deit3_small", (4e-3, 0.05, 2048, 3, 800, 5, 1e-5, 0.05)),
        ("deit3_base", (3e-3, 0.05, 2048, 3, 800, 5, 1e-5, 0.2)),
        ("deit3_base_cosub", (3e-3, 0.05, 2048, 3, 800, 5, 1e-5, 0.2)),
        ("deit3_large", (3e-3, 0.05, 2048, 3, 800, 5, 1e-5, 0.45)),
        ("deit3_huge", (3e-3, 0.05, 2048, 3, 800, 5, 1e-5, 0.6)),
        ("deit3_small_400", (4e-3, 0.03, 2048, 3, 400, 5, 1e-5, 0.0)),
        ("deit3_base_400", (3e-3, 0.03, 2048, 3, 400, 5, 1e-5, 0.1)),
        ("deit3_large_400", (3e-3, 0.03, 2048, 3, 400, 5, 1e-5, 0.4)),
        ("deit3_base_224", (1e-5, 0.1, 512, 1, 20, 5, 1e-5, 0.2)),
        ("deit3_large_224", (1e-5, 0.1, 512, 1, 20, 5, 1e-5, 0.45)),
        ("deit3_huge_224", (1e-5, 0.1, 512, 1, 20, 5, 1e-5, 0.55)),
        ("deit3_small_384", (1e-5, 0.1, 512, 1, 20, 5, 1e-5, 0.0)),
        ("deit3_base_21k", (1e-3, 0.02, 2048, 1, 240, 5, 1e-5, 0.1)),
        ("deit3_base_21k_1k", (3e-4, 0.02, 2048, 1, 50, 5, 1e-5, 0.15)),
        *((f"transfer_{name}", TRANSFER) for name in ("cifar10", "cifar100", "flowers", "cars")),
        ("transfer_inat18", INAT),
        ("transfer_inat19", INAT),
        ("simmim", (4e-4, 0.05, 2048, 1, 800, 10, 2e-5, 0.1)),
        ("simmim_finetune", (5e-3, 0.05, 2048, 1, 100, 20, 1e-6, 0.1)),
    ],
)
def test_settings_are_the_sources(name, expected):
    """Touvron et al. 2020, table 9, README_deit.md and issues 45 and 105; README_revenge.md; SimMIM's configs."""
    assert settings(recipe_of(name)) == expected


def test_table_9_in_full():
    """Table 9 of Touvron et al. 2020, and the defaults of main.py for what it leaves out."""
    recipe = deit_base()
    augment = Augment(
        crop=ResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        flip=0.5,
        policy=RandAugment(magnitude=9, std=0.5, layers=2, probability=0.5, increasing=True),
        erase=Erase(probability=0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)),
        mix=Mix(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, mode="batch"),
    )
    assert recipe.augment == augment
    assert recipe.objective == Supervised(loss="cross_entropy", smoothing=0.1)
    assert recipe.optim == AdamW(
        lr=5e-4,
        per_images=512,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        eps=1e-8,
        clip=None,
        layer_decay=1.0,
        decay_distillation_token=True,
    )
    assert (recipe.schedule.start, recipe.ema, recipe.data.crop_ratio) == (1e-6, 0.99996, 224 / 256)
    assert (recipe.model.drop_path_schedule, recipe.model.hidden_dropout_prob) == ("linear", 0.0)
    # 1,281,167 views make an epoch, whatever `repeats`.
    assert recipe.schedule.total.in_steps(IMAGENET / recipe.data.batch) == round(300 * 1_281_167 / 1024) == 375_342


def test_distillation_is_the_papers():
    """Hard: half and half, at the teacher's own resolution but for the fine-tuning at 384 (sections 4 and 6)."""
    for name in NAMES:
        if name.startswith("deit_") and isinstance(objective := recipe_of(name).objective, Distilled):
            assert objective.teacher == "timm:regnety_160.deit_in1k"
            assert objective.kind == ("soft" if "soft" in name else "hard")
            assert objective.token == ("distillation" if "distilled" in name else "class")
            assert objective.resolution == ("student" if name.endswith("384") else "teacher")
            assert (objective.smoothing, objective.weight, objective.temperature) == (0.1, None, None)
            assert objective.normalisation == "images"
            assert recipe_of(name).model.distillation_token is ("distilled" in name)


def test_the_larger_resolution_is_evaluated_whole():
    for name, variant in (("deit_base_384", "base"), ("deit_base_distilled_384", "base-distilled")):
        recipe = recipe_of(name)
        assert (recipe.model.image_size, recipe.data.crop_ratio) == (384, 1.0)
        assert recipe.start == f"facebook/deit-{variant}-patch16-224"
        assert recipe.augment == deit_base().augment


def test_deit3_in_full():
    """README_revenge.md of facebookresearch/deit."""
    pixels = {"small": 224, "base": 192, "large": 192, "huge": 160}
    for size, side in pixels.items():
        recipe = recipe_of(f"deit3_{size}")
        assert recipe.model.image_size == side
        assert (recipe.model.layer_scale_init_value, recipe.model.drop_path_schedule) == (1e-4, "constant")
        assert not recipe.model.position_on_class_token
        assert recipe.objective == Supervised(loss="binary", smoothing=0.0)
        assert isinstance(recipe.optim, LAMB)
        assert recipe.augment == Augment(
            crop=ResizedCrop(),
            flip=0.5,
            policy=ThreeAugment(),
            jitter=Jitter(brightness=0.3, contrast=0.3, saturation=0.3),
            mix=Mix(mixup=0.8, cutmix=1.0),
        )
        assert recipe.data.crop_ratio == 1.0
    assert recipe_of("deit3_huge").model.grid == (11, 11)
    short = recipe_of("deit3_huge_224")
    assert (short.model.image_size, short.augment) == (224, replace(deit_base().augment, erase=None))
    assert (type(short.optim), short.objective) == (AdamW, Supervised(smoothing=0.1))
    large = recipe_of("deit3_base_21k")
    assert (large.augment.crop, large.augment.mix) == (SimpleCrop(padding=4), Mix(mixup=0.0, cutmix=1.0))
    assert large.objective == Supervised(smoothing=0.1)
    assert recipe_of("deit3_base_cosub") == replace(
        recipe_of("deit3_base"), name="deit3_base_cosub", objective=Supervised(loss="binary", cosub=True)
    )


def test_transfer_and_masked_images_in_full():
    """Issues 45 and 105 of facebookresearch/deit; configs/vit_base__800ep and data_simmim.py of microsoft/SimMIM."""
    cars, inat = recipe_of("transfer_cars"), recipe_of("transfer_inat18")
    assert (type(cars.optim), cars.augment) == (SGD, replace(deit_base().augment, erase=None))
    assert (type(inat.optim), inat.augment.erase) == (AdamW, Erase(probability=0.1))
    simmim, tuned = recipe_of("simmim"), recipe_of("simmim_finetune")
    assert simmim.objective == MaskedImage(ratio=0.6, unit=32)
    assert simmim.augment == Augment(crop=ResizedCrop(scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)), flip=0.5)
    assert (simmim.optim.clip, tuned.optim.clip, tuned.optim.layer_decay) == (5.0, 5.0, 0.65)
    assert (simmim.schedule.start, tuned.schedule.start) == (2e-6, 1e-6)  # 5e-7 and 2.5e-7 per 512 images
    assert tuned.augment == deit_base().augment


def test_arguments_of_recipes():
    assert digits("runs/teacher/model").objective.teacher == "runs/teacher/model"
    larger = finetune("deit-base-patch16-224")
    assert (larger.start, larger.model.hidden_size) == ("facebook/deit-base-patch16-224", 768)
    assert finetune_distilled(teacher="a").objective.teacher == "a"
    with raises_saying(ValueError, "there is no variant 'deit-giant'", "deit-base-patch16-224"):
        finetune("deit-giant")


# -------------------------------------------------------------------------------------------------------- override


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.lr=1e-3", {"optim.lr": 1e-3}),
        (" optim.lr = 1e-3 ", {"optim.lr": 1e-3}),
        ("data.holdout=0", {"data.holdout": 0.0}),
        ("schedule.total=epochs(30)", {"schedule.total.amount": 30.0}),
        ("schedule.total=steps(7)", {"schedule.total.amount": 7.0, "schedule.total.unit": "steps"}),
        ("schedule.warmup.amount=2", {"schedule.warmup.amount": 2.0}),
        ("augment.policy.std=0.25", {"augment.policy.std": 0.25}),
        ("augment.flip=0", {"augment.flip": 0.0}),
        ("augment.crop.scale=(0.3, 1)", {"augment.crop.scale": [0.3, 1.0]}),
        ("augment.crop.scale=[0.3, 1]", {"augment.crop.scale": [0.3, 1.0]}),
        ("model.image_size=(224, 192)", {"model.image_size": [224, 192]}),
        ("compute.compile=true", {"compute.compile": True}),
        ("compute.compile=True", {"compute.compile": True}),
        ("compute.workers=3", {"compute.workers": 3}),
        ("start=facebook/deit-tiny-patch16-224", {"start": "facebook/deit-tiny-patch16-224"}),
        ("start=/home/someone/a run/model", {"start": "/home/someone/a run/model"}),
        ("start='2024'", {"start": "2024"}),
        ("objective.teacher=timm:regnety_160", {"objective.teacher": "timm:regnety_160"}),
        ("objective.teacher=teachers.py:best", {"objective.teacher": "teachers.py:best"}),
        (
            "optim=LAMB(lr=5e-3, per_images=2048)",
            {"optim.kind_of": "LAMB", "optim.lr": 5e-3, "optim.per_images": 2048, "optim.eps": 1e-6},
        ),
        (
            "augment.erase=Erase(probability=1, area=(0.1, 0.2))",
            {"augment.erase.probability": 1.0, "augment.erase.area": [0.1, 0.2]},
        ),
        (
            "schedule=Cosine(total=epochs(30), warmup=steps(7))",
            {"schedule.total.amount": 30.0, "schedule.warmup.amount": 7.0, "schedule.warmup.unit": "steps"},
        ),
        ("data=Data(batch=8)", {"data.batch": 8, "data.repeats": 1}),
    ],
)
def test_override(setting, expected):
    recipe = deit_tiny_distilled()
    assert differences(recipe, override(recipe, [setting])) == expected


def test_override_takes_whole_parts_away_and_back():
    recipe = deit_tiny()
    for text in ("None", "none"):
        assert override(recipe, [f"augment.mix={text}"]) == replace(recipe, augment=replace(recipe.augment, mix=None))
    assert override(recipe, ["augment.mix=None", "augment.mix=Mix(cutmix=0.5)", "augment.mix.mode=pair"]) == replace(
        recipe, augment=replace(recipe.augment, mix=Mix(cutmix=0.5, mode="pair"))
    )
    assert override(recipe, ["augment=Augment(erase=Erase(), crop=SimpleCrop(padding=2))"]) == replace(
        recipe, augment=Augment(erase=Erase(), crop=SimpleCrop(padding=2))
    )
    assert override(recipe, []) == recipe


def test_override_checks_the_whole_once_at_the_end():
    """Each of the two alone contradicts the rest of the recipe, in either order."""
    both = ["objective=Distilled(teacher=timm, kind=soft)", "model.distillation_token=True"]
    for pair in (both, both[::-1]):
        found = override(deit_tiny(), pair)
        assert (found.objective, found.model.distillation_token) == (Distilled(teacher="timm", kind="soft"), True)
    with raises_saying(ValueError, "recipe deit_tiny", "needs a model that has one", "model.distillation_token=True"):
        override(deit_tiny(), both[:1])


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("optim.lr", ["--set optim.lr", "expected FIELD=VALUE"]),
        ("optm.lr=1", ["--set optm.lr=1", "there is no 'optm'", "did you mean 'optim'"]),
        ("optim.lrr=1", ["AdamW: there is no 'lrr'", "did you mean 'lr'"]),
        ("model.hiden_size=1", ["there is no 'hiden_size'", "did you mean 'hidden_size'"]),
        (
            "objective.teacher=x",
            ["Supervised: there is no 'teacher'", "there is class_weights, cosub, loss, smoothing"],
        ),
        ("optim.kind_of=SGD", ["there is no 'kind_of'"]),
        ("augment.affine.rotate=3", ["augment.affine is None and has no field 'rotate'", "set it as a whole first"]),
        ("optim.lr.x=3", ["optim.lr is 0.0005 and has no field 'x'"]),
        ("optim.lr=fast", ["optim.lr: expected float, found 'fast'"]),
        ("optim.lr=None", ["optim.lr: expected float, found None"]),
        ("optim.lr=1e999", ["optim.lr: expected a finite number, found inf"]),
        ("optim.lr=-1", ["optim: lr and per_images must be positive, found lr=-1.0"]),
        ("optim.betas=(0.9, 'x')", ["optim.betas: expected float, found 'x'"]),
        ("optim.betas=(0.9,)", ["optim.betas: expected 2 numbers, found [0.9]"]),
        ("data.mean=0.5", ["data.mean: expected numbers, found 0.5"]),
        ("data.batch=1.5", ["data.batch: expected int, found 1.5"]),
        ("data.batch=true", ["data.batch: expected int, found True"]),
        ("compute.compile=1", ["compute.compile: expected bool, found 1"]),
        ("compute.precision=float16", ["expected auto or float32 or bfloat16, found 'float16'"]),
        ("start=5", ["start: expected str, found 5"]),
        ("evaluate.amount=5", ["evaluate is None and has no field 'amount'", "set it as a whole first"]),
        ("evaluate=5", ["evaluate: expected epochs(NUMBER) or steps(NUMBER), found 5"]),
        ("evaluate=epochs()", ["expected epochs(NUMBER), e.g. epochs(30)"]),
        ("evaluate=epochs(soon)", ["epochs.amount: expected float, found 'soon'"]),
        ("evaluate=epochs(-1)", ["a duration can't be negative"]),
        ("data=None", ["data: expected Data, found None"]),
        ("optim=3", ["optim: expected AdamW or SGD or LAMB or Muon, found 3"]),
        ("optim=Adam(lr=1)", ["there is no 'Adam'", "did you mean 'AdamW'"]),
        ("optim=AdamW(lr=1e-3)", ["AdamW: per_images must be given"]),
        ("optim=Muon(momentum=0.9)", ["Muon: lr and per_images and others_lr must be given"]),
        ("optim=AdamW(lr='x', per_images=1)", ["AdamW.lr: expected float, found 'x'"]),
        ("optim=AdamW(lr=1, per_images=1, rate=2)", ["AdamW: there is no 'rate'"]),
        ("optim=AdamW(1e-3)", ["AdamW takes its arguments by name: AdamW(lr=..., per_images=..."]),
        ("augment.mix=Mix()", ["--set augment.mix=Mix()", "needs a positive mixup or cutmix alpha"]),
        ("augment.erase=Mix(mixup=1)", ["augment.erase: expected", "Erase, found 'Mix'"]),
        ("model=deit-small", ["model: expected DeiTConfig or ConvNetConfig or TimmConfig, found 'deit-small'"]),
        ("model.hidden_size=100", ["model: hidden_size=100 cannot be divided"]),
        ("objective.smoothing=1", ["objective: smoothing must be from 0.0 to 0.999, found 1.0"]),
        ("seed=-1", ["seed can't be negative, found -1"]),
    ],
)
def test_override_refuses(setting, parts):
    with raises_saying(ValueError, *parts):
        override(deit_tiny(), [setting])


def test_the_built_in_convnet_in_a_record():
    teacher = recipe_of("digits_teacher")
    assert override(teacher, ["model.widths=(8, 16)"]).model == teacher.model.replace(widths=(8, 16))
    with raises_saying(ValueError, "model: "):
        override(teacher, ["model.widths=8"])
    with raises_saying(ValueError, "there is no 'hidden_size'"):
        override(teacher, ["model.hidden_size=8"])
    with raises_saying(ValueError, "neither compute.checkpoint_blocks nor start"):
        override(teacher, ["start=facebook/deit-tiny-patch16-224"])


@pytest.mark.parametrize("name", ["teacher", "frozen"])
def test_a_model_of_timm_takes_squares(name):
    """timm's config.json, which the trained folder has, can't say how the evaluation cuts out a rectangle."""
    taken = override(recipe_of(name), ["model.image_size=(192, 192)"])
    assert taken.model.image_hw == (192, 192)
    with raises_saying(ValueError, "timm is trained on square images", "(192, 320)", "set one number"):
        override(recipe_of(name), ["model.image_size=(192, 320)"])
    with pytest.raises(ValueError, match="timm's keys say a square crop"):
        processor_for(override(deit_tiny(), ["model.image_size=(192, 320)"])).to_timm()


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled"])
def test_classes_are_weighed_alike_or_not(name):
    recipe = recipe_of(name)
    assert recipe.objective.class_weights == "equal"
    balanced = override(recipe, ["objective.class_weights=balanced"])
    assert balanced.objective == replace(recipe.objective, class_weights="balanced")
    assert Recipe.from_dict(json.loads(json.dumps(balanced.to_dict()))) == balanced
    with raises_saying(ValueError, "objective.class_weights: expected equal or balanced, found 'rare'"):
        override(recipe, ["objective.class_weights=rare"])
    older = recipe.to_dict()
    del older["objective"]["class_weights"]  # as it was written before there was a choice
    assert Recipe.from_dict(older) == recipe


def test_masked_images_have_no_classes_to_weigh():
    name = next(name for name in NAMES if isinstance(recipe_of(name).objective, MaskedImage))
    with raises_saying(ValueError, "MaskedImage: there is no 'class_weights'"):
        override(recipe_of(name), ["objective.class_weights=balanced"])


def test_from_dict_refuses_what_is_no_recipe():
    record = deit_tiny().to_dict()
    for path, value, parts in (
        ("seed", None, ["seed: expected int, found None"]),
        ("sede", 3, ["recipe: there is no 'sede'", "did you mean 'seed'"]),
        ("model", {**record["model"], "depth": 3}, ["model: there is no field 'depth'"]),
        ("model", {**record["model"], "num_labels": 5}, ["model: num_labels comes from the data", "leave it out"]),
        ("model", {**record["model"], "id2label": {"0": "cat", "1": "dog"}}, ["model: id2label comes from the data"]),
        ("optim", {"lr": 1e-3}, ["optim: expected kind_of to be one of AdamW", "found None"]),
        ("optim", {"kind_of": {}, "lr": 1e-3}, ["optim: expected kind_of to be one of AdamW", "found {}"]),
        ("data", {}, ["data: batch must be given"]),
    ):
        with raises_saying(ValueError, *parts):
            Recipe.from_dict({**record, path: value})
    del record["name"], record["data"]
    with raises_saying(ValueError, "recipe: name and data must be given"):
        Recipe.from_dict(record)


# ------------------------------------------------------------------------------------------------------------ find


def test_find_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name does not hide it
    assert find("digits") == digits()
    with raises_saying(ValueError, "there is no recipe 'deit_tinny'", "did you mean deit_tiny", "`deit recipes`"):
        find("deit_tinny")
    with raises_saying(ValueError, "there is no recipe 'zzz'; `deit recipes` lists them"):
        find("zzz")


MINE = """
from __future__ import annotations
from dataclasses import dataclass, replace
from deit.recipe import Recipe
from deit.recipes.digits import digits

@dataclass(frozen=True)
class Choice:
    lr: float = 3e-3

def mine() -> Recipe:
    recipe = digits()
    return replace(recipe, name="mine", optim=replace(recipe.optim, lr=Choice().lr))

def other(): return 3
def asks(size): return digits()
def fails(): raise ValueError("no good")
constant = 3
"""


def test_find_a_function_of_a_file(tmp_path):
    file = tmp_path / "my recipes.py"
    file.write_text(MINE)
    expected = replace(digits(), name="mine", optim=replace(digits().optim, lr=3e-3))
    assert find(f"{file}:mine") == expected
    with raises_saying(ValueError, file, "there is no function 'yours'", "its recipes: mine"):
        find(f"{file}:yours")
    with raises_saying(ValueError, "there is no function 'constant'"):
        find(f"{file}:constant")
    with raises_saying(ValueError, file, "other must return a Recipe, found int"):
        find(f"{file}:other")
    with raises_saying(ValueError, file, "TypeError", "size"):
        find(f"{file}:asks")
    with raises_saying(ValueError, f"{file}: no good"):
        find(f"{file}:fails")
    with raises_saying(ValueError, "name one of its functions", f"{file}:my_recipe"):
        find(str(file))
    with raises_saying(FileNotFoundError, f"there is no file {tmp_path / 'none.py'}"):
        find(f"{tmp_path / 'none.py'}:mine")
    file.write_text("def (")
    with raises_saying(ValueError, file, "SyntaxError"):
        find(f"{file}:mine")


def test_the_function_on_the_page_trains(tmp_path):
    (tmp_path / "my.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    assert find(f"{tmp_path / 'my.py'}:flowers") == replace(finetune("deit-base-patch16-224"), name="flowers", seed=1)


def test_find_a_record(tmp_path):
    recipe = override(deit_base(), ["optim.lr=3e-4", "schedule.total=steps(7)"])
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert find(str(file)) == find(str(tmp_path)) == recipe
    (tmp_path / "other.json").write_text(json.dumps({**recipe.to_dict(), "seed": "x"}))
    with raises_saying(ValueError, "other.json", "seed: expected int, found 'x'"):
        find(str(tmp_path / "other.json"))
    (tmp_path / "list.json").write_text("[1, 2]")
    with raises_saying(ValueError, "list.json should hold a JSON object, found list"):
        find(str(tmp_path / "list.json"))
    (tmp_path / "broken.json").write_text('{"name": ')
    with raises_saying(ValueError, "broken.json is not valid JSON", "`deit recipes NAME`"):
        find(str(tmp_path / "broken.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x80")
    with raises_saying(ValueError, "bytes.json is not valid JSON"):
        find(str(tmp_path / "bytes.json"))
    with raises_saying(FileNotFoundError, "there is no file", "none.json", "recipe.json"):
        find(str(tmp_path / "none.json"))
    (tmp_path / "empty").mkdir()
    with raises_saying(FileNotFoundError, f"there is no file {tmp_path / 'empty' / 'recipe.json'}"):
        find(str(tmp_path / "empty"))


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("duration", "expected"), [(epochs(5), 500), (epochs(0.5), 50), (steps(7), 7)])
def test_durations(duration, expected):
    assert duration.in_steps(100) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": Supervised(class_weights="Balanced")}, "objective.class_weights: expected equal or balanced"),
        ({"objective": Supervised(loss="bce")}, "objective.loss: expected cross_entropy or binary, found 'bce'"),
        ({"compute": Compute(parallel="ddp")}, "compute.parallel: expected replicate or shard, found 'ddp'"),
        ({"augment": Augment(mix=Mix(cutmix=1.0, mode="pairs"))}, "augment.mix.mode: expected batch or pair or"),
        ({"evaluate": Duration(5, "epoch")}, "evaluate.unit: expected epochs or steps, found 'epoch'"),
        ({"statistics": "starts"}, "statistics: expected batch or start, found 'starts'"),
        ({"data": Data(batch=64.0)}, "data.batch: expected int, found 64.0"),
        ({"optim": Supervised()}, "optim: expected kind_of to be one of AdamW"),
        ({"start": Path("runs")}, "start: expected str, found"),
    ],
)
def test_python_is_checked_like_json(change, words):
    """A misspelt choice would train something else, and a run could not be resumed from such a recipe.json."""
    with raises_saying(ValueError, f"recipe deit_tiny: {words}"):
        replace(deit_tiny(), **change)


def test_refusals():
    with raises_saying(ValueError, "a duration can't be negative, found -1.0 epochs"):
        epochs(-1)
    with raises_saying(ValueError, "lr and per_images must be positive, found lr=0.0"):
        AdamW(lr=0.0, per_images=512)
    with raises_saying(ValueError, "hard distillation has no temperature, found 3.0", "set kind='soft'"):
        Distilled(temperature=3.0)
    with raises_saying(ValueError, "smoothing makes every class a yes", "found smoothing=0.1"):
        Supervised(loss="binary", smoothing=0.1)
    plain = Recipe(
        name="plain",
        model=DeiTConfig(distillation_token=False),
        data=Data(batch=8),
        objective=Supervised(),
        optim=AdamW(lr=1e-3, per_images=512),
        schedule=Cosine(total=epochs(1)),
    )
    with raises_saying(
        ValueError, "recipe plain: distillation through the distillation token needs a model that has one"
    ):
        replace(plain, objective=Distilled(teacher="x"))
    with raises_saying(ValueError, "the distillation token would learn nothing"):
        replace(plain, model=DeiTConfig(), objective=Distilled(teacher="x", token="class"))
    with raises_saying(ValueError, "objective.unit=24 must be a multiple of the patch size 16x16"):
        replace(plain, objective=MaskedImage(unit=24))
    with raises_saying(ValueError, "set augment.mix and augment.erase to None"):
        replace(plain, objective=MaskedImage(), augment=Augment(erase=Erase()))
    with raises_saying(ValueError, "set model.drop_path_rate above 0"):
        replace(plain, objective=Supervised(cosub=True))
    with raises_saying(ValueError, "ema must be at least 0 and below 1, found 1"):
        replace(plain, ema=1.0)
    with raises_saying(ValueError, "evaluate must be longer than 0, found"):
        replace(plain, evaluate=Duration(0, "steps"))
    with pytest.raises(FrozenInstanceError):
        plain.seed = 1


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(records(), indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"\| recipe \|.*?(?=\n\n|\n*\Z)", lambda _: table(), page, count=1, flags=re.DOTALL))
