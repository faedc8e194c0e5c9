"""The memory that a step needs: measured, compared with what is free, and acted upon before the first step."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import small
from support.runs import photos, small_recipe

from deit import host, machine
from deit.config import ConvNetConfig
from deit.data.folders import read_data
from deit.recipe import SGD, Augment, Cosine, Data, Erase, MaskedImage, Mix, Supervised, steps
from deit.train import checkpoint, memory, objectives, runs, stepping
from deit.train.loop import train

CPU = machine.Processes(torch.device("cpu"))
PLAIN = small_recipe(
    Supervised(smoothing=0.1),
    name="plain",
    model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3, hidden_dropout_prob=0.1),
    data=Data(batch=16),
    augment=Augment(erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0)),
    optim=SGD(lr=0.1, per_images=16),
    schedule=Cosine(total=steps(20)),
    evaluate=steps(20),
)
QUICK = replace(PLAIN, model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3))
CONVNET = replace(PLAIN, name="convnet", model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return read_data(photos(photos(root), split="val", count=3), holdout=0.1, seed=0)


def run(recipe, splits, out):
    """The last checkpoint of a run, and what it said after its length and the room on the disk."""
    with (out.parent / f"{out.name}.txt").open("w+") as shown:
        train(recipe, *splits, out, device="cpu", console=Console(file=shown, width=1000))
        shown.seek(0)
        return load_file(checkpoint.saved(out / "checkpoints")[-1]), shown.read().splitlines()[2:]


def course(compute):
    with memory._Followed() as followed:
        compute()
    return followed.course


def test_bytes_are_followed_from_the_making_of_a_tensor_to_its_end():
    before = torch.ones(1000)

    def compute():
        view = before[:10].view(2, 5)  # made before, so it takes nothing
        first = before * 2  # 4000 bytes
        second = first.double()[::2]  # 8000 bytes, of which half are seen
        first.add_(1)
        del first, view
        return second + 1  # 4000 bytes

    found = course(compute)
    assert max(found) == 4000 + 8000
    assert found[-1] == 8000 + 4000


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        QUICK,
        replace(QUICK, compute=replace(PLAIN.compute, precision="bfloat16")),
        replace(PLAIN, compute=replace(PLAIN.compute, checkpoint_blocks=True)),
        replace(QUICK, objective=Supervised(cosub=True, loss="binary")),
        replace(QUICK, objective=MaskedImage(unit=8), augment=Augment()),
        CONVNET,
    ],
    ids=["autograd", "by_hand", "bfloat16", "recomputed", "two_passes", "masked", "convnet"],
)
def test_the_law_of_few_images_holds_for_many(recipe, splits):
    """What is measured on 2 and 4 images is, for 16 of them, what 16 need: no branch is dropped in either."""
    work, state = runs.prepare(recipe, *splits, CPU, None)
    batch = next(work.batches.from_step(0))
    depth = stepping._depth_draws(work, state)
    kept = None if depth is None else torch.ones_like(depth)
    need = memory.measured(lambda few: stepping._try(work, state, few, kept), batch)
    expected = max(course(lambda: stepping._try(work, state, batch, kept)))
    gradients = sum(p.numel() * 4 for p in work.model.parameters())
    assert need(16) == pytest.approx(expected, rel=0.02)
    assert need(16) > gradients
    assert need(16) > 1.5 * need(4)


def test_each_operation_has_a_law_of_its_own():
    """The second of three operations has the peak for few images, and the third one for many."""
    assert memory.Need((2, 4), ([0, 3, 1], [0, 5, 9]))(10) == 1 + 4 * 8
    assert memory.Need((2, 4), ([0, 3, 1], [0, 2, 5, 9]))(10) == 1 + 4 * 8  # and one more at the beginning


def test_the_smallest_number_of_parts_that_fits_is_taken():
    need = memory.Need((2, 4), ([2 * 2**30], [4 * 2**30]))  # a GiB for each image
    room = 5 * 2**30
    assert memory.plan(need, 16, 1, True, 20 * 2**30) == memory.Plan(1, 16 * 2**30, 16 * 2**30, 20 * 2**30)
    assert memory.plan(need, 16, 1, True, room) == memory.Plan(4, 16 * 2**30, 4 * 2**30, room)
    assert memory.plan(need, 16, 4, True, room).parts == 4
    assert memory.plan(need, 15, 1, True, room).parts == 4  # 8 pairs, one of which is a single image
    assert memory.plan(need, 16, 1, False, room) == memory.Plan(1, 16 * 2**30, 16 * 2**30, room)
    assert not memory.plan(need, 16, 1, False, room).fits
    assert not memory.plan(need, 16, 1, True, 2**30).fits
    assert memory.plan(need, 16, 1, True, None) == memory.Plan(1, 16 * 2**30, 16 * 2**30, None)


@pytest.mark.parametrize("recipe", [PLAIN, QUICK, replace(CONVNET, ema=0.9)], ids=["dropout", "by_hand", "convnet"])
def test_the_measurement_changes_no_value_of_a_run(recipe, splits, tmp_path, monkeypatch):
    """Neither random numbers nor running statistics nor gradients."""
    measured, said = run(recipe, splits, tmp_path / "measured")
    assert said[0].startswith("a step needs about ")
    assert said[0].endswith(" are free")
    monkeypatch.setattr(memory, "worthwhile", lambda *_: False)
    plain, said = run(recipe, splits, tmp_path / "plain")
    assert not said[0].startswith("a step needs")
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


def test_short_runs_and_small_shares_are_not_measured():
    """It computes 6 images, which are to be at most 2 % of the run's."""
    assert memory.worthwhile(300, 3)
    assert not memory.worthwhile(299, 3)
    assert not memory.worthwhile(10_000, 2)


