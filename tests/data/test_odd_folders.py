"""`deit train` on folders as people have them: it trains, or says in one sentence what to do."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.runs import RECIPES, photos
from torchvision.transforms import v2

from deit.cli import main
from deit.config import ConvNetConfig
from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.data.folders import Split, read_data
from deit.evaluate.models import evaluate
from deit.model.load import load_model
from deit.recipe import SGD, Augment, Compute, Cosine, Data, Recipe, ResizedCrop, SimpleCrop, Supervised, steps

CONVNET = Recipe(
    name="convnet",
    model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
    data=Data(batch=8),
    objective=Supervised(),
    optim=SGD(lr=1e-2, per_images=8),
    schedule=Cosine(total=steps(4)),
    compute=Compute(precision="float32", workers=0),
)
GREY = replace(CONVNET, model=CONVNET.model.replace(num_channels=1), data=Data(batch=8, mean=(0.4,), std=(0.2,)))
MORE_RECIPES = (
    "from dataclasses import replace\n"
    + RECIPES
    + """

def grey():
    return replace(convnet(), model=convnet().model.replace(num_channels=1),
                   data=Data(batch=8, mean=(0.4,), std=(0.2,)))


def masked():
    return replace(student(), objective=MaskedImage(unit=8), augment=Augment(crop=ResizedCrop()), schedule=Cosine(
        total=steps(4)))
