"""A cache of labels is the teacher itself, bit by bit; whatever differs, is missing or damaged is named."""

import dataclasses
import io
import json
import math
import signal
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import small
from support.runs import small_recipe

from deit import files
from deit.data.batches import BadImages, TrainingBatches, processor_for
from deit.data.folders import Split, fingerprint
from deit.files import CheckpointError
from deit.recipe import Augment, Compute, Data, Distilled, Erase, Mix, ResizedCrop, Supervised, override
from deit.train import labels as teaching
from deit.train.labels import LabelCache, teach, views
from deit.train.teacher import Teacher, condense, expand

CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def split(tmp_path):
    return images(tmp_path / "data", 18)


def images(folder, count):
    """12x12 noise."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    files = tuple(folder / f"{i:03}.png" for i in range(count))
    for file in files:
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    return Split(files, tuple(i % len(CLASSES) for i in range(count)), CLASSES)


def make_teacher(file, seed=0):
    """Looks at differences between 4x4 regions, so that its decisions differ; of another image size, normalisation and
    order of classes."""
    file.write_text(f"""
import torch
from torch import nn

def make():
    torch.manual_seed({seed})
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5, bias=False))
    weight = model[2].weight.data.view(5, 3, 16)
    weight -= weight.mean(2, keepdim=True)
    model.classes, model.mean, model.std, model.image_size = {CLASSES[::-1]}, (0.4, 0.5, 0.6), (0.1, 0.1, 0.1), 12
    return model
""")
    return f"{file}:make"


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "teacher.py")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(teaching, "PART_BYTES", 100)


def pupil(teacher, *settings, **objective):
    recipe = small_recipe(
        Distilled(teacher=teacher, **objective),
        name="pupil",
        model=small(image_size=8, num_labels=5),
        data=Data(batch=4, mean=(0.5, 0.4, 0.3)),
        augment=Augment(crop=ResizedCrop(), flip=0.5, erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0)),
        compute=Compute(precision="float32", accumulate=2, workers=0),
    )
    return override(recipe, settings)


def run(recipe, split, out, count=2, **options):
    """Makes the cache; returns what was said, without the introduction of the teacher."""
    said = io.StringIO()
    teach(recipe, split, out, epochs=count, device="cpu", console=Console(file=said, width=1000), **options)
    return "".join(line for line in said.getvalue().splitlines(True) if not line.startswith(("teacher ", "warning: ")))


def on_the_way(recipe, split, steps, count):
    """Positions and what the teacher answers to them, as in training, for `count` steps."""
    batches = TrainingBatches(split, recipe, cycle=steps)
    teacher = Teacher.load(recipe.objective.teacher, split.classes, recipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.compute.precision == "bfloat16"):
        for step, batch in enumerate(islice(batches.from_step(0), count)):
            for part in batch.parts(recipe.compute.accumulate):
                logits = teacher(batches.mix(part).pixels)
                yield step, part.positions, expand(condense(logits, recipe.objective), len(split.classes))


def labels(cache, step, positions):
    return expand(cache.kept(step, positions), cache.layout.classes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = [{"kind": "hard"}, {"kind": "soft"}, {"kind": "soft", "top_k": 2}, {"kind": "soft", "top_k": 5}]


@pytest.mark.parametrize("objective", KINDS, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_cache_is_the_teacher_bit_by_bit(tmp_path, split, teacher, objective, precision):
    recipe = pupil(teacher, f"compute.precision={precision}", **objective)
    run(recipe, split, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("labels-*"))) > 1
    cache = LabelCache.open(tmp_path / "cache", split, recipe)
    assert cache.steps == math.ceil(2 * 18 / 4) == 9
    different = set()
    for step, positions, expected in on_the_way(recipe, split, cache.steps, 11):  # and on into the second round
        found = labels(cache, step, positions)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert torch.equal(labels(cache, step, positions.flip(0)[:1]), expected.flip(0)[:1])
        different.add(tuple(expected.flatten().tolist()))
    assert len(different) > 4


@pytest.mark.parametrize("objective", [{"kind": "hard"}, {"kind": "soft"}], ids=str)
def test_a_teacher_without_room_for_a_batch(tmp_path, split, teacher, objective):
    """It answers fewer images at once, when it is introduced and when labels are made, and its labels are the same."""
    file = tmp_path / "large.py"
    made = (tmp_path / "teacher.py").read_text()
    file.write_text(
        made.replace("nn.Sequential(", "Large(").replace(
            "def make",
            """class Large(nn.Sequential):
    def forward(self, x):
        if len(x) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)

