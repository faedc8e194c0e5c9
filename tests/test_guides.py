"""The guides in docs/: their commands name recipes and settings that exist, their links lead somewhere, and their
Python runs as it stands on small models."""

import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.models import trained_folder
from support.pages import PAGES, ROOT, anchors, blocks, commands, links

from deit.cli.arguments import parser
from deit.config import VARIANTS
from deit.model.load import load_model
from deit.recipe import Cosine, override, steps
from deit.recipes import digits as digits_recipes
from deit.recipes import find, finetune

CLASSES = ("cat", "dog", "horse")


def page(name):
    return (ROOT / "docs" / name).read_text()


# -------------------------------------------------------------------------------------------------- commands and links


def functions_of(text, name, folder):
    """Writes the page's Python into a file, if it is the one that a command names: FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    code = [block for block in blocks(text, "python") if f"def {function}(" in block]
    if code:
        (folder / file).write_text("\n".join(code))
    return bool(code)


@pytest.mark.parametrize("name", PAGES)
def test_recipes_and_settings_of_commands_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text()
    for command in commands(text):
        options = parser().parse_args(command)
        asked = getattr(options, "recipe", None)
        if asked is None or asked.endswith(".json"):
            continue
        if ".py:" in asked and not functions_of(text, asked, tmp_path):
            continue
        taught = [f"objective.teacher={options.teacher}"] if "teacher" in options else []
        assert override(find(asked), [*taught, *options.settings]), command


@pytest.mark.parametrize("name", [*PAGES, "examples/README.md", "bench/README.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(name):
    here = ROOT / name
    for target in links(here.read_text()):
        file, _, anchor = target.partition("#")
        there = (here.parent / file).resolve() if file else here
        assert there.exists(), f"{name} links to {target}, and there is no such file"
        assert not anchor or anchor in anchors(there.read_text()), f"{name} links to {target}, which is no heading"


def test_anchors_are_githubs():
    text = "# A: b's `c.d`\n```sh\n# not a heading\n```\n## Same\n## Same\n"
    assert anchors(text) == ["a-bs-cd", "same", "same-1"]
    assert links("[a](b.md#c), `[d](e)`, ![f](g.svg), [h](https://i)\n```\n[j](k)\n```") == ["b.md#c", "g.svg"]


# -------------------------------------------------------------------------------------------------------------- python


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, with two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Image.new("RGB", (40, 30), "orange").save("photo.jpg")
    Image.linear_gradient("L").convert("RGB").save("other.png")
    return tmp_path


def test_the_task_guide(place, monkeypatch, capsys):
    """With three steps for each run."""
    short = replace(digits_recipes.digits(), schedule=Cosine(total=steps(3)))
    monkeypatch.setattr(digits_recipes, "digits", lambda: short)
    images, guide, *rest = blocks(page("task-guide.md"), "python")
    assert guide.startswith("# guide.py\n")
    assert guide.count("epochs(20), warmup=epochs(1)") == 1
    (place / "guide.py").write_text(guide.replace("epochs(20), warmup=epochs(1)", "epochs(0.1)"))
    names = {}
    exec(images, names)
    assert sorted(path.name for path in (place / "photos/val").iterdir()) == ["eight", "five", "nine", "seven", "six"]
    assert sorted(path.name for path in (place / "digits/val").iterdir()) == ["0", "1", "2", "3", "4"]
    assert (place / "photos/test/seven/1728.png").is_file()
    try:
        for block in rest:
            exec(block, names)
    finally:
        sys.modules.pop("guide", None)
    assert names["recipe"].start == "runs/published/model"
    assert tuple(names["model"].config.id2label.values()) == ("eight", "five", "nine", "seven", "six")
    said = capsys.readouterr().out
    tested = len(list((place / "photos/test").glob("*/*.png")))
    assert re.search(rf"of {tested} test images are right", said)
    assert names["label"] == names["classify"](names["image"])[0]["label"]


def test_fine_tuning(place):
    trained_folder("runs/start/model", "plain")
    trained_folder("runs/teacher/model", "convnet", labels=CLASSES)
    trained_folder("runs/distilled/model")
    recipes, plain, taught = blocks(page("finetuning.md"), "python")
    names = {}
    exec(recipes, names)
    assert names["small"]() == finetune.finetune("deit-small-patch16-224")
    assert names["small_distilled"]().model.hidden_size == 384
    with pytest.warns(UserWarning, match="initialised anew"):
        exec(plain, names)
    assert names["model"].config.id2label == dict(enumerate(CLASSES))
    assert names["model"].config.drop_path_rate == 0.1
    with pytest.warns(UserWarning, match="initialised anew"):
        exec(taught, names)
    out, labels = names["student"](names["pixels"]), torch.tensor([0, 2])
    own, theirs = (F.cross_entropy(*each) for each in ((out.cls_logits, labels), (out.distillation_logits, labels)))
    decided = F.cross_entropy(out.distillation_logits, names["teacher_logits"].argmax(-1))
    assert names["loss"].item() == pytest.approx(((own + decided) / 2).item(), abs=1e-6)
    assert own.item() != pytest.approx(theirs.item())
    assert names["student"].distillation_classifier.weight.grad.abs().sum() > 0


def test_distillation(place):
    trained_folder("runs/teacher/model", "convnet", seed=1)
    trained_folder("runs/student/model")
    names = {}
    for block in blocks(page("distillation.md"), "python"):
        exec(block, names)
    out, label, teacher = names["out"], torch.tensor([0]), names["teacher_logits"]
    hard = (F.cross_entropy(out.cls_logits, label) + F.cross_entropy(out.distillation_logits, teacher.argmax(-1))) / 2
    assert names["hard"].item() == pytest.approx(hard.item(), abs=1e-5)
    wanted, given = (logits.double().div(2).softmax(-1) for logits in (teacher, out.distillation_logits))
    divergence = (wanted * (wanted / given).log()).sum()
    soft = 0.1 * F.cross_entropy(out.cls_logits, label) + 0.9 * 4 * divergence
    assert names["soft"].item() == pytest.approx(soft.item(), abs=1e-5)
    mean = (out.cls_logits.softmax(-1) + out.distillation_logits.softmax(-1)) / 2
    assert torch.allclose(names["probabilities"], mean, atol=1e-6)


def test_resolution(place):
    trained_folder("runs/photos/model", "plain", image_size=32, patch_size=16, encoder_stride=16)
    names = {}
    [block] = blocks(page("resolution.md"), "python")
    exec(block, names)
    saved = load_model("wide")
    assert saved.config.image_size == (192, 320)
    assert saved.deit.position.shape == (1, 1 + 12 * 20, 24)
    assert names["logits"].shape == names["same"].shape == (1, 5)


def test_pretraining(place):
    [block] = blocks(page("pretraining.md"), "python")
    names = {}
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias: initialised anew"):
        exec(block, names)
    assert [int(mask.sum()) for mask in names["masks"]] == [120, 120]  # 30 of 49 squares, of 4 patches each
    assert names["out"].reconstruction.shape == (2, 3, 224, 224)
    ours, theirs = names["classifier"].deit.state_dict(), names["model"].deit.state_dict()
    assert ours.keys() == theirs.keys() - {"mask_token"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_deit3(place):
    names = {}
    [block] = blocks(page("deit3.md"), "python")
    exec(block, names)
    found = names["photos"]()
    assert found.model == VARIANTS["deit3-small-patch16-224"].replace(num_labels=2, drop_path_rate=0.05)
    assert found.model.model_type == "deit3"