"""
)


class Command:
    """`deit train` in a run folder of its own; what it printed and wrote."""

    def __init__(self, folder, capfd):  # capfd writes names that are no UTF-8, as a terminal does
        self.folder, self.capfd, self.runs = folder, capfd, 0
        folder.mkdir()
        (folder / "recipes.py").write_text(MORE_RECIPES)

    def __call__(self, data, recipe="convnet", *settings):
        self.runs += 1
        self.out = self.folder / f"run{self.runs}"
        status = main(
            [
                "train",
                f"{self.folder / 'recipes.py'}:{recipe}",
                "--data",
                str(data),
                "--out",
                str(self.out),
                "--device",
                "cpu",
                *[part for setting in settings for part in ("--set", setting)],
            ]
        )
        self.shown = self.capfd.readouterr()
        return status

    def trains(self, *given):
        assert self(*given) == 0, self.shown.err
        self.rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in self.rows)
        assert (self.out / "model" / "model.safetensors").exists()
        return load_model(self.out / "model")

    def assert_refused(self, *given, saying):
        assert self(*given) == 1
        [sentence] = self.shown.err.splitlines()
        assert sentence.startswith("deit train: ")
        assert [str(part) for part in saying if str(part) not in sentence] == [], sentence
        assert self.shown.out == ""


@pytest.fixture
def command(tmp_path, capfd):
    return Command(tmp_path / "command", capfd)


@pytest.fixture
def data(tmp_path):
    """21 training and 9 validation images of three classes."""
    return photos(photos(tmp_path / "data"), split="val", count=3)


def save(path, colour=(200, 100, 50), size=(12, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def names(split):
    return [path.name for path in split.files]


def found_in(root, **options):
    return read_data(root, **{"holdout": 0.1, "seed": 0, **options})


def training_view(path, recipe=CONVNET, **augment):
    """(channels, height, width) of one image, normalised."""
    recipe = replace(recipe, data=replace(recipe.data, batch=1), augment=Augment(**augment))
    return next(TrainingBatches(Split((Path(path),), (0,), ("a",)), recipe).from_step(0)).pixels[0]


def evaluation_view(path, recipe=CONVNET):
    return next(iter(EvaluationBatches(Split((Path(path),), (0,), ("a",)), processor_for(recipe), 1))).pixels[0]


def by_torchvision(pixels):
    """What evaluation makes of (height, width, 3) uint8 pixels."""
    data = CONVNET.data
    resized = v2.Compose([v2.Resize(int(16 / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])
    image = v2.functional.pil_to_tensor(resized(Image.fromarray(np.asarray(pixels, np.uint8))))
    return v2.functional.normalize(image / 255, data.mean, data.std)


def levels(one, other):
    """Mean and largest difference of two normalised images, in grey levels of 255."""
    std = torch.tensor(CONVNET.data.std).view(3, 1, 1)
    difference = ((one - other) * std * 255).abs()
    return difference.mean().item(), difference.max().item()


# -------------------------------------------------------------------------------------------------- files that are odd


def many(root, suffix=".jpg"):
    """120 training images, red for class a and blue for b, and four to validate."""
    for split, count in (("train", 60), ("val", 2)):
        for name, colour in (("a", (220, 30, 30)), ("b", (30, 30, 220))):
            for i in range(count):
                save(root / split / name / f"{i:02}{suffix}", colour)
    return root


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def write_text(path):
    path.write_text("404: not found")


def write_nothing(path):
    path.write_bytes(b"")


def dead_link(path):
    path.unlink()
    path.symlink_to(path.parent / "moved")


BROKEN = [
    ("[red]holi day[0].jpg", cut, "damaged or cut short"),
    ("page.jpg", write_text, "not an image"),
    ("empty.png", write_nothing, "is empty"),
    ("link.png", dead_link, "does not exist"),
]


@pytest.mark.parametrize(("name", "breaks", "reason"), BROKEN, ids=["cut", "text", "empty", "link"])
def test_one_bad_image_of_many_is_told_counted_and_replaced(name, breaks, reason, tmp_path, command):
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / name, (220, 30, 30), (64, 64))
    breaks(bad)
    command.trains(root, "convnet", "schedule.total=epochs(2)", "evaluate=epochs(1)")
    assert [row["bad_images"] for row in command.rows][-1] == 1
    [told] = [line for line in command.shown.err.splitlines() if str(bad) in line]
    assert reason in told
    assert "nother image stands in" in told
    assert "Traceback" not in command.shown.err


def test_what_stands_in_is_another_image_with_its_own_label(tmp_path):
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / "bad.jpg", (0, 255, 0), (64, 64))
    cut(bad)
    split, _ = found_in(root)
    batches = TrainingBatches(split, CONVNET)
    index, seen, stream = split.files.index(bad), [], batches.from_step(0)
    for step in range(121):  # eight epochs of 121 views
        batch = next(stream)
        std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CONVNET.data.std, CONVNET.data.mean))
        colours = (batch.pixels * std + mean).mean((2, 3))
        assert torch.equal(batch.labels, (colours[:, 2] > colours[:, 0]).long())
        assert (colours[:, 1] < 0.2).all()
        wanted = batches.keys(step)[:, 1].tolist()
        assert {file for file, _ in batch.faults} == ({str(bad)} if index in wanted else set())
        seen += [int(batch.labels[wanted.index(index)])] if index in wanted else []
    assert len(seen) == 8
    assert set(seen) == {0, 1}  # drawn from all classes


@pytest.mark.parametrize(("name", "breaks", "reason"), BROKEN, ids=["cut", "text", "empty", "link"])
def test_one_bad_image_of_ten_is_refused(name, breaks, reason, tmp_path, command):
    root = photos(photos(tmp_path / "data", count=5, classes="ab"), split="val", count=1, classes="ab")
    (root / "train" / "a" / "0.png").unlink()
    bad = save(root / "train" / "a" / name, (200, 0, 0), (64, 64))
    breaks(bad)
    command.assert_refused(root, saying=["1 of 10 images can't be read", bad, reason, "Replace or remove"])


def test_a_bad_image_whose_name_is_no_utf8(tmp_path, command):
    """Latin-1 names come out of old archives."""
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / os.fsdecode(b"caf\xe9.jpg"), (220, 30, 30), (64, 64))
    cut(bad)
    command.trains(root, "convnet", "schedule.total=epochs(1)")
    assert command.rows[-1]["bad_images"] == 1


def test_other_files_are_passed_over(data, command):
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "notes.txt",
        "labels.csv",
        "clip.mp4",
        "scan.pdf",
        "README",
        "photo.jpg.part",
        ".hidden.png",
        "._0.png",
    ):
        for folder in (data, data / "train", data / "train" / "a", data / "val" / "b"):
            (folder / name).write_bytes(b"no image")
    train, val = found_in(data)
    assert len(train) == 21
    assert len(val) == 9
    assert set(names(train)) == {f"{i}.png" for i in range(7)}
    command.trains(data)
    assert command.rows[-1]["bad_images"] == 0


def test_upper_case_suffixes(tmp_path, command):
    suffixes = (".JPG", ".Jpeg", ".PNG", ".BMP", ".WEBP", ".TIFF", ".TIF", ".GIF")
    for name in "ab":
        for i, suffix in enumerate(suffixes):
            save(tmp_path / "data" / "train" / name / f"{i}{suffix}")
    save(tmp_path / "data" / "val" / "a" / "0.JPG")
    train, val = found_in(tmp_path / "data")
    assert [path.suffix for path in train.files] == 2 * list(suffixes)
    assert names(val) == ["0.JPG"]
    command.trains(tmp_path / "data")


def test_two_identical_images(tmp_path, command):
    for name in "ab":
        save(tmp_path / "data" / name / "0.png")
        save(tmp_path / "data" / name / "copy of 0.png")
    train, val = found_in(tmp_path / "data")
    assert len(train) == len(val) == 2
    command.trains(tmp_path / "data")


# ----------------------------------------------------------------------------------------------------- pixels that are


RAMPS = (
    np.stack(
        np.broadcast_arrays(np.linspace(20, 235, 30)[:, None], np.linspace(220, 40, 48), np.linspace(60, 180, 48)),
        axis=-1,
    )
    .round()
    .astype(np.uint8)
)
"""(30, 48, 3), smooth, and without any symmetry."""
FOUR = np.array([[250, 10, 30], [20, 200, 90], [40, 60, 240], [128, 128, 128]], np.uint8)
AREAS = np.arange(30 * 48).reshape(30, 48) // 211 % 4


def with_alpha(path):
    alpha = np.full((30, 48, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([RAMPS, alpha], axis=-1)).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), RAMPS, 0


def with_palette(path, transparency):
    image = Image.fromarray(AREAS.astype(np.uint8), "L")
    image.putpalette(FOUR.tobytes())
    image.save(path.with_suffix(".png"), transparency=transparency)
    return path.with_suffix(".png"), FOUR[AREAS], 0


def in_cmyk(path):
    Image.fromarray(RAMPS).convert("CMYK").save(path.with_suffix(".jpg"), quality=98)
    return path.with_suffix(".jpg"), RAMPS, 4


def in_16_bits(path):
    values = np.linspace(0, 65535, 30 * 48).reshape(30, 48).astype(np.uint16)
    Image.fromarray(values).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), np.stack([np.rint(values / 257)] * 3, -1), 0


def in_1_bit(path):
    Image.fromarray(AREAS > 1).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), np.stack([255 * (AREAS > 1)] * 3, -1), 0


def animated(path):
    frames = [Image.fromarray(FOUR[(AREAS + i) % 4]).quantize(4, dither=Image.Dither.NONE) for i in range(3)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    return path.with_suffix(".gif"), FOUR[AREAS], 0


KINDS = {
    "alpha": with_alpha,
    "palette": lambda path: with_palette(path, 2),
    "cmyk": in_cmyk,
    "16 bits": in_16_bits,
    "palette of alphas": lambda path: with_palette(path, b"\0\x80\xff\xff"),
    "1 bit": in_1_bit,
    "gif": animated,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixels_is_seen_as_eight_bit_colours(kind, tmp_path):
    path, colours, noise = KINDS[kind](tmp_path / "image")
    expected = by_torchvision(colours)
    for found in (training_view(path), evaluation_view(path)):
        assert levels(found, expected)[1] <= noise + 1e-3
    plain = tmp_path / "plain.png"
    Image.fromarray(colours.astype(np.uint8)).save(plain)
    assert levels(training_view(path, crop=ResizedCrop()), training_view(plain, crop=ResizedCrop()))[1] <= noise + 1e-3


def test_a_folder_of_all_kinds_trains(tmp_path, command):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i, make in enumerate(KINDS.values()):
                make(root / split / name / str(i))
    command.trains(root, "student", "schedule.total=steps(6)")
    assert command.rows[-1]["bad_images"] == 0
    assert len(found_in(root)[1]) == 2 * len(KINDS)


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation, and how the camera holds the upright photo in its file."""


