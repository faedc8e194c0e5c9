"""What the teacher sees and says."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support.checks import assert_close, raises_saying
from support.models import build, saved, small
from support.runs import small_recipe
from torch import nn

from deit.config import ConvNetConfig
from deit.data.folders import Split
from deit.files import CheckpointError
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.outputs import ImageClassifierOutput
from deit.recipe import Data, Distilled, Recipe, Supervised
from deit.train.teacher import Teacher, condense, expand

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PAPER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = ("ant", "bee", "cat", "dog")


def student(size=16, *, mean=MEAN, std=STD, **objective):
    return small_recipe(
        Distilled(teacher="t", **objective),
        name="pupil",
        model=small(image_size=size, num_channels=len(mean)),
        data=Data(batch=4, mean=mean, std=std),
    )


def normal(raw, mean, std):
    return (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def convnet(size=16, classes=CLASSES, **config):
    model = ConvNet(ConvNetConfig(widths=(4, 8), depth=1, image_size=size, id2label=dict(enumerate(classes)), **config))
    return lively(model)


def lively(model):
    """With statistics that make the answers of training mode others, and activations that differ."""
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 1.0)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    return str(saved(convnet(), tmp_path))


# ------------------------------------------------------------------------------------------------ the built-in ConvNet


def test_convnet_round_trip(folder):
    pixels = torch.randn(2, 3, 16, 16)
    model = convnet()
    model.save_pretrained(folder)
    again = ConvNet.from_pretrained(folder)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.config == model.config
    kept = ConvNetConfig.from_dict({**model.config.to_dict(), "favourite": "tea"})
    assert kept.to_dict() == {**model.config.to_dict(), "favourite": "tea"}
    assert not again.training


def test_convnet_that_does_not_fit_its_config(tmp_path):
    saved(convnet(), tmp_path)
    text = (tmp_path / "config.json").read_text()
    ConvNet(ConvNetConfig(widths=(4, 9), depth=1, image_size=16)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="does not fit the config"):
        ConvNet.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------- what it sees


def test_the_teacher_sees_its_own_normalisation(folder):
    """The same pixels 0 to 1, normalised once as the student's and once as the teacher's, give the same answer."""
    raw = torch.rand(4, 3, 16, 16)
    teacher = Teacher.load(folder, CLASSES, student())
    assert_close(teacher(normal(raw, MEAN, STD)), ConvNet.from_pretrained(folder)(normal(raw, *PAPER)).logits)
    assert not teacher(raw).requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_the_teacher_sees_what_its_processor_makes(tmp_path, options):
    """Whatever arithmetic the files ask for, against the processor itself on the same image."""
    processor = DeiTImageProcessor(size=16, crop_size=16, **options)
    model = convnet()
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = model(processor([Image.fromarray(levels)], return_tensors="pt").pixel_values).logits
    pixels = normal(torch.from_numpy(levels).permute(2, 0, 1)[None] / 255, MEAN, STD)
    found = Teacher.load(str(saved(model, tmp_path, processor)), CLASSES, student())(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_resolution(folder):
    """The teacher's: resized before it answers. The student's: left as they are."""
    pixels, model = torch.randn(2, 3, 24, 24), ConvNet.from_pretrained(folder)
    shrunk = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    found = {
        resolution: Teacher.load(folder, CLASSES, student(24, mean=PAPER[0], std=PAPER[1], resolution=resolution))
        for resolution in ("teacher", "student")
    }
    assert_close(found["teacher"](pixels), model(shrunk).logits)
    assert_close(found["student"](pixels), model(pixels).logits)


def test_a_transformer_at_the_students_resolution(tmp_path):
    model = build("with_teacher", small(num_labels=4, id2label=dict(enumerate(CLASSES))))
    name, pixels = str(saved(model, tmp_path)), torch.randn(2, 3, 24, 20)
    recipe = student((24, 20), mean=PAPER[0], std=PAPER[1], resolution="student")
    expected = model(pixels, interpolate_pos_encoding=True).logits
    assert_close(Teacher.load(name, CLASSES, recipe)(pixels), expected)


def test_a_transformer_of_one_size_is_refused_at_another():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=1)
    assert Teacher.of(model, CLASSES, student(24), labels=CLASSES, image_size=32).size == (32, 32)
    with raises_saying(
        ValueError,
        "VisionTransformer can't process the student's images of (3, 24, 24)",
        "set objective.resolution=teacher",
    ):
        Teacher.of(model, CLASSES, student(24, resolution="student"), labels=CLASSES)


def test_a_grey_image_is_repeated_for_three_channels(folder):
    raw = torch.rand(3, 1, 16, 16)
    found = Teacher.load(folder, CLASSES, student(mean=(0.2,), std=(0.3,)))(normal(raw, (0.2,), (0.3,)))
    expected = ConvNet.from_pretrained(folder)(normal(raw.repeat(1, 3, 1, 1), *PAPER)).logits
    assert_close(found, expected)


def test_grey_statistics_of_its_own_and_colour_for_a_grey_teacher(tmp_path):
    model = convnet(num_channels=1)
    processor = DeiTImageProcessor(size=16, crop_size=16, image_mean=[0.7], image_std=[0.4])
    name = str(saved(model, tmp_path, processor))
    raw = torch.rand(2, 1, 16, 16)
    found = Teacher.load(name, CLASSES, student(mean=(0.2,), std=(0.3,)))(normal(raw, (0.2,), (0.3,)))
    assert_close(found, model(normal(raw, (0.7,), (0.4,))).logits)
    with raises_saying(ValueError, name, "takes 1 channels, but the student's images have 3"):
        Teacher.load(name, CLASSES, student())


def test_it_is_always_in_evaluation_mode():
    module = convnet()
    pixels = torch.randn(5, 3, 16, 16)
    teacher = Teacher.of(module.train(), CLASSES, student(mean=PAPER[0], std=PAPER[1]), labels=CLASSES)
    parent = nn.ModuleDict({"teacher": module})
    statistics = [buffer.clone() for buffer in module.buffers()]
    first = teacher(pixels)
    parent.train()
    assert module.training
    assert torch.equal(teacher(pixels), first)
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), statistics, strict=True))
    assert_close(first, module.eval()(pixels).logits)


# ----------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("classes", [("dog", "ant", "cat", "bee"), ("dog", "bee"), ("cat",)])
def test_classes_are_matched_by_name(folder, classes):
    """Another order is permuted; of a teacher that knows more, only the data's classes are kept."""
    pixels = torch.randn(3, 3, 16, 16)
    straight = Teacher.load(folder, CLASSES, student())(pixels)
    found = Teacher.load(folder, classes, student())(pixels)
    assert torch.equal(found, straight[:, [CLASSES.index(name) for name in classes]])


