"""Speed from JPEG files to labels on the CPU, beside transformers' pipeline, and of the network beside bare OpenVINO.

    python bench/predict_speed.py [--rounds 7] [--case "tiny 1"|"tiny 32 network"|...]

Each contender is a process of its own with all cores; they take turns, round by round, so that what else the machine
does meets all alike. Models have random weights and 1,000 classes. Appends a record to bench/predict_speed.jsonl:
images per second, median over the rounds, and the ratio of ours to each peer's best, round by round.

The cases from files: `deit` is what `deit predict --engine auto` runs, `pytorch` the same with `--engine torch`,
`transformers` is `pipeline("image-classification")` at its defaults. The photos are ImageNet's where
`shared/data/imagenet_sample.tar` is beside the repository, otherwise coarse random pictures of 500x375 pixels.

The cases of the network begin with `pixel_values`: `deit` is the engine that `Predictor` calls, the peers are OpenVINO
itself with the same file, one call after the other (`latency`), or as many at once as it advises (`throughput`).
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from train_speed import HERE, answer, contest, machine, run

SIZES = {("tiny", 1): 32, ("tiny", 32): 96, ("base", 1): 8, ("base", 32): 32}
"""(model, batch): images of a step."""
CASES = {
    f"{size} {batch}{' network' if network else ''}": {
        "size": size,
        "batch": batch,
        "images": images,
        "network": network,
    }
    for network in (False, True)
    for (size, batch), images in SIZES.items()
}
PHOTOS = HERE.parents[1] / "shared" / "data" / "imagenet_sample.tar"


def saved(size: str, folder: Path) -> Path:
    """A model with random weights, the same in every process."""
    import torch

    from deit import VARIANTS, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

    torch.manual_seed(0)
    config = VARIANTS[f"deit-{size}-distilled-patch16-224"]
    DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)
    DeiTImageProcessor.paper(config.image_size).save_pretrained(folder)
    return folder


def photos(count: int, folder: Path) -> list[Path]:
    if PHOTOS.is_file():
        with tarfile.open(PHOTOS) as archive:
            archive.extractall(folder, filter="data")
        found = sorted(folder.rglob("*.JPEG"))
        return [found[i % len(found)] for i in range(count)]
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        colours = random.integers(0, 256, (30, 40, 3)).astype(np.uint8)
        Image.fromarray(colours).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def predicted(model: Path, files: list[Path], batch: int, engine: Any) -> Callable[[], Any]:
    from deit import Predictor

    predictor = Predictor(model, engine=engine)
    return lambda: list(predictor.stream(files, batch=batch))


def piped(model: Path, files: list[Path], batch: int) -> Callable[[], Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    classify = transformers.pipeline("image-classification", model=str(model), device="cpu")
    return lambda: list(classify(list(map(str, files)), batch_size=batch))


def engine_of(model: Path) -> Any:
    from deit import DeiTImageProcessor, load_model
    from deit.export.write import cached_engine

    return cached_engine(load_model(model), DeiTImageProcessor.from_pretrained(model), "openvino", str(model))


def engine_called(model: Path, pixels: list[np.ndarray]) -> Callable[[], Any]:
    engine = engine_of(model)
    return lambda: [engine(batch) for batch in pixels]


def openvino_called(model: Path, pixels: list[np.ndarray], hint: str) -> Callable[[], Any]:
    file = engine_of(model).folder / "model.xml"
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {"PERFORMANCE_HINT": hint.upper()})
    if hint == "latency":
        request = compiled.create_infer_request()
        return lambda: [request.infer([batch]) for batch in pixels]
    queue = openvino.AsyncInferQueue(compiled)

    def call() -> None:
        for batch in pixels:
            queue.start_async([batch])
        queue.wait_all()

    return call


FROM_FILES: dict[str, Callable[..., Callable[[], Any]]] = {
    "deit": partial(predicted, engine="auto"),
    "transformers": piped,
    "pytorch": partial(predicted, engine="torch"),
}
FROM_PIXELS: dict[str, Callable[..., Callable[[], Any]]] = {
    "deit": engine_called,
    "openvino latency": partial(openvino_called, hint="latency"),
    "openvino throughput": partial(openvino_called, hint="throughput"),
}


def work(contender: str, size: str, batch: int, images: int, network: bool) -> None:
    """A contender."""
    with tempfile.TemporaryDirectory() as scratch:
        model = saved(size, Path(scratch, "model"))
        if network:
            pixels = np.random.default_rng(0).standard_normal((images, 3, 224, 224), "float32")
            answer(FROM_PIXELS[contender](model, np.split(pixels, images // batch)))
        else:
            answer(FROM_FILES[contender](model, photos(images, Path(scratch, "photos")), batch))


def measure(case_name: str, rounds: int) -> dict[str, Any]:
    case = CASES[case_name]
    return {
        "case": case_name,
        **case,
        "rounds": rounds,
        "photos": PHOTOS.is_file(),
        **contest(__file__, FROM_PIXELS if case["network"] else FROM_FILES, case_name, case["images"], rounds, "step"),
        **machine("torch", "transformers", "openvino"),
    }


if __name__ == "__main__":
    run(__doc__, CASES, measure, work, HERE / "predict_speed.jsonl")