@pytest.mark.parametrize("size", [(48, 30), (960, 600)], ids=["small", "large"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_photo_turned_by_its_exif_entry_is_seen_upright(orientation, size, tmp_path):
    """The small photo is kept in memory whole; of the large one, a part is decoded at a smaller scale."""
    upright = Image.fromarray(RAMPS).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.save(tmp_path / "upright.jpg", quality=95)
    upright.transpose(TURNED[orientation]).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright.transpose(TURNED[orientation]).save(tmp_path / "ignored.jpg", quality=95)
    for crop in (None, ResizedCrop(scale=(0.3, 1.0)), SimpleCrop()):
        expected, found, wrong = (
            training_view(tmp_path / f"{name}.jpg", crop=crop) for name in ("upright", "turned", "ignored")
        )
        mean, most = levels(found, expected)
        assert mean < 1
        assert most < 6
        assert levels(wrong, expected)[0] > 5
    assert levels(evaluation_view(tmp_path / "turned.jpg"), by_torchvision(upright))[1] < 6


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_sizes(size, tmp_path, command):
    """Of the long ones, which grow brighter along the way, evaluation sees the middle."""
    ramp = np.linspace(0, 255, max(size)).round() if max(size) > 1 else np.array([127.0])
    pixels = np.stack([ramp, ramp * 0 + 50, 255 - ramp], -1).astype(np.uint8).reshape(size[1], size[0], 3)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / "0.png")
    path = tmp_path / "data" / "train" / "a" / "0.png"
    middle = v2.functional.normalize(
        torch.tensor([127.5, 50, 127.5]).view(3, 1, 1).expand(3, 16, 16) / 255, CONVNET.data.mean, CONVNET.data.std
    )
    for found in (training_view(path), evaluation_view(path)):
        assert levels(found, middle)[1] <= 1.5
    for crop in ("None", "ResizedCrop()", "SimpleCrop()"):
        command.trains(tmp_path / "data", "convnet", f"augment.crop={crop}", "schedule.total=steps(2)")
        assert command.rows[-1]["bad_images"] == 0


def test_a_grey_recipe_on_colour_photos(data, command, tmp_path):
    path = tmp_path / "ramps.png"
    Image.fromarray(RAMPS).save(path)
    grey = (RAMPS @ np.array([0.299, 0.587, 0.114])).round()  # ITU-R BT.601, as Pillow's mode L
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CONVNET.data.std, CONVNET.data.mean))
    expected = ((by_torchvision(np.stack([grey] * 3, -1)) * std + mean)[:1] - 0.4) / 0.2
    for found in (training_view(path, GREY), evaluation_view(path, GREY)):
        assert found.shape == (1, 16, 16)
        torch.testing.assert_close(found, expected, atol=2 / 255 / 0.2, rtol=0)
    coloured, found = (training_view(path, recipe, crop=ResizedCrop()) for recipe in (CONVNET, GREY))
    expected = torch.einsum("chw,c->hw", coloured * std + mean, torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(found[0], (expected - 0.4) / 0.2, atol=1 / 255 / 0.2, rtol=0)
    model = command.trains(data, "grey")
    assert model.features[0].weight.shape[1] == 1
    command.trains(data, "grey", "augment=Augment(crop=ResizedCrop(),policy=RandAugment(),erase=Erase())")


# ------------------------------------------------------------------------------------------------- classes that are odd


def test_a_class_folder_without_images_is_refused(data, command):
    (data / "train" / "empty").mkdir()
    (data / "train" / "empty" / "notes.txt").write_text("later")
    command.assert_refused(
        data, saying=[data / "train" / "empty", "has no images", "expected files *{.bmp", "or remove the folder"]
    )


def test_a_train_folder_without_images_is_refused(data, command):
    for path in (data / "train").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    command.assert_refused(data, saying=[data / "train" / "a", "has no images", "expected", ".png"])
    (data / "train").rename(data / "photos")
    (data / "train").mkdir()
    command.assert_refused(data, saying=[data / "train", "has no images", f"expected {data / 'train'}/CLASS/*", ".png"])


def test_a_class_that_validation_lacks(data, command):
    """The score is over the images that are there, and the model keeps all classes."""
    for path in (data / "val" / "b").iterdir():
        path.unlink()
    command.assert_refused(data, saying=[data / "val" / "b", "has no images", "or remove the folder"])
    (data / "val" / "b").rmdir()
    train, val = found_in(data)
    assert train.classes == val.classes == ("a", "b", "c")
    assert val.labels == (0, 0, 0, 2, 2, 2)
    model = command.trains(data)
    assert list(model.config.id2label.values()) == ["a", "b", "c"]
    accuracy = evaluate(model, EvaluationBatches(val, processor_for(CONVNET), 6))["fused"]
    assert accuracy.total == 6
    assert accuracy.value == max(row["val_accuracy"] for row in command.rows if "val_accuracy" in row)


def test_a_class_that_training_lacks_is_refused(data, command):
    save(data / "val" / "zebra" / "0.png")
    command.assert_refused(data, saying=[data / "val", "'zebra'", "it knows a, b, c", "rename or remove"])


def test_the_refusal_of_a_class_among_many_stays_short(data):
    for i in range(30):
        save(data / "train" / f"class {i:02}" / "0.png")
    save(data / "val" / "zebra" / "0.png")
    with raises_saying(ValueError, "'zebra'", "it knows a, b, c, class 00, ", "class 06 and others"):
        found_in(data)


def test_a_single_class_is_refused(tmp_path, command):
    root = photos(photos(tmp_path / "data", classes="a"), split="val", classes="a")
    command.assert_refused(root, saying=[root / "train", "one class, 'a'", "needs two", "add a folder"])
    command.assert_refused(root / "train", saying=[root / "train", "one class, 'a'", "needs two", "add a folder"])


def test_three_images_in_all(tmp_path, command):
    """With a validation folder all are trained on, in batches of eight; without, one of the two is held out."""
    root = tmp_path / "data"
    for name in ("a/0", "a/1", "b/0"):
        save(root / "train" / f"{name}.png")
    train, val = found_in(root)
    assert train.labels == (0, 1)
    assert val.labels == (0,)
    assert {*train.files, *val.files} == set((root / "train").glob("*/*"))
    command.trains(root)
    save(root / "val" / "a" / "0.png")
    train, val = found_in(root)
    assert (len(train), len(val)) == (3, 1)
    command.trains(root)
    assert command.rows[-1]["images"] == 8 * 20
    assert command.rows[-1]["epoch"] == pytest.approx(160 / 3)


def test_one_image_of_each_class_can_not_be_held_out(tmp_path, command):
    for name in "ab":
        save(tmp_path / "data" / "train" / name / "0.png")
    command.assert_refused(
        tmp_path / "data", saying=["nothing to validate on", tmp_path / "data" / "train", "add a folder val"]
    )


def test_images_beside_class_folders_are_refused(data, command):
    save(data / "train" / "stray.JPG")
    command.assert_refused(data, saying=[data / "train" / "stray.JPG", "is in no class folder", "move"])
    (data / "train" / "stray.JPG").rename(data / "val" / "stray.JPG")
    command.assert_refused(data, saying=[data / "val" / "stray.JPG", "is in no class folder", "move"])


def test_images_without_classes_are_refused(tmp_path, command):
    for i in range(3):
        save(tmp_path / "data" / f"{i}.png")
    command.assert_refused(
        tmp_path / "data",
        saying=[tmp_path / "data" / "0.png", "and 2 more images", "move", tmp_path / "data" / "CLASS"],
    )


# ------------------------------------------------------------------------------------------------ folders that are odd


@pytest.mark.parametrize("train", ["train", "."])
def test_without_val_a_share_of_every_class_is_held_out(train, tmp_path, monkeypatch):
    counts = {"a": 40, "b": 6, "c": 2, "d": 1}
    for name, count in counts.items():
        for i in range(count):
            save(tmp_path / train / name / f"{name}{i}.png", size=(2, 2))
    save(tmp_path / "test" / "a" / "t.png")
    save(tmp_path / "test" / "unheard" / "t.png")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(Path(place)) or scandir(place))
    kept, held = found_in(tmp_path, seed=3)
    assert tmp_path / train / "a" in listed
    assert not [path for path in listed if "test" in path.relative_to(tmp_path).parts]
    assert kept.classes == held.classes == tuple("abcd")
    assert [held.labels.count(i) for i in range(4)] == [4, 1, 1, 0]  # a tenth, one at least, never the last
    assert [kept.labels.count(i) for i in range(4)] == [36, 5, 1, 1]
    assert not set(kept.files) & set(held.files)
    assert {*kept.files, *held.files} == {path for path in tmp_path.rglob("*.png") if path.name != "t.png"}
    for split in (kept, held):
        assert all(path.name[0] == split.classes[label] for path, label in zip(split.files, split.labels, strict=True))
    assert found_in(tmp_path, seed=3) == (kept, held)
    assert set(found_in(tmp_path, seed=4)[1].files) != set(held.files)
    assert len(found_in(tmp_path, holdout=0.5)[1]) == 20 + 3 + 1
    with raises_saying(ValueError, "nothing to validate on", "data.holdout is 0", "set data.holdout"):
        found_in(tmp_path, holdout=0.0)