def make""",
        )
    )
    recipe = pupil(teacher, **objective)
    run(recipe, split, tmp_path / "cache", validation=split)
    said = io.StringIO()
    large = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, teacher=f"{file}:make"))
    teach(large, split, tmp_path / "other", epochs=2, validation=split, device="cpu", console=Console(file=said))
    assert said.getvalue().count("out of memory: 1 images are now computed at once instead of 2") == 2
    assert judged(tmp_path / "other") == judged(tmp_path / "cache")
    caches = [LabelCache.open(tmp_path / name, split, recipe) for name in ("cache", "other")]
    for step in range(caches[0].steps):
        one, other = (labels(cache, step, torch.arange(4)) for cache in caches)
        torch.testing.assert_close(one, other)


def test_parts_hold_what_is_documented(tmp_path, split, teacher):
    recipe = pupil(teacher, kind="soft", top_k=2)
    run(recipe, split, tmp_path / "cache")
    part = load_file(tmp_path / "cache" / "labels-00000.safetensors")
    step, positions, _ = next(on_the_way(recipe, split, 9, 1))
    batch = next(TrainingBatches(split, recipe, cycle=9).from_step(0))
    assert step == 0
    assert {name: tuple(tensor.shape[1:]) for name, tensor in part.items()} == {"index": (4, 2), "probability": (4, 2)}
    assert (part["index"].dtype, part["probability"].dtype) == (torch.uint8, torch.float16)
    logits = Teacher.load(teacher, CLASSES, recipe)(
        TrainingBatches(split, recipe, cycle=9).mix(batch.parts(2)[0]).pixels
    )
    best, index = logits.softmax(-1).topk(2)
    assert torch.equal(part["index"][0, positions].long(), index)
    assert torch.equal(part["probability"][0, positions], best.half())


def test_each_process_makes_its_gpu_the_present_one(tmp_path, split, teacher, monkeypatch):
    """Or else all of them would take memory of the first GPU, which PyTorch opens where no device is named."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    present = []
    monkeypatch.setattr(torch.cuda, "set_device", present.append)

    def load(*_):
        assert present == [torch.device("cuda", 2)]
        raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "load", load)
    with pytest.raises(KeyboardInterrupt):
        teach(pupil(teacher, kind="soft"), split, tmp_path / "cache", epochs=1)


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, split, teacher, monkeypatch):
    recipe = pupil(teacher, kind="soft")
    run(recipe, split, tmp_path / "whole")
    calls, call = [], Teacher.__call__

    def interrupted(self, pixels):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return call(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", interrupted)
        patch.setattr(Teacher, "introduction", lambda *_: ())
        with pytest.raises(KeyboardInterrupt):
            run(recipe, split, tmp_path / "cache")
    kept = contents(tmp_path / "cache")
    assert sorted(kept) == ["cache.json", *(f"labels-{i:05}.safetensors" for i in range(4))]  # 2 of 3 micro-batches
    with raises_saying(ValueError, tmp_path / "cache", "holds 4 of 9 parts; run the same deit teach again"):
        LabelCache.open(tmp_path / "cache", split, recipe)
    (tmp_path / "cache" / ".labels-00004.safetensors.12345678").write_bytes(b"half")  # of a process that was killed
    times = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in kept if name != "cache.json"}
    said = run(recipe, split, tmp_path / "cache")
    assert "part 4 of" not in said
    assert "part 5 of 9" in said
    assert times == {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in times}
    assert {
        name: content for name, content in contents(tmp_path / "cache").items() if not name.startswith(".")
    } == contents(tmp_path / "whole")


def test_processes_share_the_parts(tmp_path, split, teacher):
    recipe = pupil(teacher)
    run(recipe, split, tmp_path / "alone", 5)
    assert run(recipe, split, tmp_path / "cache", 5, rank=1, world=2) == ""
    assert sorted(contents(tmp_path / "cache")) == ["cache.json", *(f"labels-{i:05}.safetensors" for i in (1, 3, 5))]
    run(recipe, split, tmp_path / "cache", 5, rank=0, world=2)
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "cache")) == 7  # 23 steps, at most one epoch each


