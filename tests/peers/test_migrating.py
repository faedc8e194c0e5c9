"""The pairs of docs/migrating.md: both sides run as they stand there, and give the same values.

Names of the hub stand for folders with small or random models, which the other library has saved.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import assert_close
from support.models import scramble

from deit.cli.arguments import parser
from deit.recipe import override
from deit.recipes import find

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore:.* initialised anew, train before use:UserWarning"),  # new classes
]

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
QUIET = (
    'TrainingArguments("out", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, '
    "dataloader_pin_memory=False, "
)
GROUPS = (
    "sorted((group['lr_scale'], group['weight_decay'], sum(p.numel() for p in group['params'])) "
    "for group in optimizer.param_groups)"
)
SAME = {
    "transformers": {
        "Load and predict": ["pixels", "logits", "label"],
        "Pipeline": ["answers"],
        "384 pixels": ["larger", "logits"],
        "New classes": [
            "student(pixels, output_hidden_states=True).hidden_states[-1]",
            "tuple(student(pixels).logits.shape)",
        ],
        "Distil": ["loss", ("model.deit.embeddings.distillation_token.grad", "model.deit.distillation_token.grad")],
        "Trainer": [
            "[row['loss'] for row in trainer.state.log_history if 'loss' in row]",
            (
                "AutoModelForImageClassification.from_pretrained('out')(pixels).logits",
                "load_model('out')(pixels).logits",
            ),
        ],
        "Export": ["exported"],
    },
    "timm": {
        "Load and predict": ["pixels", "logits", "features"],
        "384 pixels": ["larger"],
        "New classes and optimizer": ["model.eval().forward_features(pixels)", GROUPS],
        "Distil from a model of timm": ["loss"],
        "Save": [("again(pixels)", "again(pixels).logits")],
    },
    "original": {"Weights": [], "Preprocessing": ["pixels", "logits"]},
}
"""Expressions that have the same value on both sides, or a pair of them, by the peer and the heading."""


def sections():
    """The pairs of the page: peer, heading, their code and ours."""
    found = []
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = re.findall(r"```python\n# (\w+)\n(.*?)```", text, re.DOTALL)
        if blocks:
            [(peer, theirs), (us, ours)] = blocks
            assert us == "deit"
            found.append((peer, heading, theirs, ours))
    return found


def test_every_pair_is_compared():
    assert [(peer, heading) for peer, heading, _, _ in sections()] == [
        (peer, heading) for peer, headings in SAME.items() for heading in headings
    ]
    assert PAGE.count("```python") == 2 * len(sections())


def as_published(folder):
    options = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "DeiTImageProcessor",
        "resample": 3,
        "size": 256,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(options))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What stands for each name of the page."""
    root = tmp_path_factory.mktemp("published")
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "id2label": dict(enumerate("abcde")),
        "label2id": {name: number for number, name in enumerate("abcde")},
    }
    distilled = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    plain = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    for seed, (name, model) in enumerate({"tiny": distilled, "base": plain}.items()):
        scramble(model, seed).save_pretrained(root / name)
        as_published(root / name)
    for name, architecture in (("timm", "deit_tiny_distilled_patch16_224.fb_in1k"), ("teacher", "resnet10t.c3_in1k")):
        torch.manual_seed(3)
        model = timm.create_model(architecture)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        timm.models.save_for_hf(model, root / name)
        if name == "timm":
            torch.save({"model": model.state_dict()}, root / "deit.pth")
    return {
        "facebook/deit-tiny-distilled-patch16-224": root / "tiny",
        "facebook/deit-base-patch16-224": root / "base",
        "hf-hub:timm/deit_tiny_distilled_patch16_224.fb_in1k": f"local-dir:{root / 'timm'}",
        "timm/deit_tiny_distilled_patch16_224.fb_in1k": root / "timm",
        "hf-hub:timm/regnety_160.deit_in1k": f"local-dir:{root / 'teacher'}",
        "deit_tiny_distilled_patch16_224-b40b3cf7.pth": root / "deit.pth",
    }


def value(name, namespace):
    found = eval(name, namespace)
    return found.detach() if isinstance(found, torch.Tensor) else found


def assert_same(found, expected, where):
    if isinstance(expected, torch.Tensor):
        assert_close(found, expected)
        assert expected.abs().max() > 0.01, where
    elif isinstance(expected, list) and isinstance(expected[0], list):  # of a pipeline
        for one, other in zip(found, expected, strict=True):
            assert [each["label"] for each in one] == [each["label"] for each in other]
            assert [each["score"] for each in one] == pytest.approx([each["score"] for each in other], abs=1e-5)
    elif isinstance(expected, list) and isinstance(expected[0], float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected, where


@pytest.mark.parametrize("peer", SAME)
def test_both_sides_give_the_same(peer, names, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sides = {"theirs": {}, "ours": {}}
    for side in sides:
        (tmp_path / side).mkdir()
    for name, size in (("photo.jpg", (300, 400)), ("other.png", (260, 240))):
        image = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(size)
        for side in sides:
            image.save(tmp_path / side / name)
    for whose, heading, *blocks in sections():
        if whose != peer:
            continue
        for (side, namespace), code in zip(sides.items(), blocks, strict=True):
            for name, place in names.items():
                code = code.replace(f'"{name}"', repr(str(place)))
            monkeypatch.chdir(tmp_path / side)
            torch.manual_seed(0)
            exec(code.replace('TrainingArguments("out", ', QUIET), namespace)
        for each in SAME[peer][heading]:
            values = []
            for (side, namespace), name in zip(
                sides.items(), (each, each) if isinstance(each, str) else each, strict=True
            ):
                monkeypatch.chdir(tmp_path / side)
                values.append(value(name, namespace))
            assert_same(values[1], values[0], f"{heading}: {each}")
        if (peer, heading) == ("timm", "384 pixels"):  # "near and not equal"
            theirs, ours = (namespace["logits"] for namespace in sides.values())
            assert 1e-6 < (theirs - ours).abs().max() < 0.1 * theirs.abs().max()


def settings(title):
    """The settings in the rows of a table, by the title of its second column."""
    [rows] = re.findall(rf"\| `main.py` \| `deit train {title}` \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    return [shlex.split(text)[1] for text in re.findall(r"`(--set [^`]+)`", rows)]


@pytest.mark.parametrize("name", ["deit_base", "deit_base_distilled"])
def test_the_recipe_has_the_settings_of_the_table(name):
    found = settings(name)
    assert len(found) >= 3
    recipe = find(name)
    for setting in found:
        changed = override(recipe, [setting])
        if setting == "objective.weight=0.5":  # which the recipe leaves to the default
            assert changed.objective.weight == 0.5
            assert recipe.objective.weight is None
        else:
            assert changed == recipe, setting


def test_the_commands_of_the_tables_parse():
    said = re.findall(r"`(?:torchrun [^`]*-m )?deit ([a-z]+ [^`]+)`", PAGE)
    assert len(said) >= 6
    for command in said:
        if " --" in command:
            parser().parse_args(shlex.split(command))  # or it ends with a message