def test_classes_directly_in_the_root(data, command):
    (data / "train").rename(data.parent / "flat")
    (data / "val").rename(data.parent / "flat" / "test")
    train, val = found_in(data.parent / "flat")
    assert train.classes == ("a", "b", "c")
    assert (len(train), len(val)) == (18, 3)
    model = command.trains(data.parent / "flat")
    assert list(model.config.id2label.values()) == ["a", "b", "c"]


@pytest.mark.parametrize("recipe", ["convnet", "masked"])
@pytest.mark.parametrize("spelt", [("Train", "val"), ("TRAIN", "VAL"), ("train", "Validation"), (".", "Val")])
def test_split_folders_in_upper_case_are_refused(spelt, recipe, data, command):
    """They would be two classes, or not be looked at."""
    for name, other in zip(("train", "val"), spelt, strict=True):
        if other == ".":
            for path in (data / name).iterdir():
                path.rename(data / path.name)
            (data / name).rmdir()
        elif name != other:
            (data / name).rename(data / "aside")
            (data / "aside").rename(data / other)
    if spelt == ("Train", "val"):
        command.assert_refused(data, recipe, saying=[data, "no folder train", f"expected {data}/train/CLASS/IMAGE"])
    else:
        first = min(name for name in spelt if name.lower() != name)
        command.assert_refused(data, recipe, saying=[data / first, f"rename it to {first.lower()}"])