def needed(recipe, splits):
    """The bytes that a step needs, in a function of the number of images."""
    work, state = runs.prepare(recipe, *splits, CPU, None)
    depth = stepping._depth_draws(work, state)
    kept = None if depth is None else torch.ones_like(depth)
    batch = next(work.batches.from_step(0))
    return memory.measured(lambda few: stepping._try(work, state, few, kept), batch)


def test_a_step_that_would_not_fit_is_divided_before_and_gives_the_same_run(splits, tmp_path, monkeypatch):
    whole, _ = run(QUICK, splits, tmp_path / "whole")
    need = needed(QUICK, splits)
    monkeypatch.setattr(stepping, "available_memory", lambda _: round(1.2 * need(4)) + memory._SPARE)
    honest, sizes = objectives.SupervisedObjective.__call__, []

    def watched(self, model, batch, draws):
        sizes.append(len(batch))
        return honest(self, model, batch, draws)

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", watched)
    parts, said = run(QUICK, splits, tmp_path / "parts")
    assert said[0].startswith("a step would need about ")
    assert "the batch is now computed in 4 parts, which need " in said[0]
    assert said[0].endswith("; the result is the same")
    assert sizes[:2] == [2, 4]  # measured
    assert set(sizes[2:]) == {4}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name].float(), value.float(), atol=1e-5, rtol=0, msg=name)


def test_a_step_that_can_not_fit_is_refused(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping, "available_memory", lambda _: 2000)
    with raises_saying(
        RuntimeError, "a step needs about", "2 KiB are free", "smallest parts", "compute.checkpoint_blocks=True"
    ):
        run(QUICK, splits, tmp_path / "plain")
    with raises_saying(RuntimeError, "a step needs about", "are free; batch normalisation", "set data.batch below 16"):
        run(CONVNET, splits, tmp_path / "convnet")


def test_many_processes_take_the_parts_of_the_one_that_needs_most(splits, monkeypatch):
    """This one has room for all images at once, the other one for half of them."""
    said = []
    other = memory.Plan(2, 300 * 2**20, 160 * 2**20, 200 * 2**20)
    monkeypatch.setattr(machine.Processes, "gather", lambda self, value: [value, other])
    work, state = runs.prepare(QUICK, *splits, CPU, None)
    stepping._divide(work, state, next(work.batches.from_step(0)), said.append)
    assert work.accumulate == 2
    assert said == [
        "a step would need about 300 MiB of memory, and 200 MiB are free: the batch is now computed in 2 parts, which "
        "need 160 MiB; the result is the same"
    ]


