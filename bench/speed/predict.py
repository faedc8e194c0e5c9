"""Speed from JPEG files to labels on the CPU, beside transformers' pipeline; the network's speed, beside bare OpenVINO.

    python -m bench.speed.predict [--rounds 7] [--case "tiny 1"|"tiny 32 network"|...]

Models have random weights and 1,000 classes.

In the cases with files, `deit` does the work of `deit predict --engine auto`, `pytorch` does the same with `--engine
torch`, and `transformers` is `pipeline("image-classification")` at its defaults. The photos are ImageNet's if
`shared/data/imagenet_sample.tar` is beside the repository, otherwise coarse random pictures of 500x375 pixels.

The cases with `network` begin with `pixel_values`. There `deit` is the engine that `Predictor` calls, and the peers are
OpenVINO itself with the same file: one call after the other (`latency`), or as many at once as OpenVINO advises
(`throughput`).
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from bench.harness import Comparison, answer

if TYPE_CHECKING:
    from deit.export.engines import Engine

SIZES = {("tiny", 1): 32, ("tiny", 32): 96, ("base", 1): 8, ("base", 32): 32}
"""Number of images in a step, by (model, batch)."""
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
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample.tar"

Call = Callable[[], Any]


def saved(size: str, folder: Path) -> Path:
    """Saves a model with random weights, which are the same in every process."""
    import torch

    from deit import VARIANTS, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

    torch.manual_seed(0)
    config = VARIANTS[f"deit-{size}-distilled-patch16-224"]
    DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)
    DeiTImageProcessor.paper(config.image_size).save_pretrained(folder)
    return folder


def photos(count: int, folder: Path) -> list[Path]:
    """Writes photos to `folder`, and returns `count` files. If there are fewer photos, files are repeated."""
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


def predicted(model: Path, files: list[Path], batch: int, engine: Literal["auto", "torch"]) -> Call:
    from deit import Predictor

    predictor = Predictor(model, engine=engine)
    return lambda: list(predictor.stream(files, batch=batch))


def piped(model: Path, files: list[Path], batch: int) -> Call:
    import transformers

    transformers.logging.set_verbosity_error()
    classify = transformers.pipeline("image-classification", model=str(model), device="cpu")
    return lambda: list(classify(list(map(str, files)), batch_size=batch))


def engine_of(model: Path) -> Engine:
    """The model in OpenVINO, as `Predictor` uses it."""
    from deit.export.cache import cached_engine
    from deit.model.load import load_classifier

    return cached_engine(load_classifier(model), "openvino")


def engine_called(model: Path, batches: list[np.ndarray]) -> Call:
    engine = engine_of(model)
    return lambda: [engine(batch) for batch in batches]


def openvino_called(model: Path, batches: list[np.ndarray], hint: Literal["latency", "throughput"]) -> Call:
    import openvino

    file = engine_of(model).folder / "model.xml"
    compiled = openvino.Core().compile_model(file, "CPU", {"PERFORMANCE_HINT": hint.upper()})
    if hint == "latency":
        request = compiled.create_infer_request()
        return lambda: [request.infer([batch]) for batch in batches]
    queue = openvino.AsyncInferQueue(compiled)

    def call() -> None:
        for batch in batches:
            queue.start_async([batch])
        queue.wait_all()

    return call


FROM_FILES: dict[str, Callable[[Path, list[Path], int], Call]] = {
    "deit": partial(predicted, engine="auto"),
    "transformers": piped,
    "pytorch": partial(predicted, engine="torch"),
}
FROM_PIXELS: dict[str, Callable[[Path, list[np.ndarray]], Call]] = {
    "deit": engine_called,
    "openvino latency": partial(openvino_called, hint="latency"),
    "openvino throughput": partial(openvino_called, hint="throughput"),
}


def contenders(case: Mapping[str, Any]) -> Iterable[str]:
    return FROM_PIXELS if case["network"] else FROM_FILES


def work(contender: str, size: str, batch: int, images: int, network: bool) -> None:
    """Classifies photos or random pixels with a contender whenever it is asked to."""
    with tempfile.TemporaryDirectory() as scratch:
        model = saved(size, Path(scratch, "model"))
        if network:
            pixels = np.random.default_rng(0).standard_normal((images, 3, 224, 224), np.float32)
            answer(FROM_PIXELS[contender](model, np.split(pixels, images // batch)))
        else:
            answer(FROM_FILES[contender](model, photos(images, Path(scratch, "photos")), batch))


COMPARISON = Comparison(
    module="bench.speed.predict",
    description=__doc__,
    records=Path(__file__).with_suffix(".jsonl"),
    cases=CASES,
    contenders=contenders,
    work=work,
    step="step",
    images="images",
    packages=("torch", "transformers", "openvino"),
    circumstances={"photos": PHOTOS.is_file()},
)

if __name__ == "__main__":
    COMPARISON.main()