@pytest.mark.parametrize(("classes", "missing"), [(("ant", "bee", "cow", "elk"), "cow"), ((*CLASSES, "eel"), "eel")])
def test_classes_it_does_not_know_are_refused(folder, classes, missing):
    with raises_saying(ValueError, folder, f"does not know the data's class {missing!r}", "choose a teacher"):
        Teacher.load(folder, classes, student())


def test_a_name_that_repeats_is_refused_where_the_data_has_it(tmp_path):
    name = str(saved(convnet(classes=("crane", "tench", "crane")), tmp_path))
    with raises_saying(ValueError, name, "gives the name 'crane' to 2 of its classes"):
        Teacher.load(name, ("crane", "tench"), student())
    assert Teacher.load(name, ("tench",), student())(torch.randn(2, 3, 16, 16)).shape == (2, 1)


class Bare(nn.Module):
    """Logits that show what came in: the mean of each channel, and of all."""

    def __init__(self, wrap=lambda logits: logits, **stated):
        super().__init__()
        self.wrap, self.seen = wrap, None
        for name, value in stated.items():
            setattr(self, name, value)

    def forward(self, pixels):
        self.seen = pixels
        return self.wrap(torch.cat([pixels.mean((2, 3)), pixels.mean((1, 2, 3))[:, None]], 1))


