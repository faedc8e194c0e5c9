"""What a GPU can show, on a bare machine with one NVIDIA GPU and nothing to download: `make gpu`.

    python -m bench.gpu [--seconds 570] [--only STAGE ...] [--skip STAGE ...] [--device cuda] [--records FILE]

Every stage is a process of its own with a limit of time, and prints lines of JSON. The stages that only compare values
run side by side. Then the stages that measure speed run one by one. `--device cpu` tries the stages at toy size.

It needs torch, numpy, pillow, rich and safetensors. A stage whose packages are missing says so and ends.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROUNDS = 5
Found = dict[str, Any]


class Stage:
    """A stage: `run(place)` yields what it finds, a mapping at a time."""

    def __init__(self, run: Callable[[Place], Iterator[Found]], limit: float, alone: bool, needs: tuple[str, ...]):
        self.run, self.limit, self.alone, self.needs = run, limit, alone, needs


class Place:
    """Where a stage runs: the device, a folder for its files, and whether it is only tried at toy size."""

    def __init__(self, device: str, folder: Path):
        from deit.machine import resolve_device

        self.device = resolve_device(device)
        self.folder = folder
        self.toy = self.device.type == "cpu"

    def size(self, real: int, toy: int) -> int:
        return toy if self.toy else real

    def wait(self) -> None:
        """Waits until the device has done all that it was given."""
        if not self.toy:
            torch.cuda.synchronize()


STAGES: dict[str, Stage] = {}


def stage(limit: float, *, alone: bool = False, needs: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Makes a function a stage of at most `limit` seconds."""

    def add(run: Callable[[Place], Iterator[Found]]) -> Callable[[Place], Iterator[Found]]:
        STAGES[run.__name__] = Stage(run, limit, alone, needs)
        return run

    return add


# ------------------------------------------------------------------------------------------------------- shared pieces


