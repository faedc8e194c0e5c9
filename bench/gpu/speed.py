"""Stages that measure speed, one after another."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from bench.gpu.place import (
    Found,
    Place,
    check,
    command,
    first_batch,
    prepared,
    rows,
    saved_recipe,
    stage,
    stepper,
    write_photos,
)

ROUNDS = 5


@functools.cache
def peak(device: torch.device, side: int) -> float:
    """TFLOP/s of a bfloat16 product of random square matrices: the median of 10, after 3."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(device, lambda: a @ b) for _ in range(13)][3:]
    return 2 * side**3 / statistics.median(seconds) / 1e12


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that the device takes for this work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@stage(40, alone=True)
def machine(place: Place) -> Iterator[Found]:
    """The machine, and what it reaches on its own: a large product, and a copy on the device and to it."""
    from deit.host import cores
    from deit.machine import described

    found: Found = {"device": described(place.device), "cores": cores(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    found["shared_memory_gib"] = (
        round(shutil.disk_usage("/dev/shm").total / 2**30, 1) if Path("/dev/shm").is_dir() else 0
    )
    yield found
    yield {"product_tflops": round(peak(place.device, place.size(8192, 512)), 1)}
    source = torch.empty(place.size(2**32, 2**24), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    seconds = [timed(place.device, lambda: target.copy_(source)) for _ in range(8)][3:]
    yield {"copy_gb_per_second": round(2 * len(source) / statistics.median(seconds) / 1e9)}
    for kind in ("pageable", "pinned"):
        host = torch.empty(place.size(2**29, 2**22), dtype=torch.uint8)
        if kind == "pinned" and not place.toy:
            host = host.pin_memory()
        copy = functools.partial(target[: len(host)].copy_, host)
        seconds = [timed(place.device, copy) for _ in range(5)]
        yield {f"{kind}_copy_gb_per_second": round(len(host) / statistics.median(seconds) / 1e9, 1)}


def _pretraining(size: str, place: Place, **compute: Any) -> Any:
    from deit import recipe as r
    from deit.recipes import deit

    recipe = getattr(deit, f"deit_{size}")()
    if place.toy:
        return replace(recipe, data=replace(recipe.data, batch=8, repeats=1), compute=r.Compute(workers=0, **compute))
    return replace(recipe, compute=r.Compute(workers=8, **compute))


def _flops(config: Any) -> float:
    """Operations of the products in the forward and backward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    from deit.model.network import DeiTForImageClassification

    with torch.device("meta"):
        model = DeiTForImageClassification(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, config.num_channels, *config.image_hw))
    return 3.0 * counter.get_total_flops()


def _timm_step(size: str, batch: int, place: Place, compiled: bool) -> Callable[[], Any]:
    """A step of timm's model with the same recipe, its own loader's way to the GPU, and fused AdamW."""
    import timm
    from timm.data import Mixup
    from timm.data.loader import PrefetchLoader
    from timm.loss import SoftTargetCrossEntropy

    model: Any = timm.create_model(f"deit_{size}_patch16_224", num_classes=1000, drop_path_rate=0.1).to(place.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if compiled else model
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    criterion = SoftTargetCrossEntropy()
    pixels, labels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8), torch.randint(1000, (batch,))
    if not place.toy:
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    batches: Any = itertools.repeat((pixels, labels))
    stream = iter(PrefetchLoader(batches, device=place.device, re_prob=0.25, re_mode="pixel"))

    def step() -> None:
        given, target = mixup(*next(stream))
        with torch.autocast(place.device.type, torch.bfloat16):
            loss = criterion(run(given).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _our_step(size: str, place: Place, data: Path, **compute: Any) -> tuple[Callable[[], Any], Any]:
    work, state = prepared(_pretraining(size, place, precision="bfloat16", **compute), data, place)
    batch = first_batch(work)
    if not place.toy:
        batch = batch.pin_memory()
    work.optimizers.set_lr(1e-4)
    return stepper(work, state, (batch for _ in itertools.count())), work


def _compare(place: Place, steps: dict[str, Callable[[], Any]], images: int) -> Iterator[Found]:
    """Rates of steps that take turns, and the ratio of the first one to each other in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    first, used = {}, {}
    for name, step in steps.items():
        if not place.toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first[name] = round(timed(place.device, step), 1)
        for _ in range(2):
            step()
        used[name] = round(torch.cuda.max_memory_allocated() / 2**30, 1) if not place.toy else 0
    count = max(1, round(place.size(1, 0) / timed(place.device, next(iter(steps.values())))))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(timed(place.device, functools.partial(_repeat, step, count)) / count)
    ours = next(iter(steps))
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds[ours], strict=True))
        yield {
            "contender": name,
            "images_per_second": round(images / statistics.median(found), 1),
            "ours_over_it": round(ratio, 3),
            "first_step_seconds": first[name],
            "peak_gib": used[name],
        }


def _repeat(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()


def _speed(size: str, place: Place, compiled: bool) -> Iterator[Found]:
    data = write_photos(place.folder / "photos", 64, 256)
    ours, work = _our_step(size, place, data, compile=compiled)
    batch, flops = work.recipe.data.batch, _flops(work.model.config)
    steps = {"deit": ours}
    if importlib.util.find_spec("timm"):
        steps["timm"] = _timm_step(size, batch, place, compiled)
    ceiling = peak(place.device, place.size(8192, 512))
    for found in _compare(place, steps, batch):
        share = found["images_per_second"] * flops / 1e12 / ceiling
        yield {"model": size, "batch": batch, "compiled": compiled, **found, "share_of_peak": round(share, 3)}


@stage(60, alone=True)
def tiny(place: Place) -> Iterator[Found]:
    """Training steps of DeiT-Ti, beside timm's."""
    yield from _speed("tiny", place, False)


@stage(60, alone=True)
def small(place: Place) -> Iterator[Found]:
    """Training steps of DeiT-S, beside timm's."""
    yield from _speed("small", place, False)


@stage(60, alone=True)
def base(place: Place) -> Iterator[Found]:
    """Training steps of DeiT-B, beside timm's."""
    yield from _speed("base", place, False)


@stage(90, alone=True)
def tiny_compiled(place: Place) -> Iterator[Found]:
    """Training steps of DeiT-Ti, both compiled."""
    yield from _speed("tiny", place, not place.toy)


@stage(120, alone=True)
def base_compiled(place: Place) -> Iterator[Found]:
    """Training steps of DeiT-B, both compiled."""
    yield from _speed("base", place, not place.toy)


@stage(60, alone=True)
def profile(place: Place) -> Iterator[Found]:
    """Where five steps of DeiT-Ti spend their time: kernels, waits, copies."""
    yield from _profiled(place, False)


@stage(60, alone=True)
def profile_compiled(place: Place) -> Iterator[Found]:
    """The same with compiled blocks."""
    yield from _profiled(place, not place.toy)


def _profiled(place: Place, compiled: bool) -> Iterator[Found]:
    step, work = _our_step("tiny", place, write_photos(place.folder / "photos", 64, 256), compile=compiled)
    for _ in range(3):
        step()
    place.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not place.toy:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if not place.toy:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    yield {"waits_in_a_step": len(waits), "where": waits[:12]}
    activities = [ProfilerActivity.CPU] + ([] if place.toy else [ProfilerActivity.CUDA])
    began = time.perf_counter()
    with profiled(activities=activities) as recorded:
        for _ in range(5):
            step()
        place.wait()
    wall = time.perf_counter() - began
    key = "self_cpu_time_total" if place.toy else "self_device_time_total"
    table = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    kernels = table if place.toy else [event for event in table if str(event.device_type).endswith("CUDA")]
    total = sum(getattr(event, key) for event in kernels) / 1e6
    yield {"wall_ms_a_step": round(200 * wall, 1), "busy_share": round(total / wall, 3)}
    for event in kernels[:25]:
        yield {
            "kernel": event.key[:90],
            "ms_a_step": round(getattr(event, key) / 5e3, 3),
            "calls_a_step": event.count / 5,
        }
    del work


def _take(stream: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(stream)


@stage(90, alone=True)
def loader(place: Place) -> Iterator[Found]:
    """The loader alone with 8, 12 and 15 processes, and then the whole of `deit train deit_tiny`."""
    from deit import recipe as r

    data = write_photos(place.folder / "photos", place.size(4096, 64), place.size(375, 64))
    for workers in (8, 12, 15) if not place.toy else (0, 1):
        recipe = _pretraining("tiny", place)
        small = replace(recipe, data=replace(recipe.data, batch=place.size(128, 8)), compute=r.Compute(workers=workers))
        work, _ = prepared(small, data, place)
        stream = work.batches.from_step(0)
        burst = max(1, workers)
        _take(stream, 2 * burst)  # which the processes made ahead
        began = time.perf_counter()
        _take(stream, 3 * burst)
        seconds = time.perf_counter() - began
        stream.close()
        yield {"loaders": workers, "images_per_second": round(3 * burst * small.data.batch / seconds)}
    run = place.folder / "run"
    recipe = replace(
        _pretraining("tiny", place), schedule=r.Cosine(total=r.steps(place.size(24, 2))), evaluate=r.steps(1000)
    )
    recipe = replace(recipe, compute=r.Compute(precision="auto"))
    _, seconds = command("train", *saved_recipe(place, recipe, "run"), "--data", data, "--device", place.device.type)
    yield {"deit train": "deit_tiny", "command_seconds": round(seconds, 1), "rows": rows(run)[-1]["seconds"]}


@stage(60, alone=True)
def changes(place: Place) -> Iterator[Found]:
    """Views of `augment.on=device`: the same levels on the device as on the CPU, no waits, and views a second."""
    from deit import recipe as r
    from deit.data.augment import drawn
    from deit.data.draws import draws
    from deit.data.on_device import Changes

    side, count, some = place.size(224, 32), place.size(512, 16), place.size(64, 16)
    coarse = torch.randint(0, 256, (count, 3, side // 8, side // 8), generator=torch.Generator().manual_seed(0))
    levels = torch.nn.functional.interpolate(coarse.float(), (side, side), mode="bilinear").to(torch.uint8)
    there = levels.to(place.device)
    recipes = {
        "RandAugment": r.Augment(flip=0.5, policy=r.RandAugment(std=0.5)),
        "AutoAugment": r.Augment(flip=0.5, policy=r.AutoAugment()),
        "ThreeAugment": r.Augment(flip=0.5, policy=r.ThreeAugment(), jitter=r.Jitter(brightness=0.3)),
        "affine": r.Augment(affine=r.Affine(rotate=30)),
    }
    for name, settings in recipes.items():
        views = [drawn(settings, (side, side), draws(0, 0, index)) for index in range(count)]
        given = Changes.of(views, (side, side), (124, 116, 104), 3)
        moved = given.changed(lambda tensor: tensor.to(place.device))
        found = moved.applied(there)
        expected = given.at([slice(0, some)]).applied(levels[:some])
        yield check(f"{name}, levels unlike the CPU's", int((found[:some].cpu() != expected).sum()), 0)
        if not place.toy:
            torch.cuda.set_sync_debug_mode("error")
        moved.applied(there)
        if not place.toy:
            torch.cuda.set_sync_debug_mode("default")
        seconds = [timed(place.device, lambda moved=moved: moved.applied(there)) for _ in range(ROUNDS)]  # type: ignore[misc]
        yield {"views": name, "images_per_second": round(count / statistics.median(seconds))}


@stage(60, alone=True, needs=("timm",))
def teacher(place: Place) -> Iterator[Found]:
    """A RegNetY-16GF that answers as a teacher does, in three layouts."""
    import timm

    model: Any = timm.create_model("regnety_160" if not place.toy else "regnety_002").eval().to(place.device)
    pixels = torch.randn(place.size(256, 2), 3, 224, 224, device=place.device)
    for name, layout, dtype in (
        ("float32", torch.contiguous_format, torch.float32),
        ("float32, channels last", torch.channels_last, torch.float32),
        ("bfloat16, channels last", torch.channels_last, torch.bfloat16),
    ):
        model, given = model.to(memory_format=layout), pixels.to(memory_format=layout)

        def answer(model: nn.Module = model, given: Tensor = given, dtype: torch.dtype = dtype) -> None:
            with torch.inference_mode(), torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                model(given)

        seconds = [timed(place.device, answer) for _ in range(5)][2:]
        yield {"layout": name, "images_per_second": round(len(pixels) / statistics.median(seconds))}


@stage(60, alone=True)
def predicting(place: Place) -> Iterator[Found]:
    """`deit predict` of a DeiT-Ti from photos, and the network alone in float32, TF32 and bfloat16."""
    from deit.config import VARIANTS
    from deit.image.processor import DeiTImageProcessor
    from deit.model.network import DeiTForImageClassification

    data = write_photos(place.folder / "photos", place.size(2048, 16), place.size(375, 64))
    labels = {i: f"class {i}" for i in range(1000)}
    model = DeiTForImageClassification(VARIANTS["deit-tiny-patch16-224"].replace(num_labels=1000, id2label=labels))
    model.save_pretrained(place.folder / "model")
    DeiTImageProcessor.paper((224, 224)).save_pretrained(place.folder / "model")
    _, seconds = command(
        "predict", place.folder / "model", data / "train", "--device", place.device.type, "--batch", "256", "--json"
    )
    yield {"predict, whole command, images_per_second": round(place.size(2048, 16) / seconds, 1)}
    model = model.eval().to(place.device)
    pixels = torch.randn(place.size(256, 2), 3, 224, 224, device=place.device)
    for name in ("float32", "tf32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"

        def answer(name: str = name) -> None:
            with torch.inference_mode(), torch.autocast(place.device.type, torch.bfloat16, enabled=name == "bfloat16"):
                model(pixels)

        found = [timed(place.device, answer) for _ in range(8)][3:]
        yield {"network": name, "images_per_second": round(len(pixels) / statistics.median(found))}