def test_a_bare_module_is_taken_to_be_like_the_student():
    pixels = torch.randn(2, 3, 16, 16)
    module = Bare()
    with pytest.warns(UserWarning, match=r"does not name its 4 outputs.* can't be checked"):
        teacher = Teacher.of(module, CLASSES, student())
    assert_close(teacher(pixels), module(pixels))
    with raises_saying(ValueError, "Bare has 4 outputs without names, but the data has 3 classes"):
        Teacher.of(Bare(), CLASSES[:3], student())


def test_a_module_states_what_it_wants():
    module = Bare(
        classes=["dog", "cat", "bee", "ant"], mean=torch.tensor([0.1, 0.2, 0.3]), std=(0.5, 0.6, 0.7), image_size=8
    )
    raw = torch.rand(2, 3, 16, 16)
    found = Teacher.of(module, CLASSES, student())(normal(raw, MEAN, STD))
    expected = F.interpolate(normal(raw, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), (8, 8), mode="bicubic", antialias=True)
    assert_close(module.seen, expected)
    assert_close(found, module(expected).flip(1))
    again = Teacher.of(module, CLASSES, student(), labels=CLASSES, mean=MEAN, std=STD, image_size=(16, 16))
    assert_close(again(normal(raw, MEAN, STD)), module(normal(raw, MEAN, STD)))


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: (logits, None), lambda logits: {"logits": logits}, lambda logits: SimpleNamespace(logits=logits)],
)
def test_every_form_of_output(wrap):
    pixels = torch.randn(2, 3, 16, 16)
    assert_close(Teacher.of(Bare(wrap), CLASSES, student(), labels=CLASSES)(pixels), Bare()(pixels))


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (Bare(lambda logits: logits[None]), ("with shape (1, 1, 4)", "choose a classifier")),
        (Bare(lambda logits: "cat"), ("can't process", "'str' object has no attribute 'logits'")),
        (Bare(classes=["ant", "bee"]), ("has 4 outputs and 2 class names",)),
        (Bare(classes="ant"), ("expected a list of names",)),
        (Bare(std=(0.1, 0.2)), ("states mean=", "one entry for each")),
    ],
)
def test_modules_that_are_no_teacher(module, parts):
    with raises_saying(ValueError, "teacher Bare", *parts):
        Teacher.of(module, CLASSES, student())


def test_an_objective_without_teacher():
    with raises_saying(ValueError, "recipe pupil can't use a teacher", "Supervised"):
        Teacher.of(
            Bare(), CLASSES, Recipe.from_dict({**student().to_dict(), "objective": {"kind_of": Supervised.__name__}})
        )


# ------------------------------------------------------------------------------------------------ FILE.py:FUNCTION


def test_a_function_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
import torch
from torch import nn

