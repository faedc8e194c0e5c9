"""The arguments of every verb, with their help."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from deit import choices, host


def parser() -> argparse.ArgumentParser:
    """The parser of the command. Its result has the `verb`, and the verb's options."""
    whole = argparse.ArgumentParser(
        prog="deit", description="Data-efficient image transformers: from a folder of labelled images to a classifier."
    )
    whole.add_argument("--version", action="version", version=f"deit {host.VERSION}")
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)

    _add_fit(verbs)
    _add_train(verbs)
    _add_before_training(verbs)
    _add_predict(verbs)
    _add_serve(verbs)
    _add_eval(verbs)
    _add_shown(verbs)
    _add_written(verbs)
    _add_around(verbs)
    return whole


def _add_fit(verbs: Any) -> None:
    """Adds the verbs that go the whole way."""
    verb = verbs.add_parser("quickstart", help="run the whole path on bundled handwritten digits, offline, in minutes")
    verb.add_argument(
        "--out",
        type=Path,
        default=Path("deit-quickstart"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    verb.add_argument(
        "--seed", type=int, default=0, help="seed of the split, the weights and the order of images (default: 0)"
    )
    verb.add_argument("--json", action="store_true", help="print the result as one JSON line, last on standard output")

    verb = verbs.add_parser(
        "fit",
        help="find the best classifier for a folder or list of images",
        description="Looks at the images and the machine and plans: a baseline on frozen features, a teacher, a "
        "student that learns from the teacher. Carries the plan out within its time, compares the models on the same "
        "images, and writes the recommended one to RUN/model. The same command goes on from where it was stopped. "
        "DATA is as for train. With DATA/test/CLASS/*, or the split test in a list, those images judge at the end.",
    )
    verb.add_argument("data", type=Path, metavar="DATA", help="folder or list of labelled images")
    verb.add_argument(
        "--out", type=Path, default=Path("deit-fit"), metavar="RUN", help="folder to write (default: %(default)s)"
    )
    verb.add_argument(
        "--time", type=_minutes, metavar="SPAN", help="time for everything, e.g. 10m, 30m, 2h (default: 30m)"
    )
    verb.add_argument(
        "--prefer",
        choices=get_args(choices.Prefer),
        help="what the recommended model is chosen by: the most accurate one, or the fastest of those that are not "
        "surely worse (default: accuracy)",
    )
    verb.add_argument("--plan", action="store_true", help="write RUN/plan.json, print it and end; it can be edited")
    verb.add_argument("--seed", type=int, help="seed of the held-out images, the weights and the order (default: 0)")
    _add_device(verb)
    verb.add_argument("--json", action="store_true", help="print the result as one JSON line on standard output")


def _add_train(verbs: Any) -> None:
    """Adds the verbs that take one step of it."""
    verb = verbs.add_parser(
        "train",
        help="train a recipe on a folder or list of images",
        description="Trains a recipe on labelled images. A folder holds DATA/train/CLASS/* and DATA/val/CLASS/* (or "
        "valid, validation), or just DATA/CLASS/*. Without validation images, a share of the others is held out. A "
        "list is a .csv or .jsonl file with the columns or keys path, label and, if you like, split (train, val or "
        "test). To use many GPUs or machines, start with torchrun -m deit.",
    )
    verb.add_argument("recipe", metavar="RECIPE", help="a name from `deit recipes`, FILE.py:FUNCTION, or a recipe.json")
    verb.add_argument("--data", type=Path, required=True, metavar="DATA", help="folder or list of labelled images")
    verb.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="RUN",
        help="folder for the model, the metrics, the recipe and the checkpoints",
    )
    _add_settings(verb)
    verb.add_argument("--resume", action="store_true", help="continue the run in RUN, if there is one")
    verb.add_argument(
        "--time",
        type=_minutes,
        metavar="SPAN",
        help="shorten the schedule so that training ends within this time, e.g. 90s, 30m, 1h20m",
    )

    verb = verbs.add_parser("teach", help="store a teacher's labels for the views that a recipe will train on")
    verb.add_argument("data", type=Path, metavar="DATA", help="folder or list of labelled images, as for train")
    verb.add_argument(
        "--teacher",
        required=True,
        help="timm:NAME, a trained model's folder, or FILE.py:FUNCTION that returns a module",
    )
    verb.add_argument("--recipe", required=True, metavar="RECIPE", help="recipe that will train with these labels")
    verb.add_argument(
        "--epochs",
        type=float,
        required=True,
        metavar="K",
        help="number of epochs to store labels for; a longer training repeats them",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder to write")
    _add_settings(verb)


def _add_before_training(verbs: Any) -> None:
    """Adds the verbs that are of use before a training."""
    verb = verbs.add_parser(
        "split",
        help="divide images into training, validation and test images, as a list",
        description="Writes a list of DATA's images that says which are for training, for validation and for the test. "
        "Parts that DATA has already stay as they are. The others are drawn from its training images, the same share "
        "of every class. Files with the same content stay together. No image is copied or moved. Every command takes "
        "the list as its DATA.",
    )
    verb.add_argument("data", type=Path, metavar="DATA", help="folder or list of labelled images, as for train")
    verb.add_argument(
        "--out", type=Path, required=True, metavar="LIST", help="file to write; its name ends in .csv or .jsonl"
    )
    for name, whose in (("val", "validation"), ("test", "test")):
        verb.add_argument(
            f"--{name}",
            type=float,
            metavar="SHARE",
            help=f"share of the training images that become {whose} images (default: 0.1, or none if DATA has such)",
        )
    verb.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")

    verb = verbs.add_parser(
        "pack",
        help="write images as a few tar files, resized once if you like",
        description="Writes the labelled images of DATA as a pack: a folder of tar files in WebDataset's layout with "
        "an index. Every command takes it as its DATA. With --short-side, large images are resized once, so that every "
        "epoch decodes less. Without it, their bytes are copied unchanged.",
    )
    verb.add_argument("data", type=Path, metavar="DATA", help="folder or list of labelled images, as for train")
    verb.add_argument("--out", type=Path, required=True, metavar="PACK", help="folder to write")
    verb.add_argument(
        "--short-side",
        type=_count,
        metavar="PIXELS",
        help="resize images with a longer short side to it, as JPEG files, e.g. 288 for crops of 224 (default: as they "
        "are)",
    )
    verb.add_argument("--quality", type=_count, metavar="Q", help="quality of these JPEG files, 1 to 100 (default: 90)")

    verb = verbs.add_parser("recipes", help="list the recipes, or print one as a recipe.json")
    verb.add_argument("name", nargs="?", metavar="NAME", help="recipe to print, as for train (default: list all)")
    _add_overrides(verb)


def _add_shown(verbs: Any) -> None:
    """Adds the verbs whose output a person looks at."""
    verb = verbs.add_parser(
        "explain",
        help="draw where in an image a model looked",
        description="Draws maps of the parts of an image that the class token and the distillation token rest on. "
        "Scores the maps by deletion (lower is better) and insertion (higher is better), beside random orders.",
    )
    _add_model(verb)
    verb.add_argument("image", metavar="IMAGE", help="image file")
    verb.add_argument("--out", type=Path, required=True, metavar="PNG", help="file to write")
    verb.add_argument(
        "--method",
        choices=(*get_args(choices.Method), "all"),
        default="all",
        help="how to compute the maps (default: all); occlusion is always drawn too, as a check",
    )
    verb.add_argument(
        "--target", metavar="LABEL", help="class to explain (default: the one that each head decides for)"
    )
    _add_device(verb)
    verb.add_argument("--json", action="store_true", help="print scores and maps as one JSON line")

    verb = verbs.add_parser(
        "report",
        help="write a run as one HTML page, RUN/report.html",
        description="Writes RUN/report.html: recipe, data, curves, and an evaluation of the run's model. `deit train` "
        "already writes it at its end. This command writes it again, with other images if you name them.",
    )
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="folder that `deit train --out` wrote")
    verb.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="images to evaluate the model on, as for eval (default: the run's own validation images)",
    )
    _add_device(verb)