def test_lack_of_memory_in_the_measurement_is_left_to_the_step(splits, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", fails)
    work, state = runs.prepare(QUICK, *splits, CPU, None)
    stepping._divide(work, state, next(work.batches.from_step(0)), lambda _: None)
    assert work.accumulate == 1


# ----------------------------------------------------------------------------------------------------- what is free


def machine_with(root, groups="", **files):
    """A folder with the files of a machine of 8 MiB, of which 4 MiB are free."""
    contents = {
        "proc/meminfo": "MemTotal:        8192 kB\nMemFree:         1024 kB\nMemAvailable:    4096 kB\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def group(folder, limit, usage, files, *, names=("memory.max", "memory.current"), prefix=""):
    """A control group, `files` bytes of whose usage are kept files."""
    stat = f"anon 5\n{prefix}active_file {files // 2}\n{prefix}inactive_file {files - files // 2}\n"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{usage}\n", f"{folder}/memory.stat": stat}


V1 = {"names": ("memory.limit_in_bytes", "memory.usage_in_bytes"), "prefix": "total_"}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 4 * 2**20),
        ("0::/\n", group("sys/fs/cgroup", 2**20, 2**19, 2**10), 2**19 + 2**10),  # a container
        ("0::/\n", group("sys/fs/cgroup", "max", 2**19, 0), 4 * 2**20),
        ("0::/a/b\n", group("sys/fs/cgroup/a", 2**20, 2**18, 0), 2**20 - 2**18),  # the limit of the group around it
        (
            "0::/a/b\n",
            group("sys/fs/cgroup/a", 2**21, 2**18, 0) | group("sys/fs/cgroup/a/b", 2**20, 2**18, 0),
            2**20 - 2**18,
        ),
        ("0::/../x\n", group("sys/fs/cgroup", 2**20, 2**21, 0), 0),
        ("4:memory:/job\n0::/\n", group("sys/fs/cgroup/memory/job", 2**20, 2**19, 2**10, **V1), 2**19 + 2**10),
        ("3:cpu:/job\n", group("sys/fs/cgroup/memory/job", 2**20, 2**19, 2**10, **V1), 4 * 2**20),
        ("4:cpu,memory:/\n", group("sys/fs/cgroup/memory", 2**63 - 4096, 2**19, 0, **V1), 4 * 2**20),
    ],
    ids=["machine", "container", "no limit", "around", "both", "elsewhere", "v1", "v1 of cpu", "v1 without limit"],
)
def test_free_memory_is_the_least_of_machine_and_groups(tmp_path, groups, files, expected):
    assert host.available_memory(machine_with(tmp_path, groups, **files)) == expected


def test_another_system_says_nothing(tmp_path):
    assert host.available_memory(str(tmp_path)) is None


def test_free_memory_of_a_device(monkeypatch):
    """A process has its share of main memory, and the whole of its GPU's."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(host, "available_memory", lambda: 1000)
    monkeypatch.setattr(machine, "_kept_memory", lambda: 7)
    assert machine.available_memory(cpu) == 1007
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.available_memory(cpu) == 257
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 800))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert machine.available_memory(gpu) == 540
    monkeypatch.setattr(host, "available_memory", lambda: None)
    assert machine.available_memory(cpu) is None


def test_memory_that_was_freed_and_kept_can_be_taken_again():
    """In a process of its own, because `keep_memory` lasts."""
    from support.checks import run_python

    found = run_python(
        "import torch; from deit import machine; machine.keep_memory(); x = torch.ones(2**27); y = torch.ones(8)\n"
        "before = machine._kept_memory(); del x; print((machine._kept_memory() - before) >> 20)"
    )
    assert found in ("0", "511", "512")  # 0 without glibc