def write_photos(folder: Path, count: int, side: int, classes: int = 4) -> Path:
    """Writes JPEGs of blurred noise, `count` for training and an eighth of that for validation and for testing."""
    from PIL import Image, ImageFilter

    def write(job: tuple[Path, int]) -> None:
        path, seed = job
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (side // 8, side * 4 // 3 // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.UnsharpMask()).save(path, quality=90)

    jobs: list[tuple[Path, int]] = []
    for split, number in (("train", count), ("val", count // 8), ("test", count // 8)):
        for name in range(classes):
            (folder / split / f"class{name}").mkdir(parents=True)
        jobs += [(folder / split / f"class{i % classes}" / f"{i:06}.jpg", len(jobs) + i) for i in range(number)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, jobs))
    return folder


def prepared(recipe: Any, data: Path, place: Place) -> tuple[Any, Any]:
    """The parts and the state of a new run of a recipe on these images."""
    from deit.data.folders import read_split
    from deit.machine import Processes
    from deit.train import runs

    train_split = read_split(data, "train")
    val_split = read_split(data, "val", train_split.classes)
    return runs.prepare(recipe, train_split, val_split, Processes(place.device), None)


def first_batch(work: Any) -> Any:
    stream = work.batches.from_step(0)
    try:
        return next(stream)
    finally:
        stream.close()


def take_step(work: Any, state: Any, batch: Any) -> dict[str, float]:
    """A step of the training loop itself."""
    from deit.train import loop

    numbers, _ = loop._step(
        work, state, batch, (False, False, False), lambda sentence: print(sentence, file=sys.stderr)
    )
    return numbers


def tiny_recipe(place: Place, **changes: Any) -> Any:
    """A recipe whose model is small enough to train on a CPU in seconds."""
    from deit.config import DeiTConfig
    from deit.recipe import AdamW, Cosine, Data, Recipe, ResizedCrop, Supervised, epochs
    from deit.recipe import Augment as _Augment

    config = DeiTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        encoder_stride=8, layer_norm_eps=1e-6, drop_path_rate=0.1, distillation_token=False,
    )  # fmt: skip
    settings = {
        "name": "gpu_check",
        "model": config,
        "data": Data(batch=32),
        "augment": _Augment(crop=ResizedCrop(), flip=0.5),
        "objective": Supervised(smoothing=0.1),
        "optim": AdamW(lr=1e-3, per_images=32),
        "schedule": Cosine(total=epochs(2)),
    }
    return Recipe(**(settings | changes))


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def command(*arguments: Any, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ()) -> tuple[str, float]:
    """The standard output and the seconds of a `deit` command. Raises `RuntimeError` with its messages if it fails."""
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, *(launcher or ("-m", "deit")), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    if run.returncode:
        raise RuntimeError(f"status {run.returncode}: {' '.join(map(str, arguments))}\n{run.stderr[-9000:]}")
    return run.stdout, time.perf_counter() - began


def rows(run: Path) -> list[Found]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(name: str, value: float, limit: float, **more: Any) -> Found:
    """A value and whether it is within its limit."""
    return {"check": name, "value": value, "limit": limit, "ok": bool(value <= limit), **more}


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ------------------------------------------------------------------------------------------------- the machine's limits


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
    import shutil

    from deit.host import cores
    from deit.machine import described

    found: Found = {"device": described(place.device), "cores": cores(), "python": sys.version.split()[0]}
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
        seconds = [timed(place.device, lambda host=host: target[: len(host)].copy_(host)) for _ in range(5)]
        yield {f"{kind}_copy_gb_per_second": round(len(host) / statistics.median(seconds) / 1e9, 1)}


# --------------------------------------------------------------------------------------------------- equality of values


def _network(place: Place) -> tuple[nn.Module, Tensor]:
    from deit.config import VARIANTS
    from deit.model.network import DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = VARIANTS["deit-tiny-distilled-patch16-224"].replace(num_labels=1000)
    model = DeiTForImageClassificationWithTeacher(config)
    for parameter in model.parameters():  # no value may be zero, because zeros hide faults
        nn.init.normal_(parameter, std=0.05)
    return model.train(), torch.randn(place.size(8, 2), 3, 224, 224)


def _answer_and_gradient(model: nn.Module, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        out = model(pixels)
    logits = torch.cat([out.cls_logits.float(), out.distillation_logits.float()])
    torch.logsumexp(logits, -1).square().mean().backward()
    return logits, torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])  # type: ignore[union-attr]


@stage(60)
def parity(place: Place) -> Iterator[Found]:
    """DeiT-Ti on the device against the CPU: answers and gradients."""
    model, pixels = _network(place)
    logits, gradient = _answer_and_gradient(model, pixels, torch.float32)
    model, pixels = model.to(place.device), pixels.to(place.device)
    with exact_products():
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)  # type: ignore[operator]
            found = _answer_and_gradient(model, pixels, torch.float32)
            yield check(f"{attention}, float32, logits", relative(found[0], logits), 1e-5)
            yield check(f"{attention}, float32, gradient", relative(found[1], gradient), 1e-4)
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        found = _answer_and_gradient(model, pixels, torch.float32)
        yield check("blocks recomputed, float32, gradient", relative(found[1], gradient), 1e-4)
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    found = _answer_and_gradient(model, pixels, torch.bfloat16)
    yield check("bfloat16, logits", relative(found[0], logits), 3e-2)
    yield check("bfloat16, gradient", relative(found[1], gradient), 1e-1)
    again = _answer_and_gradient(model, pixels, torch.bfloat16)
    yield {"bfloat16 again": "same bits" if torch.equal(again[1], found[1]) else relative(again[1], found[1])}