def _add_written(verbs: Any) -> None:
    """Adds the verbs whose output another program reads."""
    verb = verbs.add_parser("convert", help="rewrite a checkpoint for another project")
    verb.add_argument("source", help="folder, weight file or hub name, in any known format")
    verb.add_argument("--to", choices=get_args(choices.Dialect), required=True, help="whose format to write")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")

    verb = verbs.add_parser(
        "export",
        help="write a classifier for a runtime, and prove that it answers the same",
        description="Writes a classifier with its labels and its preprocessing for a runtime and runs it there. The "
        "export is kept only if it answers as the PyTorch model does. int8 needs --calibrate. int8 and merging on "
        "labelled images are kept only if they cost no more than half a point of accuracy.",
    )
    _add_model(verb)
    verb.add_argument("--to", choices=get_args(choices.Format), required=True, help="format to write")
    verb.add_argument(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="folder or list of labelled images; they check the export, calibrate int8, and judge int8 and merging",
    )
    verb.add_argument(
        "--merge",
        type=_merge,
        metavar="N|auto",
        help="patch tokens that each block merges with similar ones, for speed; auto takes as many as the accuracy on "
        "--calibrate allows (default: as the model does)",
    )
    verb.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; a former export there is replaced after the new one has passed its check",
    )


def _add_around(verbs: Any) -> None:
    """Adds the verbs that are about this installation and not about images."""
    verb = verbs.add_parser(
        "doctor",
        help="show what is installed, what this machine can do, and what is broken",
        description="Shows what is installed, what this machine can do, what the commands choose on it and why, and "
        "what is broken, with the command that mends it. The exit status is 1 if something is broken.",
    )
    verb.add_argument("--json", action="store_true", help="print the findings as one JSON line")

    verb = verbs.add_parser(
        "completion",
        help="print a script that lets a shell complete deit's commands",
        description="Prints a script that lets a shell complete commands, options, recipes and file names. For bash, "
        "write it to ~/.local/share/bash-completion/completions/deit; for zsh, to a file _deit in a folder of $fpath; "
        "for fish, to ~/.config/fish/completions/deit.fish.",
    )
    verb.add_argument("shell", choices=get_args(choices.Shell), help="the shell that reads the script")