def test_a_test_folder_in_upper_case_beside_train_is_left_alone(data, command):
    photos(data, split="Test", classes="xyz", count=1)
    assert [len(split) for split in found_in(data)] == [21, 9]


@pytest.mark.parametrize("split", ["test", "val"])
def test_without_training_images_it_is_refused(split, tmp_path, command):
    root = photos(tmp_path / "data", split=split)
    command.assert_refused(root, saying=[root, "no folder train", f"expected {root}/train/CLASS/IMAGE files"])


def test_a_root_that_is_empty_missing_or_a_file(tmp_path, command):
    (tmp_path / "empty").mkdir()
    command.assert_refused(tmp_path / "empty", saying=[tmp_path / "empty", "no folder train", "CLASS/IMAGE"])
    for place in (tmp_path / "nowhere", save(tmp_path / "photo.jpg")):
        command.assert_refused(place, saying=[f"{place} is not a folder", "expected one with"])


def test_nested_hidden_and_linked_folders(data, command, tmp_path):
    """A class is all that lies below its folder; a link that leads back up is not gone round in."""
    for place in ("2021/spring/deep.png", ".thumbnails/hidden.png", "2021/.cache/hidden.png", "folder.jpg/inside.png"):
        save(data / "train" / "a" / place)
    save(data / "train" / ".ipynb_checkpoints" / "hidden.png")
    (data / "train" / "a" / "2021" / "back").symlink_to(data / "train" / "a", target_is_directory=True)
    save(tmp_path / "more" / "linked.png")
    (data / "train" / "a" / "more").symlink_to(tmp_path / "more", target_is_directory=True)
    (data / "train" / "b" / "itself").symlink_to(".", target_is_directory=True)
    (data / "train" / "c").rename(tmp_path / "elsewhere")
    (data / "train" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    train, _ = found_in(data)
    assert train.classes == ("a", "b", "c")
    numbered = [f"{i}.png" for i in range(7)]
    assert sorted(names(train)) == sorted([*numbered * 3, "deep.png", "inside.png", "linked.png"])
    assert train.labels == (0,) * 10 + (1,) * 7 + (2,) * 7
    command.trains(data)


def test_a_class_folder_without_permission_is_refused(data, command, monkeypatch):
    closed = data / "train" / "b"
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # to root every folder is open
        scandir = os.scandir

        def refused(place):
            if Path(place) == closed:
                raise PermissionError(13, "Permission denied", str(place))
            return scandir(place)

        monkeypatch.setattr(os, "scandir", refused)
    try:
        command.assert_refused(data, saying=[f"{closed} can't be read", "Permission denied", "check its permissions"])
    finally:
        closed.chmod(0o755)


ODD_NAMES = [
    " leading",
    "Großes Café",
    "[red]x[bold]",
    "a;b&'c\"$(d)",
    "dog (1) [2021] 50% #3 {x}",
    "x" * 200,
    "~",
    "猫 🐈",
    os.fsdecode(b"latin-1 caf\xe9"),
]


def test_odd_names(tmp_path, command):
    root = tmp_path / "my photos [2021] é"
    for name in ODD_NAMES:
        for i, stem in enumerate((name, "0")):
            save(root / "train" / name / f"{stem}.png", (25 * ODD_NAMES.index(name), 100 * i, 0))
        save(root / "val" / name / "0.png")
    train, val = found_in(root)
    assert set(train.classes) == set(ODD_NAMES)
    assert [path.parent.name for path in train.files] == [train.classes[label] for label in train.labels]
    assert (len(train), len(val)) == (18, 9)
    model = command.trains(root)
    assert list(model.config.id2label.values()) == sorted(ODD_NAMES)


# --------------------------------------------------------------------------------------- masked images, and validation


@pytest.mark.parametrize("train", ["train", "."])
def test_masked_images_from_folders_of_any_depth(train, tmp_path, command):
    root, images = tmp_path / "data", 0
    for place in (".", "2020", "2021/05", "2021/06/raw", "test prints"):
        for i in range(4):
            save(root / train / place / f"{i}.png", (60 * i, 100, 50))
            images += 1
    for place in ("test", "test/deep", ".thumbnails"):
        save(root / place / "unseen.png")
    kept, held = found_in(root, labelled=False)
    assert (len(kept), len(held)) == (images - 2, 2)
    assert kept.classes == ("image",)
    assert not {"unseen.png"} & {*names(kept), *names(held)}
    assert not set(kept.files) & set(held.files)
    command.trains(root, "masked")
    assert re.search(r"minus the loss -\d+\.\d+ on 2 validation images", command.shown.out)
    if train == "train":
        photos(root, split="val", count=1)
        kept, held = found_in(root, labelled=False)
        assert (len(kept), len(held)) == (images, 3)


def test_masked_images_without_images_are_refused(tmp_path, command):
    save(tmp_path / "data" / "test" / "0.png")
    (tmp_path / "data" / "notes").mkdir()
    command.assert_refused(tmp_path / "data", "masked", saying=[tmp_path / "data", "has no images", ".png"])
    save(tmp_path / "data" / "only.png")
    command.assert_refused(
        tmp_path / "data", "masked", saying=["nothing to validate on", tmp_path / "data", "add a folder val"]
    )


def test_a_bad_validation_image_is_told_once_and_not_counted(tmp_path, command):
    root = photos(photos(tmp_path / "data", classes="ab"), split="val", count=60, classes="ab")
    bad = root / "val" / "b" / "17.png"
    cut(bad)
    model = command.trains(root)
    assert len([row for row in command.rows if "val_accuracy" in row]) == 2
    [told] = [line for line in command.shown.err.splitlines() if str(bad) in line]
    assert "damaged or cut short" in told
    assert "evaluation leaves it out" in told
    bad.unlink()
    accuracy = evaluate(model, EvaluationBatches(found_in(root)[1], processor_for(CONVNET), 50))["fused"]
    assert accuracy.total == 119
    assert accuracy.value == max(row["val_accuracy"] for row in command.rows if "val_accuracy" in row)


def test_too_many_bad_validation_images_are_refused(data, command):
    bad = data / "val" / "b" / "0.png"
    write_nothing(bad)
    assert command(data) == 1
    last = command.shown.err.splitlines()[-1]
    assert last.startswith("deit train: 1 of 9 images can't be read")
    assert str(bad) in last
    assert "Replace or remove" in last
    assert "Traceback" not in command.shown.err