@stage(90)
def objectives(place: Place) -> Iterator[Found]:
    """Three steps of every objective with every optimizer, on the device against the CPU, in float32."""
    from deit import recipe as r
    from deit.config import ConvNetConfig

    data = write_photos(place.folder / "photos", 64, 64)
    command("train", *_saved_recipe(place, _teacher_recipe(place), "teacher"), "--data", data, "--device", "cpu")
    plain = tiny_recipe(place).model
    teacher = str(place.folder / "teacher" / "model")
    kinds: dict[str, tuple[Any, Any]] = {
        "labels": (plain, r.Supervised(smoothing=0.1)),
        "binary labels": (plain, r.Supervised(loss="binary")),
        "cosub": (plain, r.Supervised(cosub=True)),
        "hard distillation": (plain.replace(distillation_token=True), r.Distilled(teacher=teacher)),
        "soft distillation": (plain, r.Distilled(teacher=teacher, kind="soft", token="class")),
        "masked images": (plain, r.MaskedImage(unit=8)),
        "ConvNet": (ConvNetConfig(widths=(16, 32), depth=1, image_size=32), r.Supervised()),
    }
    optimizers = {
        "AdamW": r.AdamW(lr=1e-3, per_images=32, clip=1.0),
        "SGD": r.SGD(lr=1e-2, per_images=32),
        "LAMB": r.LAMB(lr=1e-3, per_images=32),
        "Muon": r.Muon(lr=1e-3, others_lr=1e-3, per_images=32),
    }
    worst = 0.0
    augment = r.Augment(crop=r.ResizedCrop(), flip=0.5, erase=r.Erase(), mix=r.Mix(mixup=0.8, cutmix=1.0))
    cpu = Place("cpu", place.folder)
    for (kind, (model, objective)), (name, optimizer) in product(kinds.items(), optimizers.items()):
        if kind == "ConvNet" and name == "Muon":
            continue
        changes = (
            {"augment": replace(augment, mix=None, erase=None)} if kind == "masked images" else {"augment": augment}
        )
        recipe = tiny_recipe(
            place, model=model, objective=objective, optim=optimizer, ema=0.9,
            compute=r.Compute(precision="float32", workers=0), **changes,
        )  # fmt: skip
        numbers = []
        for where in (cpu, place):
            work, state = prepared(recipe, data, where)
            stream = work.batches.from_step(0)
            with exact_products():
                found = []
                for batch in islice(stream, 3):
                    work.optimizers.set_lr(1e-3)
                    found.append(take_step(work, state, batch))
            stream.close()
            final = torch.cat([value.detach().float().flatten().cpu() for value in work.model.parameters()])
            numbers.append(([row[key] for row in found for key in ("loss", "gradient_norm")], final))
        (expected, weights), (got, others) = numbers
        worst = max([worst, *(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(expected, got, strict=True))])
        difference = check(f"{kind}, {name}, losses and norms", worst, 1e-3, weights=relative(others, weights))
        if not difference["ok"]:
            yield difference | {"cpu": expected, place.device.type: got}
            worst = 0.0
    yield check("all others, losses and norms", worst, 1e-3, combinations=len(kinds) * len(optimizers) - 1)


def _saved_recipe(place: Place, recipe: Any, name: str) -> tuple[Any, ...]:
    """Arguments for a recipe that is data, and for its output folder."""
    path = place.folder / f"{name}.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return (path, "--out", place.folder / name)


def _teacher_recipe(place: Place) -> Any:
    from deit.config import ConvNetConfig

    return tiny_recipe(place, name="teacher", model=ConvNetConfig(widths=(16, 32), depth=1, image_size=32))


@stage(90)
def resuming(place: Place) -> Iterator[Found]:
    """A run that stops and resumes, against one that does not; and one that goes on from the CPU's checkpoint."""
    from deit import recipe as r

    data = write_photos(place.folder / "photos", 128, 64)
    device = place.device.type
    for precision in ("float32", "bfloat16"):
        recipe = tiny_recipe(
            place, compute=r.Compute(precision=precision, workers=2), schedule=r.Cosine(total=r.steps(12))
        )
        whole = _saved_recipe(place, recipe, f"whole-{precision}")
        command("train", *whole, "--data", data, "--device", device)
        for first in dict.fromkeys([device, "cpu"]):
            name = f"parted-{precision}-{first}"
            arguments = _saved_recipe(place, recipe, name)
            _stop_after(place, recipe, name, data, first, 6)
            command("train", *arguments, "--data", data, "--device", device, "--resume")
            ours, theirs = (rows(place.folder / run)[-1] for run in (f"whole-{precision}", name))
            difference = abs(ours["loss"] - theirs["loss"]) / ours["loss"]
            yield check(f"{precision}, stopped on {first}", difference, 1e-3 if precision == "float32" else 3e-2)