def test_more_epochs_extend_a_cache(tmp_path, split, teacher):
    recipe = pupil(teacher)
    run(recipe, split, tmp_path / "whole", 4)
    run(recipe, split, tmp_path / "cache", 1.5)
    run(recipe, split, tmp_path / "cache", 4)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    with raises_saying(ValueError, "cache of 18 steps, but 5 are asked for"):
        run(recipe, split, tmp_path / "cache", 1)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("seed=1", "seed is 0 there and 1 here"),
        ("augment.flip=0.25", "augment.flip is 0.5 there and 0.25 here"),
        ("augment.erase=None", "augment.erase is"),
        ("augment.mix.cutmix=0.5", "augment.mix.cutmix is 1.0 there"),
        ("data.batch=6", "data.batch is 4 there and 6 here"),
        ("data.repeats=2", "data.repeats"),
        ("data.mean=(0.5,0.5,0.5)", "data.mean is [0.5, 0.4, 0.3] there"),
        ("data.crop_ratio=1.0", "data.crop_ratio"),
        ("model.image_size=12", "model.image_size is [8, 8] there and [12, 12] here"),
        ("objective.kind=soft", "objective.kind is 'hard' there and 'soft' here"),
        ("objective.resolution=student", "objective.resolution is 'teacher' there"),
        ("augment.on=device", "augment.on is 'loader' there and 'device' here"),
    ],
)
def test_other_views_are_refused_by_name(tmp_path, split, teacher, setting, named):
    run(pupil(teacher), split, tmp_path / "cache")
    other = pupil(teacher, setting)
    for act in (
        lambda: LabelCache.open(tmp_path / "cache", split, other),
        lambda: run(other, split, tmp_path / "cache"),
    ):
        with raises_saying(ValueError, tmp_path / "cache", f"was taught with other views: {named}", "set it back, or"):
            act()


def test_views_of_the_device_have_labels_of_their_own(tmp_path, split, teacher):
    """The views of the loader are described as by versions that knew no others."""
    recipe = pupil(teacher, "augment.on=device")
    run(recipe, split, tmp_path / "cache")
    cache = LabelCache.open(tmp_path / "cache", split, recipe)
    for step, positions, expected in on_the_way(recipe, split, cache.steps, 3):
        assert torch.equal(labels(cache, step, positions), expected)
    with raises_saying(ValueError, "other views: augment.on is 'device' there and 'loader' here"):
        LabelCache.open(tmp_path / "cache", split, pupil(teacher))
    assert teaching.views(recipe, split)["augment"]["on"] == "device"
    assert "on" not in teaching.views(pupil(teacher), split)["augment"]


def test_another_top_k_is_refused(tmp_path, split, teacher):
    run(pupil(teacher, kind="soft", top_k=2), split, tmp_path / "cache")
    with raises_saying(ValueError, "other views: objective.top_k is 2 there and 3 here"):
        LabelCache.open(tmp_path / "cache", split, pupil(teacher, kind="soft", top_k=3))


def test_changed_augmentation_code_is_refused(tmp_path, split, teacher, monkeypatch):
    run(pupil(teacher), split, tmp_path / "cache")
    monkeypatch.setattr(teaching, "VIEWS_VERSION", teaching.VIEWS_VERSION + 1)
    with raises_saying(ValueError, "other views: the code of augmentation has changed since"):
        LabelCache.open(tmp_path / "cache", split, pupil(teacher))


@pytest.mark.parametrize(
    ("form", "crop", "counts"), [("JPEG", True, True), ("JPEG", False, False), ("PNG", True, False)]
)
def test_code_that_crops_jpeg_files_has_a_version_of_its_own(tmp_path, teacher, monkeypatch, form, crop, counts):
    """Labels of other images stay good if it changes."""
    files = []
    for i in range(8):
        files.append(tmp_path / f"{i}.{form.lower()}")
        Image.fromarray(np.full((40, 40, 3), 30 * i, np.uint8)).save(files[-1], form)
    split = Split(tuple(files), (0, 1) * 4, ("a", "b"))
    recipe = pupil(teacher, f"augment.crop={'ResizedCrop()' if crop else None}")
    before = views(recipe, split)
    assert ("jpeg_version" in before) == counts
    monkeypatch.setattr(teaching, "JPEG_VERSION", teaching.JPEG_VERSION + 1)
    assert (views(recipe, split) != before) == counts
    older = {name: value for name, value in before.items() if name != "jpeg_version"}
    description = {"fingerprints": {"views": "other"}, "views": older}
    expected = "changed since (version 1 there, 1.2 here)" if counts else "changed since (version 1 there, 1 here)"
    with raises_saying(ValueError, "other views: the code of augmentation has", expected):
        teaching._compare(tmp_path, description, recipe, split, {"views": "mine"})