def _add_predict(verbs: Any) -> None:
    verb = verbs.add_parser(
        "predict",
        help="label image files",
        description="Labels any number of images and prints each batch as soon as it is computed. An image that "
        "can't be read becomes a row with the reason, and the exit status is 1 at the end.",
    )
    _add_model(verb)
    verb.add_argument(
        "images",
        nargs="+",
        metavar="INPUT",
        help="image files, folders of images at any depth, packs, patterns like 'photos/**/*.jpg', or - for paths "
        "on standard input",
    )
    verb.add_argument("--top-k", type=_count, default=3, metavar="K", help="labels for each image (default: 3)")
    _add_head(verb)
    for name, what in (("json", "one JSON line for each image"), ("csv", "one line of a table for each image")):
        verb.add_argument(
            f"--{name}",
            nargs="?",
            const="-",
            metavar="FILE",
            help=f"{what}, on standard output or in FILE; FILE grows in parts, so the same command continues after "
            "a stop",
        )
    verb.add_argument("--parquet", metavar="FILE", help="one row for each image, in a Parquet FILE that grows likewise")
    verb.add_argument("--batch", type=_count, default=32, metavar="B", help="images computed at once (default: 32)")
    verb.add_argument("--shard", metavar="i/N", help="only every N-th image, beginning with the i-th (1 to N)")
    _add_device(verb)
    _add_engine(verb, "auto takes OpenVINO for many images, and for a list on standard input")

    verb = verbs.add_parser(
        "calibrate",
        help='make probabilities honest, and let a model say "I don\'t know"',
        description="Finds two numbers for each head, by labelled images that the model was not trained on: a "
        "temperature for its probabilities, and the probability from which on a label is sure. They are stored in "
        "MODEL, and later predictions use them.",
    )
    verb.add_argument("model", type=Path, metavar="MODEL", help="folder of a trained model")
    verb.add_argument("--data", type=Path, required=True, metavar="DATA", help="labelled images, as for eval")
    verb.add_argument(
        "--split", choices=get_args(choices.Part), help="which part of DATA, if it has parts (default: val)"
    )
    verb.add_argument(
        "--error-rate",
        type=float,
        default=0.05,
        metavar="E",
        help="share of images that may get one label that is sure and wrong (default: 0.05)",
    )
    _add_device(verb)
    verb.add_argument("--json", action="store_true", help="print the result as one JSON line")


