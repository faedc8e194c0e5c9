"""What each verb does: it calls one function and prints. Most imports wait until the verb is known."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.cli.arguments import parser
from deit.terminal import shortened, shown


def quickstart(options: argparse.Namespace) -> None:
    from rich.console import Console

    from deit.quickstart import quickstart

    result = quickstart(options.out, seed=options.seed, console=Console(stderr=options.json))
    if options.json:
        print(json.dumps(vars(result)))


def fit(options: argparse.Namespace) -> None:
    from rich.console import Console

    from deit.fit.work import fit

    fitted = fit(
        options.data,
        options.out,
        minutes=options.time,
        prefer=options.prefer,
        seed=options.seed,
        device=options.device,
        only_plan=options.plan,
        console=Console(stderr=options.json),
    )
    if options.json and fitted:
        print(json.dumps(fitted.to_dict()))


def train(options: argparse.Namespace) -> None:
    from deit.data.folders import has_split, read_data
    from deit.data.splitting import without_test_images
    from deit.evaluate.alarms import chosen_by_validation
    from deit.recipe import LinearProbe, MaskedImage
    from deit.recipes import find_to_run
    from deit.report.live import LivePage
    from deit.train.build import find_sources
    from deit.train.loop import train

    recipe = find_to_run(options.recipe, options.settings)
    find_sources(recipe)
    labelled = not isinstance(recipe.objective, MaskedImage)
    splits = read_data(options.data, holdout=recipe.data.holdout, seed=recipe.seed, labelled=labelled)
    run = train(
        recipe,
        *splits,
        options.out,
        device=options.device,
        resume=options.resume,
        minutes=options.time,
        receivers=[LivePage()],
        onward="continue with --resume",
    )
    if os.environ.get("RANK", "0") == "0":
        measured = f"accuracy {run.score:.4f}" if labelled else f"loss {-run.score:.4f}"
        print(
            f"{run.model}: {measured} on {len(splits[1])} validation images, {run.seconds:.0f} s",
            flush=True,
        )
        _report_training(options, splits[1])
        if labelled and not has_split(options.data, "test"):
            print(without_test_images(options.data), file=sys.stderr)
        elif labelled and not isinstance(recipe.objective, LinearProbe):
            command = shlex.join(["deit", "eval", str(run.model), "--data", str(options.data)])
            print(chosen_by_validation(command), file=sys.stderr)


def _report_training(options: argparse.Namespace, val_split: Any) -> None:
    """Writes the report of a run. The run itself is complete, so a failure here is only a warning."""
    from deit.report import document

    try:
        print(document.of_training(options.out, val_split, device=options.device))
    except Exception as error:
        print(
            f"deit train: the model is trained and saved, but its report is not written "
            f"({shortened(shown(error))}); run `deit report {options.out}` to try again",
            file=sys.stderr,
        )


def split(options: argparse.Namespace) -> None:
    from deit.data.splitting import split

    print("\n".join(split(options.data, options.out, val=options.val, test=options.test, seed=options.seed)))


def pack(options: argparse.Namespace) -> None:
    from deit.data.packing import pack

    told = time.monotonic()

    def progress(packed: int, images: int) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            print(f"\r{packed:,} of {images:,} images", end="", file=sys.stderr, flush=True)

    found = pack(
        options.data,
        options.out,
        short_side=options.short_side,
        quality=options.quality,
        progress=progress if sys.stderr.isatty() else None,
    )
    print("\n".join(map(shown, found)))


def teach(options: argparse.Namespace) -> None:
    from deit.data.folders import read_data
    from deit.recipes import find_to_run
    from deit.train.labels import teach
    from deit.train.teacher import find_teacher

    recipe = find_to_run(options.recipe, [*options.settings, f"objective.teacher={options.teacher}"])
    find_teacher(recipe)
    split, validation = read_data(options.data, holdout=recipe.data.holdout, seed=recipe.seed)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    place = {"device": options.device, "rank": rank, "world": world}
    print(teach(recipe, split, options.out, epochs=options.epochs, validation=validation, **place))


def recipes(options: argparse.Namespace) -> None:
    from deit.recipe import override
    from deit.recipes import find, shipped, summary

    if options.name:
        print(json.dumps(override(find(options.name), options.settings).to_dict(), indent=2))
        return
    width = max(map(len, shipped()))
    for name, function in shipped().items():
        print(f"{name:{width}}  {summary(function)}")


def predict(options: argparse.Namespace) -> int:
    from deit.predict.bulk import parse_shard, predict_files

    unreadable = predict_files(
        options.model,
        options.images,
        _destination(options),
        head=options.head,
        top_k=options.top_k,
        batch=options.batch,
        shard=parse_shard(options.shard) if options.shard else (1, 1),
        device=options.device,
        engine=options.engine,
    )
    return 1 if unreadable else 0


def _destination(options: argparse.Namespace) -> Any:
    """Where --json, --csv or --parquet put the rows: a file, or the name of the format for standard output."""
    chosen = [
        (name, suffix, value)
        for name, suffix, value in (
            ("json", ".jsonl", options.json),
            ("csv", ".csv", options.csv),
            ("parquet", ".parquet", options.parquet),
        )
        if value
    ]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name, _, _ in chosen)} exclude each other; choose one")
    for name, suffix, value in chosen:
        streams = name != "parquet"
        if streams and value == "-":
            return name
        if not value.endswith(suffix):
            otherwise = f", or put --{name} last for standard output" if streams else ""
            raise ValueError(f"expected a {suffix} file after --{name}, found {value}; give such a name{otherwise}")
        return Path(value)
    return "text"


def calibrate(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from deit.predict.calibrate import calibrate

    found = calibrate(
        options.model, options.data, split=options.split, error_rate=options.error_rate, device=options.device
    )
    for sentence in found.alarms():
        print(sentence, file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.images} images; at most {found.error_rate:.3g} of new images get one label that is sure and wrong")
    for name, head in found.heads.items():
        print(
            f"{name:12}  temperature {head.temperature:.3f}  negative log likelihood {head.nll[0]:.4f} -> "
            f"{head.nll[1]:.4f}  sure from {head.threshold:.3f} on: {head.answered:.1%} of images"
        )


def serve(options: argparse.Namespace) -> None:
    from deit.predict.predictor import Predictor
    from deit.serve.limits import MAX_PIXELS, Service, read_keys
    from deit.serve.server import serve

    def keys() -> tuple[str, ...]:
        return read_keys(options.api_key_file) if options.api_key_file else ()

    serve(
        lambda: Predictor(options.model, head=options.head, device=options.device, engine=options.engine),
        Service(
            max_batch=options.max_batch,
            max_wait_ms=options.max_wait_ms,
            queue=options.queue,
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels or MAX_PIXELS,
            timeout=options.timeout,
            keys=keys(),
            private=options.private,
            hosts=tuple(options.allowed_host),
        ),
        options.model,
        host=options.host,
        port=options.port,
        keys=keys,
        listening=lambda predictor, address: print(
            f"serving {options.model} ({predictor.engine}) at {address}", flush=True
        ),
    )


def evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from deit.evaluate.models import examine_files
    from deit.evaluate.tables import show
    from deit.report import document
    from deit.report import run as report_run

    if options.report and options.report.is_dir():
        raise ValueError(
            f"expected a file after --report, found the folder {options.report}; give a name in it, like "
            f"{options.report / 'report.html'}"
        )
    found = examine_files(
        options.model,
        options.data,
        split=options.split,
        head=options.head,
        crop_ratio=options.crop_ratio,
        other=options.compare,
        device=options.device,
    )
    show(found, Console(stderr=options.json), report_run.remembered(report_run.record_of(found), found))
    if options.json:
        print(json.dumps(found.to_dict()), flush=True)
    if options.report:
        print(document.of_evaluation(options.report, found, device=options.device), file=sys.stderr)


def explain(options: argparse.Namespace) -> None:
    from deit.explain.explanation import explain_file
    from deit.explain.maps import METHODS
    from deit.explain.picture import figure
    from deit.files import replacing
    from deit.locks import turn

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"expected a .png file after --out, found {options.out}; give a name that ends in .png")
    if options.out.exists() and Path(options.image).exists() and options.out.samefile(options.image):
        raise ValueError(f"--out {options.out} is the image itself; give the figure another name")
    found = explain_file(
        options.model,
        options.image,
        target=options.target,
        device=options.device,
        methods=METHODS if options.method == "all" else (options.method,),
    )
    with turn(options.out), replacing(options.out) as temporary:
        figure(found).save(temporary, format="PNG")
    print(json.dumps({**found.to_dict(), "figure": str(options.out)}) if options.json else f"{found}\n\n{options.out}")


def report(options: argparse.Namespace) -> None:
    from deit.report import document

    print(document.of_run(options.run_folder, options.data, device=options.device))


def doctor(options: argparse.Namespace) -> int:
    from deit.doctor import examine, text

    found = examine()
    print(json.dumps(found) if options.json else text(found))
    return 1 if found["broken"] else 0


def completion(options: argparse.Namespace) -> None:
    from deit.completion import script

    print(script(parser(), options.shell))


def convert(options: argparse.Namespace) -> None:
    from deit.export.convert import convert

    print(convert(options.source, options.to, options.out))


def export(options: argparse.Namespace) -> None:
    from deit.export.write import export

    print(export(options.model, options.to, options.out, calibrate=options.calibrate, merge=options.merge))


BY_NAME: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "quickstart": quickstart,
    "fit": fit,
    "train": train,
    "split": split,
    "pack": pack,
    "teach": teach,
    "recipes": recipes,
    "predict": predict,
    "calibrate": calibrate,
    "serve": serve,
    "eval": evaluate,
    "explain": explain,
    "report": report,
    "doctor": doctor,
    "completion": completion,
    "convert": convert,
    "export": export,
}
"""What each verb runs. The result is the exit status; None is 0."""