def test_settings_that_change_no_view_are_free(tmp_path, split, teacher):
    recipe = pupil(teacher, kind="soft")
    run(recipe, split, tmp_path / "cache")
    other = override(
        recipe,
        [
            "compute.accumulate=3",
            "compute.precision=bfloat16",
            "compute.workers=1",
            "optim.lr=1",
            "ema=0.9",
            "schedule.total=epochs(7)",
            "objective.teacher=",
            "objective.temperature=2",
            "objective.weight=0.7",
            "objective.smoothing=0.1",
            f"objective.cache={tmp_path / 'cache'}",
            "model.num_hidden_layers=1",
            "name=other",
        ],
    )
    positions = torch.arange(4)
    assert torch.equal(
        labels(LabelCache.open(tmp_path / "cache", split, other), 3, positions),
        labels(LabelCache.open(tmp_path / "cache", split, recipe), 3, positions),
    )


def test_other_data_is_refused(tmp_path, split, teacher):
    recipe = pupil(teacher)
    run(recipe, split, tmp_path / "cache")
    fewer = Split(split.files[:-1], split.labels[:-1], split.classes)
    with raises_saying(ValueError, "was taught with other data: 18 images there, 17 here; restore that data"):
        LabelCache.open(tmp_path / "cache", fewer, recipe)
    Image.new("RGB", (12, 12)).save(split.files[3])
    for act in (
        lambda: LabelCache.open(tmp_path / "cache", split, recipe),
        lambda: run(recipe, split, tmp_path / "cache"),
    ):
        with raises_saying(ValueError, "was taught with other data: names, classes or contents"):
            act()


def test_another_teacher_is_refused(tmp_path, split, teacher):
    run(pupil(teacher), split, tmp_path / "cache")
    other = make_teacher(tmp_path / "other.py", seed=1)
    with raises_saying(ValueError, "other teacher: its weights, classes or preprocessing differ from those", teacher):
        run(pupil(other), split, tmp_path / "cache")
    same = make_teacher(tmp_path / "same.py")
    assert "part" not in run(pupil(same), split, tmp_path / "cache")  # of the same content; nothing is left to do


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[-3] ^= 4
    elif how == "truncated":
        del content[-2:]
    elif how == "header":
        content[20] = 0
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "truncated", "header", "exchanged"])
def test_damaged_parts_are_found_and_made_anew(tmp_path, split, teacher, how):
    recipe, out = pupil(teacher, kind="soft"), tmp_path / "cache"
    run(recipe, split, out)
    whole = contents(out)
    path = out / "labels-00001.safetensors"
    if how == "exchanged":
        path.write_bytes(whole["labels-00002.safetensors"])
    else:
        damage(path, how)
    with raises_saying(ValueError, out, "the same deit teach"):
        cache = LabelCache.open(out, split, recipe)
        assert torch.equal(labels(cache, 0, torch.arange(4)), labels(cache, 9, torch.arange(4)))
        labels(cache, 1, torch.arange(4))
    said = run(recipe, split, out)
    assert said.count("images/s") == 1
    assert ("damaged" in said or "corrupt" in said) == (how != "truncated")
    assert contents(out) == whole