def _stop_after(place: Place, recipe: Any, name: str, data: Path, device: str, step: int) -> None:
    """Trains a part of a run: SIGTERM comes from within, once the run has taken `step` steps."""
    code = f"""
import os, signal, sys
from deit.train import loop
kept = loop._step
def counted(work, state, *rest):
    found = kept(work, state, *rest)
    if state.step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
loop._step = counted
from deit.cli import main
main()
"""
    script = place.folder / "stopping.py"
    script.write_text(code)
    with suppress(RuntimeError):  # it ends with status 143
        command(
            "train", place.folder / f"{name}.json", "--out", place.folder / name, "--data", data, "--device", device,
            launcher=(str(script),),
        )  # fmt: skip
    assert (place.folder / name / "checkpoints").is_dir(), "the first part left no checkpoint"


@stage(60)
def memory(place: Place) -> Iterator[Found]:
    """Lack of memory, met for real: the batch is divided, and the gradient is that of explicit accumulation."""
    from deit import recipe as r
    from deit.config import VARIANTS
    from deit.train import loop

    data = write_photos(place.folder / "photos", 64, 64)
    model = VARIANTS["deit-tiny-patch16-224"].replace(num_labels=2, image_size=place.size(224, 32))
    gradients = []
    batch_size = place.size(512, 8)
    for parts in (1, 8):
        recipe = tiny_recipe(
            place, model=model, data=r.Data(batch=batch_size),
            compute=r.Compute(precision="float32", accumulate=parts, workers=4),
        )  # fmt: skip
        work, state = prepared(recipe, data, place)
        batch = first_batch(work)
        if parts == 1 and not place.toy:
            total = torch.cuda.get_device_properties(place.device).total_memory
            torch.cuda.set_per_process_memory_fraction(6 * 2**30 / total)
        with exact_products():
            buffers = [buffer.clone() for buffer in work.model.buffers()]
            loop._gradients(work, state, batch, buffers, lambda sentence: print(sentence, file=sys.stderr))
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in work.model.parameters()]))
        yield {"asked for parts": parts, "computed in parts": work.accumulate}
        if not place.toy:
            torch.cuda.set_per_process_memory_fraction(1.0)
        del work, state, batch
    yield check("gradient, divided for lack of memory against asked for", relative(*gradients), 1e-4)


@stage(90)
def planning(place: Place) -> Iterator[Found]:
    """`--time` with many loaders ends in time, and uses the time."""
    data = write_photos(place.folder / "photos", 512, 256)
    recipe = tiny_recipe(place, schedule=_epochs(1000), name="planned")
    seconds = place.size(30, 15)
    _, took = command(
        "train", *_saved_recipe(place, recipe, "planned"), "--data", data, "--device", place.device.type,
        "--time", f"{seconds}s", "--set", f"compute.workers={place.size(8, 2)}",
    )  # fmt: skip
    last = rows(place.folder / "planned")[-1]
    yield check("whole command, seconds", took, 1.3 * seconds, steps=last["step"], lr=last["lr"])
    yield check("learning rate at the end", last["lr"], 1e-4)


def _epochs(count: int) -> Any:
    from deit.recipe import Cosine, epochs

    return Cosine(total=epochs(count))