def _add_serve(verbs: Any) -> None:
    verb = verbs.add_parser(
        "serve",
        help="serve labels over HTTP, with a page to try",
        description="Answers POST /v1/classify with labels, and POST /v1/explain with maps of what they rest on. Shows "
        "a page at /. SIGTERM ends the server after it has answered every request that arrived.",
    )
    _add_model(verb)
    verb.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all addresses of this machine (default: %(default)s)",
    )
    verb.add_argument(
        "--port", type=_port, default=8000, help="port to listen on; 0 for any free one (default: %(default)s)"
    )
    _add_head(verb)
    _add_device(verb)
    _add_engine(verb, "auto takes OpenVINO")
    verb.add_argument(
        "--max-batch",
        type=_count,
        default=32,
        metavar="B",
        help="maximum number of images computed together, and in one request (default: %(default)s)",
    )
    verb.add_argument(
        "--max-wait-ms",
        type=float,
        default=5.0,
        metavar="MS",
        help="how many milliseconds an image waits for others to share its batch (default: 5)",
    )
    verb.add_argument(
        "--queue",
        type=_count,
        default=256,
        metavar="N",
        help="maximum number of waiting images; further requests get status 503 (default: %(default)s)",
    )
    verb.add_argument(
        "--max-bytes",
        type=_size,
        default=20 * 2**20,
        metavar="SIZE",
        help="maximum size of a request, like 500KiB or 20MiB (default: 20MiB)",
    )
    verb.add_argument(
        "--max-pixels", type=_count, metavar="P", help="maximum number of pixels of an image (default: 50 million)"
    )
    verb.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="maximum seconds for a request to arrive, and again for its answer (default: 30)",
    )
    verb.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file of keys, one on each line; /v1/* then needs Authorization: Bearer KEY",
    )
    verb.add_argument("--private", action="store_true", help="/model and /metrics need a key too")
    verb.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which the server may be asked, beyond localhost and --host; can be given many times",
    )


def _add_eval(verbs: Any) -> None:
    verb = verbs.add_parser(
        "eval",
        help="measure a model on labelled images, or compare two models",
        description="Measures a model on labelled images: the accuracy of every head, calibration, classes and "
        "confusions. DATA is a folder, with DATA/test/CLASS/* or DATA/val/CLASS/*, or with DATA/CLASS/*. Or it is a "
        ".csv or .jsonl list with the columns or keys path and label. Classes are found in the model by name.",
    )
    _add_model(verb)
    verb.add_argument("--data", type=Path, required=True, metavar="DATA", help="folder or list of labelled images")
    verb.add_argument(
        "--split",
        choices=get_args(choices.Part),
        help="which part of DATA, if it has parts (default: test, or val if there is no test)",
    )
    _add_head(verb)
    verb.add_argument(
        "--crop-ratio",
        type=float,
        metavar="R",
        help="side of the crop divided by the resized image's, at most 1 (default: the model's own)",
    )
    verb.add_argument(
        "--compare", metavar="OTHER", help="second model to compare with, on the same images, prepared in its own way"
    )
    _add_device(verb)
    verb.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON line on standard output, and the tables on standard error",
    )
    verb.add_argument("--report", type=Path, metavar="FILE.html", help="write the result as a page too")


def _add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="change a field of the recipe, e.g. optim.lr=1e-3 or 'schedule.total=epochs(30)'; may be repeated",
    )


def _add_settings(verb: argparse.ArgumentParser) -> None:
    _add_overrides(verb)
    _add_device(verb)


def _add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda (default: %(default)s)")


def _add_engine(verb: argparse.ArgumentParser, auto: str) -> None:
    verb.add_argument(
        "--engine",
        choices=get_args(choices.Runtime),
        default="auto",
        help=f"what computes (default: auto); on a CPU {auto}, if it is installed; otherwise PyTorch computes",
    )


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="folder of a trained model, or a hub name")


def _add_head(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--head",
        choices=get_args(choices.Head),
        default="fused",
        help="which head of a distilled model decides (default: fused)",
    )


def _size(text: str) -> int:
    """A number of bytes like 500KiB or 20MiB."""
    number, unit = text.rstrip("KMGiB"), text[len(text.rstrip("KMGiB")) :]
    units = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    if not number.isdecimal() or not int(number) or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size like 500KiB or 20MiB, found {text!r}")
    return int(number) * units[unit]


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _merge(text: str) -> int | str:
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, or auto, found {text!r}")
    return text if text == "auto" else int(text)


def _minutes(text: str) -> float:
    """A span of time like 90s, 1.5h or 4m30s, in minutes."""
    number = r"(\d+\.?\d*|\.\d+)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text, re.ASCII)
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    whole = 60 * hours + minutes + seconds / 60
    if not 0 < whole < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time like 90s, 30m, 1.5h or 1h20m, found {text!r}")
    return whole