def plain():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    nn.init.constant_(model[1].bias, 3.0)
    nn.init.eye_(model[1].weight)
    model.classes, model.mean, model.std = ["dog", "cat", "bee", "ant"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    model.image_size = 2
    return model

def ready():
    from test_teacher import CLASSES, student
    from deit.train.teacher import Teacher
    return Teacher.of(plain(), CLASSES, student())

def number():
    return 7
""")
    raw = torch.rand(2, 3, 2, 2)
    recipe = student(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found = Teacher.load(f"{file}:plain", CLASSES, recipe)((raw - 0.5) / 0.5)
    assert_close(found, raw.flatten(1)[:, :4].flip(1) + 3)
    assert Teacher.load(f"{file}:ready", CLASSES, student()).classes == CLASSES
    for classes, other in ((CLASSES[:2], student()), (CLASSES, recipe)):
        with raises_saying(ValueError, file, "returned a Teacher for other classes"):
            Teacher.load(f"{file}:ready", classes, other)
    with raises_saying(ValueError, f"{file}:number returned int"):
        Teacher.load(f"{file}:number", CLASSES, recipe)
    with raises_saying(ValueError, "no function 'other'", "plain, ready, number"):
        Teacher.load(f"{file}:other", CLASSES, recipe)
    with raises_saying(ValueError, f"give {file}:FUNCTION"):
        Teacher.load(str(file), CLASSES, recipe)
    with raises_saying(FileNotFoundError, f"there is no file {tmp_path / 'none.py'}"):
        Teacher.load(f"{tmp_path / 'none.py'}:plain", CLASSES, recipe)


# ----------------------------------------------------------------------------------------------------------------- timm


def resnet(outputs, **options):
    timm = pytest.importorskip("timm")
    return lively(timm.create_model("resnet10t", num_classes=outputs, **options))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_from_a_weight_file(tmp_path, suffix):
    """Against timm with its own transform of the same image, which has the model's size."""
    from timm.data import create_transform, resolve_data_config

    model, path = resnet(4), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    levels = np.random.default_rng(0).integers(0, 256, (176, 176, 3), dtype=np.uint8)
    transform = create_transform(**{**resolve_data_config({}, model=model), "crop_pct": 1.0})
    expected = model(transform(Image.fromarray(levels))[None])
    with pytest.warns(UserWarning, match="does not name its 4 outputs"):
        teacher = Teacher.load(f"timm:resnet10t:{path}", CLASSES, student(176))
    found = teacher(normal(torch.from_numpy(levels).permute(2, 0, 1)[None] / 255, MEAN, STD))
    assert teacher.model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    assert expected.std() > 1


def test_timm_from_a_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = resnet(4)
    names = ["n4", "n3", "n2", "n1"]
    timm.models.save_for_hf(
        model,
        tmp_path,
        model_config={
            "label_names": names,
            "label_descriptions": dict(zip(names, reversed(CLASSES), strict=True)),
            "pretrained_cfg": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        },
        data_config={"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        safe_serialization=True,
    )
    raw = torch.rand(2, 3, 64, 64)
    expected = model(normal(raw, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))).detach().flip(1)
    for name in (f"timm:{tmp_path}", str(tmp_path)):
        for classes in (CLASSES, ("n1", "n2", "n3", "n4")):
            found = Teacher.load(name, classes, student(64))(normal(raw, MEAN, STD))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "model.safetensors").unlink()
    with raises_saying(FileNotFoundError, f"{tmp_path} holds no weights"):
        Teacher.load(f"timm:{tmp_path}", CLASSES, student(64))


def test_imagenet_names_of_timm(tmp_path):
    model, path = resnet(1000), tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    name, pixels = f"timm:resnet10t:{path}", torch.randn(2, 3, 64, 64)
    recipe = student(64, mean=PAPER[0], std=PAPER[1], resolution="student")
    expected = model(pixels).detach()[:, [1, 0, 9]]
    for classes in (
        ("n01443537", "n01440764", "n01518878"),
        ("goldfish, Carassius auratus", "tench, Tinca tinca", "ostrich, Struthio camelus"),
    ):
        torch.testing.assert_close(Teacher.load(name, classes, recipe)(pixels), expected, rtol=1e-4, atol=1e-4)
    with raises_saying(ValueError, "has 1000 outputs without names, but the data has 4 classes"):
        Teacher.load(name, CLASSES, recipe)
    with pytest.warns(UserWarning, match="does not name its 1000 outputs"):
        Teacher.load(name, [f"kind {i}" for i in range(1000)], recipe)


def test_a_published_timm_model(tmp_path, monkeypatch):
    """Its 1000 classes are ImageNet's, whatever the data's are called."""
    timm = pytest.importorskip("timm")
    model = resnet(1000)
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append((name, pretrained)) or model)
    teacher = Teacher.load("timm:resnet10t.c3_in1k", ("n01443537",), student(32))
    assert asked == [("resnet10t.c3_in1k", True)]
    assert teacher.size == (176, 176)
    assert teacher.mean == list(PAPER[0])
    with raises_saying(ValueError, "does not know the data's class 'kind 0'", "'n01440764'"):
        Teacher.load("timm:resnet10t", [f"kind {i}" for i in range(1000)], student(32))
    Teacher.load("timm:hf-hub:someone/something", ("n01443537",), student(32))
    assert asked[-1] == ("hf-hub:someone/something", True)