@stage(90)
def two_processes(place: Place) -> Iterator[Found]:
    """Two processes on one GPU against one process; and one of them killed."""
    from deit import recipe as r

    data = write_photos(place.folder / "photos", 64, 64)
    recipe = tiny_recipe(place, compute=r.Compute(precision="float32", workers=2), schedule=r.Cosine(total=r.steps(6)))
    command("train", *_saved_recipe(place, recipe, "one"), "--data", data, "--device", place.device.type)
    env = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    device = f"{place.device.type}:0" if place.device.type == "cuda" else "cpu"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deit")
    for parallel in ("replicate", "shard"):
        changed = replace(recipe, compute=replace(recipe.compute, parallel=parallel))
        arguments = _saved_recipe(place, changed, parallel)
        try:
            command("train", *arguments, "--data", data, "--device", device, env=env, launcher=launcher)
        except RuntimeError as error:
            yield {"parallel": parallel, "ok": False, "failed": str(error)[:3000]}
            continue
        one, two = (rows(place.folder / run)[-1] for run in ("one", parallel))
        yield check(f"two processes, {parallel}", abs(one["loss"] - two["loss"]) / one["loss"], 1e-3)


@stage(120)
def answers(place: Place) -> Iterator[Found]:
    """`eval`, `predict`, `explain` and `calibrate` of a trained model, on the device against the CPU."""
    data = write_photos(place.folder / "photos", 256, 64)
    train = _saved_recipe(place, tiny_recipe(place), "run")
    command("train", *train, "--data", data, "--device", place.device.type)
    model = place.folder / "run" / "model"
    evaluated, labelled = [], []
    for device in dict.fromkeys([place.device.type, "cpu"]):
        evaluated.append(json.loads(command("eval", model, "--data", data, "--device", device, "--json")[0]))
        text = command("predict", model, data / "test", "--device", device, "--engine", "torch", "--json")[0]
        labelled.append([json.loads(line) for line in text.splitlines()])
    ours, theirs = (np.array([row["labels"][0]["score"] for row in found]) for found in (labelled[0], labelled[-1]))
    yield check("scores of predict", float(np.abs(ours - theirs).max()), 1e-4)
    losses = [found["nll"] for found in evaluated]
    yield check("negative log-likelihood of eval", abs(losses[0] - losses[-1]), 1e-4)
    picture = next((data / "test").rglob("*.jpg"))
    command("explain", model, picture, "--out", place.folder / "map.png", "--device", place.device.type)
    command("calibrate", model, "--data", data, "--device", place.device.type)


@stage(120, needs=("sklearn",))
def quickstart(place: Place) -> Iterator[Found]:
    """The quickstart, from digits to a distilled student."""
    out, seconds = command("quickstart", "--out", place.folder / "quickstart", "--json")
    yield {"seconds": round(seconds, 1)} | json.loads(out.splitlines()[-1])


@stage(60, needs=("fastapi", "uvicorn", "httpx"))
def serving(place: Place) -> Iterator[Found]:
    """64 clients at once get the answers that one client gets."""
    import socket

    import httpx

    data = write_photos(place.folder / "photos", 64, 128)
    command("train", *_saved_recipe(place, tiny_recipe(place), "run"), "--data", data, "--device", place.device.type)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "deit", "serve", place.folder / "run" / "model", "--port", str(port),
         "--device", place.device.type]
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(0.2)
        photo = next((data / "test").rglob("*.jpg")).read_bytes()

        def ask(_: int) -> tuple[int, Any]:
            found = httpx.post(f"{url}/classify", content=photo, headers={"content-type": "image/jpeg"}, timeout=30)
            return found.status_code, found.json()

        began = time.perf_counter()
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64 * 10)))
        seconds = time.perf_counter() - began
        yield {"statuses": sorted({status for status, _ in found}), "requests_per_second": round(len(found) / seconds)}
    finally:
        server.terminate()
        server.wait(timeout=30)


# ---------------------------------------------------------------------------------------------------------------- speed


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
    stream = iter(
        PrefetchLoader(itertools.repeat((pixels, labels)), device=place.device, re_prob=0.25, re_mode="pixel")
    )

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
    return lambda: take_step(work, state, batch), work


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
            seconds[name].append(timed(place.device, lambda step=step: [step() for _ in range(count)]) / count)
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


@stage(90, alone=True)
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
    import warnings

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

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