def test_a_damaged_record(tmp_path, split, teacher):
    run(pupil(teacher), split, tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    text = path.read_text()
    path.write_text(text.replace('"steps"', '"stops"'))
    with raises_saying(CheckpointError, path, "lacks 'steps'"):
        LabelCache.open(tmp_path / "cache", split, pupil(teacher))
    path.write_text(text.replace('"version": 1', '"version": 9', 1))
    with raises_saying(ValueError, path, "has version 9, but this package reads 1"):
        run(pupil(teacher), split, tmp_path / "cache")


def test_folders_of_something_else(tmp_path, split, teacher):
    recipe = pupil(teacher)
    with raises_saying(FileNotFoundError, tmp_path / "none", "holds no cache.json", "--set objective.cache="):
        LabelCache.open(tmp_path / "none", split, recipe)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with raises_saying(ValueError, "holds thesis.txt, which is not part of a label cache"):
        run(recipe, split, tmp_path / "mine")
    run(recipe, split, tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").unlink()
    with raises_saying(ValueError, "holds labels-00000.safetensors but no cache.json"):
        run(recipe, split, tmp_path / "cache")


def test_recipes_without_a_teacher(tmp_path, split):
    supervised = dataclasses.replace(pupil("t"), objective=Supervised())
    for recipe in (supervised, pupil("")):
        with raises_saying(ValueError, "recipe pupil names no teacher", "objective.teacher=timm:NAME"):
            teach(recipe, split, tmp_path, epochs=1)
    with raises_saying(ValueError, "epochs must be positive, found 0"):
        teach(pupil("t"), split, tmp_path, epochs=0)


def test_unreadable_images_are_replaced_as_in_training(tmp_path, teacher):
    split, recipe = images(tmp_path / "many", 120), pupil(teacher, "data.batch=24")
    split.files[7].write_bytes(b"no image")
    said = run(recipe, split, tmp_path / "cache", 1)
    assert said.count(f"{split.files[7]} is not an image") == said.count("Another image stands in for it") == 1
    cache = LabelCache.open(tmp_path / "cache", split, recipe)
    for step, positions, expected in on_the_way(recipe, split, cache.steps, cache.steps):
        assert torch.equal(labels(cache, step, positions), expected)
    for file in split.files[:60]:
        file.write_bytes(b"no image")
    with pytest.raises(BadImages):
        run(recipe, split, tmp_path / "other", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_cost_a_finished_part(tmp_path, split, teacher, monkeypatch, number):
    save = teaching.save_file

    def disturbed(*arguments):
        signal.raise_signal(number)
        save(*arguments)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "save_file", disturbed)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(pupil(teacher), split, tmp_path / "cache")
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert sorted(contents(tmp_path / "cache")) == ["cache.json", "labels-00000.safetensors"]


@pytest.mark.parametrize(
    ("classes", "kind"),
    [(256, torch.uint8), (257, torch.uint16), (40_000, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)],
)
def test_the_last_of_many_classes_is_kept(tmp_path, split, classes, kind, monkeypatch):
    monkeypatch.setattr(teaching, "PART_BYTES", 2**20)
    file = tmp_path / "last.py"
    file.write_text(f"""
from torch import nn

class Last(nn.Module):
    classes = [str(i) for i in range({classes})]
    def forward(self, pixels):
        import torch
        logits = torch.zeros(len(pixels), {classes})
        logits[:, -1], logits[0, 0] = 1.0, 2.0
        return logits
""")
    many = Split(split.files, split.labels, tuple(str(i) for i in range(classes)))
    recipe = pupil(f"{file}:Last", "compute.accumulate=1")
    run(recipe, many, tmp_path / "cache", 0.3)
    assert load_file(tmp_path / "cache" / "labels-00000.safetensors")["hard"].dtype == kind
    cache = LabelCache.open(tmp_path / "cache", many, recipe)
    first = next(TrainingBatches(many, recipe, cycle=2).from_step(0)).positions
    assert labels(cache, 1, first).tolist() == [0] + [classes - 1] * 3


@pytest.mark.parametrize(
    ("objective", "most"), [({"kind": "hard"}, 1251), ({"kind": "soft", "top_k": 10}, 409), ({"kind": "soft"}, 4)]
)
def test_parts_of_imagenet(objective, most, monkeypatch):
    """16 MiB, and no more than an epoch: 1024 * 2 bytes for a hard step, 1024 * 10 * 4, 1024 * 1000 * 4."""
    monkeypatch.undo()
    recipe = pupil("t", "data.batch=1024", **objective)
    imagenet = Split(tuple(range(1_281_167)), (), tuple(map(str, range(1000))))
    assert teaching._layout(recipe, imagenet, 300 * 1251).steps_per_part == most


def test_reading_costs_less_than_a_millisecond(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(teaching, "PART_BYTES", 2**20)
    split = images(tmp_path / "many", 512)
    recipe = pupil(teacher, "data.batch=128", "compute.accumulate=1")
    run(recipe, split, tmp_path / "cache", 1)
    cache, positions, times = LabelCache.open(tmp_path / "cache", split, recipe), torch.arange(128), []
    for step in range(100):
        began = time.perf_counter()
        labels(cache, step, positions)
        times.append(time.perf_counter() - began)
    assert sorted(times)[50] < 1e-3


# ------------------------------------------------------------------------------------------------- before and meanwhile


def judged(folder):
    return json.loads((folder / "cache.json").read_text()).get("judged")


def test_the_teachers_accuracy_is_stored_once(tmp_path, split, teacher, monkeypatch):
    recipe, out = pupil(teacher), tmp_path / "cache"
    others = split.take(range(2, 18, 2))
    logits = Teacher.load(teacher, CLASSES, recipe)
    pixels = processor_for(recipe)([*others.files], return_tensors="pt").pixel_values
    right = int((logits(pixels).argmax(1) == torch.tensor(others.labels)).sum())
    run(recipe, split, out, 1, validation=others)
    stored = judged(out)
    assert stored == {"data": fingerprint(others), "correct": right, "total": 8}
    monkeypatch.setattr(Teacher, "introduction", lambda *_: pytest.fail("tried again"))
    run(recipe, split, out, 3, validation=others)
    run(recipe, split, out, 3, validation=others)
    assert judged(out) == stored
    run(recipe, split, out, 4, rank=1, world=2)  # which doesn't know of it
    assert judged(out) == stored
    run(recipe, split, out, 4, validation=others)
    cache = LabelCache.open(out, split, recipe)
    assert str(right / 8)[:5] in next(cache.introduction(others))
    assert (cache.judged.correct, cache.judged.total) == (right, 8)
    monkeypatch.undo()
    run(recipe, split, out, 4, validation=split)  # other images
    assert judged(out)["total"] == 18
    run(recipe, split, tmp_path / "older", 1)
    assert judged(tmp_path / "older") is None
    run(recipe, split, tmp_path / "older", 1, validation=others)
    assert judged(tmp_path / "older") == stored


@pytest.mark.parametrize("wrong", [[], {}, {"correct": 3}, {"correct": 9, "total": 8}, {"correct": "a", "total": 8}])
def test_a_damaged_accuracy_counts_as_none(tmp_path, split, teacher, wrong):
    run(pupil(teacher), split, tmp_path / "cache", 1)
    cache = LabelCache.open(tmp_path / "cache", split, pupil(teacher))
    cache.description["judged"] = wrong if isinstance(wrong, list) else {**wrong, "data": fingerprint(split)}
    assert "is not stored" in next(cache.introduction(split))
    assert cache.judged is None


@pytest.mark.parametrize("objective", KINDS, ids=str)
def test_what_it_will_write_is_said_before(tmp_path, split, teacher, objective, monkeypatch):
    """And that is what it writes, apart from the parts' headers."""
    monkeypatch.setattr(teaching, "PART_BYTES", 16 * 2**20)
    monkeypatch.setattr(teaching, "amount", lambda count: f"<{count}>")
    said = run(pupil(teacher, **objective), split, tmp_path / "cache", 40)
    first = said.splitlines()[0]
    assert first.startswith("720 views to answer, 40 epochs of 18 images; the labels take <")
    planned = int(first.partition("take <")[2].partition(">")[0])
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("labels-*"))
    parts = len(list((tmp_path / "cache").glob("labels-*")))
    assert written <= planned <= written + parts * teaching._HEADER
    assert "views to go: about " in said
    assert "views to" not in run(pupil(teacher, **objective), split, tmp_path / "cache", 40)  # nothing is missing
    more = run(pupil(teacher, **objective), split, tmp_path / "cache", 41)
    assert more.startswith("20 views to answer")  # 5 more steps of 4


def test_labels_that_the_disk_can_not_hold_are_refused(tmp_path, split, teacher, monkeypatch):
    recipe = pupil(teacher, kind="soft")
    monkeypatch.setattr(Teacher, "kept", lambda *_: pytest.fail("answered"))
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with raises_saying(
        files.DiskFull, tmp_path / "cache", "No space left on device: the labels need", "0.0 MiB are free", "free space"
    ):
        run(recipe, split, tmp_path / "cache", 40)
    assert not list((tmp_path / "cache").glob("labels-*"))