def test_what_timm_cannot_open(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    path = tmp_path / "weights.safetensors"
    with raises_saying(ValueError, "'no_such_net' is neither a timm model nor a folder"):
        Teacher.load("timm:no_such_net", CLASSES, student())
    with raises_saying(FileNotFoundError, f"there is no file {path}"):
        Teacher.load(f"timm:resnet10t:{path}", CLASSES, student())
    save_file({"a": torch.zeros(1)}, path)
    with raises_saying(CheckpointError, path, "has no fc.weight"):
        Teacher.load(f"timm:resnet10t:{path}", CLASSES, student())
    save_file({"fc.weight": torch.zeros(4, 8)}, path)
    with raises_saying(CheckpointError, path, "does not fit timm's resnet10t", "Missing key"):
        Teacher.load(f"timm:resnet10t:{path}", CLASSES, student())

    def offline(*_, **__):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with raises_saying(OSError, "timm:resnet10t could not be fetched (no route to host)", "timm:resnet10t:WEIGHT_FILE"):
        Teacher.load("timm:resnet10t", CLASSES, student())
    monkeypatch.setitem(sys.modules, "timm", None)
    with raises_saying(ImportError, 'pip install "deit[teachers]"'):
        Teacher.load("timm:resnet10t", CLASSES, student())


# ----------------------------------------------------------------------------------------------------------- identity


def test_fingerprint_is_of_the_content(tmp_path):
    model = convnet()
    one = Teacher.load(str(saved(model, tmp_path / "one")), CLASSES, student()).fingerprint()
    assert Teacher.load(str(saved(model, tmp_path / "two")), CLASSES, student()).fingerprint() == one
    same = {"labels": CLASSES, "mean": PAPER[0], "std": PAPER[1]}
    assert Teacher.of(model, CLASSES, student(), **same).fingerprint() == one
    others = {
        "mean": Teacher.of(model, CLASSES, student(), labels=CLASSES, std=PAPER[1]),
        "std": Teacher.of(model, CLASSES, student(), labels=CLASSES, mean=PAPER[0]),
        "size": Teacher.of(model, CLASSES, student(), **same, image_size=20),
        "order": Teacher.load(str(tmp_path / "one"), CLASSES[::-1], student()),
        "names": Teacher.of(model, "abcd", student(), **{**same, "labels": list("abcd")}),
        "resolution": Teacher.load(str(tmp_path / "one"), CLASSES, student(resolution="student")),
    }
    prints = {name: teacher.fingerprint() for name, teacher in others.items()} | {"": one}
    model.features[1].running_var[2] += 1e-6  # a buffer counts, too
    prints["weights"] = Teacher.load(str(saved(model, tmp_path / "two")), CLASSES, student()).fingerprint()
    assert len(set(prints.values())) == len(prints) == 8


# ------------------------------------------------------------------------------------------------------------- answers


def test_hard_answers_are_decisions():
    logits = torch.randn(50, 7).bfloat16()
    found = expand(condense(logits, Distilled(teacher="t")), logits.shape[1])
    assert found.dtype == torch.int64
    assert found.tolist() == logits.double().numpy().argmax(1).tolist()


@pytest.mark.parametrize("top_k", [None, 7, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_answers_stand_for_the_logits_at_any_temperature(temperature, top_k):
    logits = 5 * torch.randn(50, 7) + 100 * torch.randn(50, 1)
    found = expand(condense(logits, Distilled(teacher="t", kind="soft", top_k=top_k)), logits.shape[1])
    assert found.dtype == torch.float32
    assert_close(found.exp().sum(1), torch.ones(50))
    assert_close((found / temperature).softmax(1), (logits / temperature).softmax(1))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_most_likely_classes_are_kept_and_the_rest_is_spread(top_k):
    logits = 2 * torch.randn(40, 10)
    found = expand(condense(logits, Distilled(teacher="t", kind="soft", top_k=top_k)), logits.shape[1])
    exact = np.exp(logits.double().numpy())
    exact /= exact.sum(1, keepdims=True)
    for row, probability in zip(found.double().exp().numpy(), exact, strict=True):
        best = np.argsort(-probability)[:top_k]
        expected = np.empty(10)
        kept = probability[best].astype(np.float16).astype(np.float64)
        expected[:] = (1 - kept.sum()) / (10 - top_k)
        expected[best] = kept
        np.testing.assert_allclose(row, expected, rtol=1e-3)  # float16 of the last digit of a softmax
        assert abs(row.sum() - 1) < 1e-6


def test_certain_answers_stay_finite():
    logits = torch.tensor([[200.0, 0, -200, 0], [-500, 500, -500, -500]])
    found = expand(condense(logits, Distilled(teacher="t", kind="soft", top_k=2)), logits.shape[1])
    assert found.isfinite().all()
    assert found.argmax(1).tolist() == [0, 1]
    assert_close(found.exp().sum(1), torch.ones(2))


# ------------------------------------------------------------------------------------------------ before the first step


class Knows(nn.Module):
    """Tells the class by the mean of the green channel, and is wrong by `off` classes."""

    classes, mean, std, image_size = CLASSES, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (16, 16)

    def __init__(self, off=0):
        super().__init__()
        self.off = off

    def forward(self, pixels):
        level = (pixels[:, 1].mean((1, 2)) * 4).floor().long().clamp(0, 3)
        return F.one_hot((level + self.off) % 4, 4).float()


def greens(root, count):
    """Images of plain green, dark to light by class; the first of each class is damaged."""
    files = []
    for label in range(4):
        for i in range(count):
            path = root / f"{label}-{i}.png"
            if i:
                Image.new("RGB", (20, 20), (0, 32 + 64 * label, 0)).save(path)
            else:
                path.write_bytes(b"no image")
            files.append((path, label))
    return Split(tuple(path for path, _ in files), tuple(label for _, label in files), CLASSES)


def test_a_teacher_is_introduced(tmp_path):
    recipe, split = student(), greens(tmp_path, 4)
    teacher = Teacher.of(Knows(), CLASSES, recipe, name="greens")
    who, right = teacher.introduction(recipe, split, "validation", torch.device("cpu"))
    assert who == "teacher greens: 4 classes; images of 16 x 16 pixels, mean 0, 0, 0, std 1, 1, 1"
    assert right.startswith("teacher greens: 1.000 of 12 validation images right (0.758 to 1.000 at 95 %)")
    teacher = Teacher.of(Knows(1), CLASSES, recipe, name="greens")
    _, right, warning = teacher.introduction(recipe, split, "validation", torch.device("cpu"))
    assert "0.000 of 12" in right
    assert "no better than the answer that never looks (0.250)" in warning


class Learned(Knows):
    """A student that has learned before."""

    def forward(self, pixels):
        return ImageClassifierOutput(logits=super().forward(pixels))


def test_a_teacher_below_its_student_is_a_warning(tmp_path):
    recipe, split = student(mean=Knows.mean, std=Knows.std), greens(tmp_path, 4)
    knows, wrong = (Teacher.of(Knows(shift), CLASSES, recipe, name="greens") for shift in (0, 1))
    assert len(list(knows.introduction(recipe, split, "validation", torch.device("cpu"), Learned(1)))) == 2
    assert len(list(knows.introduction(recipe, split, "validation", torch.device("cpu"), Learned()))) == 2
    *_, warning = wrong.introduction(recipe, split, "validation", torch.device("cpu"), Learned())
    assert "the student is right on 1.000 of these images before it begins, more than its teacher" in warning


def test_what_is_assumed_of_a_teacher_is_said(folder):
    recipe = student(mean=PAPER[0], std=PAPER[1])
    bare = Teacher.of(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)), [*"abcdef"], recipe, labels=[*"abcdef"])
    assert str(bare).endswith(
        "6 classes; images of 16 x 16 pixels, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225; assumed from the "
        "student, because nobody states them: mean, std, image_size"
    )
    stated = Teacher.load(folder, CLASSES[:2], student())
    assert "4 classes, of which 2 are the data's; images of" in str(stated)
    assert "assumed from" not in str(stated)


def test_few_of_many_images_are_judged(tmp_path, monkeypatch):
    monkeypatch.setattr("deit.train.teacher._JUDGED", 8)
    recipe, split = student(), greens(tmp_path, 30)
    teacher = Teacher.of(Knows(), CLASSES, recipe, name="greens")
    _, right = teacher.introduction(recipe, split, "validation", torch.device("cpu"))
    assert "1.000 of 7 validation images" in right  # evenly spread, the first of them is damaged