@stage(90, alone=True)
def loader(place: Place) -> Iterator[Found]:
    """The loader alone with 8, 12 and 15 processes, and then the whole of `deit train deit_tiny`."""
    from deit import recipe as r

    data = write_photos(place.folder / "photos", place.size(4096, 64), place.size(375, 64))
    batches = place.size(12, 3)
    for workers in (8, 12, 15) if not place.toy else (0, 1):
        recipe = _pretraining("tiny", place)
        work, _ = prepared(replace(recipe, compute=r.Compute(workers=workers)), data, place)
        stream = work.batches.from_step(0)
        next(stream)
        began = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - began
        stream.close()
        yield {"loaders": workers, "images_per_second": round(batches * recipe.data.batch / seconds)}
    run = place.folder / "run"
    recipe = replace(
        _pretraining("tiny", place), schedule=r.Cosine(total=r.steps(place.size(24, 2))), evaluate=r.steps(1000)
    )
    recipe = replace(recipe, compute=r.Compute(precision="auto"))
    _, seconds = command("train", *_saved_recipe(place, recipe, "run"), "--data", data, "--device", place.device.type)
    yield {"deit train": "deit_tiny", "command_seconds": round(seconds, 1), "rows": rows(run)[-1]["seconds"]}


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


# ------------------------------------------------------------------------------------------------------- running stages


class Runner:
    """Runs stages as processes, and writes every line that they print with the name of their stage."""

    def __init__(self, device: str, records: Path | None, end: float):
        self.device, self.records, self.end = device, records, end
        self.lock = threading.Lock()
        self.failed: list[str] = []

    def write(self, stage: str, found: Found) -> None:
        line = json.dumps({"stage": stage, **found})
        with self.lock:
            print(line, flush=True)
            if self.records:
                with self.records.open("a", encoding="utf-8") as file:
                    print(line, file=file)
        if found.get("ok") is False:
            self.failed.append(stage)

    def run(self, name: str) -> None:
        limit = min(STAGES[name].limit, self.end - time.monotonic())
        if limit < 5:
            return self.write(name, {"left out": "the time is up"})
        if missing := [package for package in STAGES[name].needs if not importlib.util.find_spec(package)]:
            return self.write(name, {"left out": f"{', '.join(missing)} is not installed"})
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu", "--device", self.device, "--stage", name],
                stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True,
                env=os.environ | ({} if STAGES[name].alone else {"OMP_NUM_THREADS": "2"}),
            )  # fmt: skip
            timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
            timer.start()
            assert process.stdout
            for line in process.stdout:
                with suppress(json.JSONDecodeError):
                    self.write(name, json.loads(line))
            status = process.wait()
            timer.cancel()
            seconds = round(time.monotonic() - began, 1)
            messages.seek(0)
            told = messages.read()
            if status:
                why = f"stopped after {limit:.0f} s" if status == -signal.SIGKILL else f"status {status}"
                self.write(name, {"ok": False, "failed": why, "messages": told[-2500:], "seconds": seconds})
            else:
                self.write(name, {"ended": True, "seconds": seconds, **({"messages": told[-600:]} if told else {})})
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the stages (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=570, help="ends after this time (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), help="only these stages")
    parser.add_argument("--skip", nargs="+", choices=tuple(STAGES), default=[], help="not these stages")
    parser.add_argument("--records", type=Path, help="append the lines to this file")
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        with tempfile.TemporaryDirectory() as folder:
            for found in STAGES[options.stage].run(Place(options.device, Path(folder))):
                print(json.dumps(found), flush=True)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected an NVIDIA GPU, but PyTorch sees none; try the stages with --device cpu", file=sys.stderr)
        return 2
    chosen = [name for name in options.only or STAGES if name not in options.skip]
    runner = Runner(options.device, options.records, time.monotonic() + options.seconds)
    together = [name for name in chosen if not STAGES[name].alone]
    with ThreadPoolExecutor(8 if options.device == "cuda" else 1) as pool:
        list(pool.map(runner.run, together))
    for name in chosen:
        if STAGES[name].alone:
            runner.run(name)
    runner.write("all", {"failed": sorted(set(runner.failed))})
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
