"""Stages that compare values: the device against the CPU, parts against the whole. They run side by side."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu.place import (
    Found,
    Place,
    check,
    command,
    exact_products,
    first_batch,
    prepared,
    relative,
    rows,
    saved_recipe,
    stage,
    take_step,
    tiny_recipe,
    write_photos,
)


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
    command("train", *saved_recipe(place, _teacher_recipe(place), "teacher"), "--data", data, "--device", "cpu")
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
            place,
            compute=r.Compute(precision=precision, workers=2, compile=False),
            schedule=r.Cosine(total=r.steps(12)),
        )
        whole = saved_recipe(place, recipe, f"whole-{precision}")
        command("train", *whole, "--data", data, "--device", device)
        for first in dict.fromkeys([device, "cpu"] if precision == "float32" else [device]):
            name = f"parted-{precision}-{first}"
            arguments = saved_recipe(place, recipe, name)
            _stop_after(place, recipe, name, data, first, 6)
            command("train", *arguments, "--data", data, "--device", device, "--resume")
            ours, theirs = (rows(place.folder / run)[-1] for run in (f"whole-{precision}", name))
            difference = abs(ours["loss"] - theirs["loss"]) / ours["loss"]
            yield check(f"{precision}, stopped on {first}", difference, 1e-3 if precision == "float32" else 3e-2)


def _stop_after(place: Place, recipe: Any, name: str, data: Path, device: str, step: int) -> None:
    """Trains a part of a run: SIGTERM comes from within, once the run has taken `step` steps."""
    code = f"""
import os, signal, sys
from deit.train import stepping
kept = stepping.take
def counted(work, state, *rest):
    found = kept(work, state, *rest)
    if state.step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
stepping.take = counted
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
    from deit.train import stepping

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
            stepping._gradients(work, state, batch, buffers, lambda sentence: print(sentence, file=sys.stderr))
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
        "train", *saved_recipe(place, recipe, "planned"), "--data", data, "--device", place.device.type,
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
    command("train", *saved_recipe(place, recipe, "one"), "--data", data, "--device", place.device.type)
    env = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    device = f"{place.device.type}:0" if place.device.type == "cuda" else "cpu"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deit")
    for parallel in ("replicate", "shard"):
        changed = replace(recipe, compute=replace(recipe.compute, parallel=parallel))
        arguments = saved_recipe(place, changed, parallel)
        try:
            command("train", *arguments, "--data", data, "--device", device, env=env, launcher=launcher)
        except RuntimeError as error:
            if "Duplicate GPU" in str(error):
                yield {"parallel": parallel, "left out": "this NCCL takes no two processes on one GPU"}
                continue
            yield {"parallel": parallel, "ok": False, "failed": str(error)[:3000]}
            continue
        one, two = (rows(place.folder / run)[-1] for run in ("one", parallel))
        yield check(f"two processes, {parallel}", abs(one["loss"] - two["loss"]) / one["loss"], 1e-3)


@stage(120)
def answers(place: Place) -> Iterator[Found]:
    """`eval`, `predict`, `explain` and `calibrate` of a trained model, on the device against the CPU."""
    data = write_photos(place.folder / "photos", 256, 64)
    train = saved_recipe(place, tiny_recipe(place), "run")
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
    import httpx

    data = write_photos(place.folder / "photos", 64, 128)
    command("train", *saved_recipe(place, tiny_recipe(place), "run"), "--data", data, "--device", place.device.type)
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
            found = httpx.post(f"{url}/v1/classify", content=photo, headers={"content-type": "image/jpeg"}, timeout=30)
            return found.status_code, found.json()

        began = time.perf_counter()
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64 * 10)))
        seconds = time.perf_counter() - began
        others = sum(status != 200 or answer != found[0][1] for status, answer in found)
        yield check("answers of 64 clients unlike the first one", others, 0)
        yield {"requests_per_second": round(len(found) / seconds)}
    finally:
        server.terminate()
        server.wait(timeout=30)
