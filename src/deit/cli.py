"""The `deit` command: each verb parses, calls one function and prints. Imports wait until a verb is known."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deit import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed with a sentence, 2 usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        print(f"deit {options.verb}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deit", description="Data-efficient image transformers: from a folder of "
                                     "labelled images to a classifier.")
    parser.add_argument("--version", action="version", version=f"deit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    verb = verbs.add_parser("quickstart", help="the whole path on bundled handwritten digits, offline, in minutes")
    verb.add_argument("--out", type=Path, default=Path("deit-quickstart"), metavar="DIR",
                      help="folder to write (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order (default: 0)")
    verb.add_argument("--json", action="store_true", help="print the result as one JSON line, last on standard output")
    verb.set_defaults(run=_quickstart)

    verb = verbs.add_parser("predict", help="labels for image files")
    verb.add_argument("model", help="folder of a trained model, or a hub name")
    verb.add_argument("images", nargs="+", metavar="IMAGE")
    verb.add_argument("--top-k", type=int, default=3, metavar="K", help="labels for each image (default: 3)")
    verb.add_argument("--head", choices=("fused", "class", "distillation", "softmax"), default="fused",
                      help="which head of a distilled model decides (default: fused)")
    verb.add_argument("--json", action="store_true", help="one JSON line for each image")
    verb.set_defaults(run=_predict)

    verb = verbs.add_parser("convert", help="rewrite a checkpoint for another project")
    verb.add_argument("source", help="folder, weight file or hub name, in any known format")
    verb.add_argument("--to", choices=("hf", "timm", "original"), required=True)
    verb.add_argument("--out", type=Path, required=True, metavar="DIR")
    verb.set_defaults(run=_convert)
    return parser


def _quickstart(options: argparse.Namespace) -> None:
    from rich.console import Console

    from deit.quickstart import quickstart

    result = quickstart(options.out, seed=options.seed, console=Console(stderr=options.json))
    if options.json:
        print(json.dumps(vars(result)))


def _predict(options: argparse.Namespace) -> int:
    from deit.decode import ImageError
    from deit.predict import Predictor

    predictor = Predictor(options.model, head=options.head)
    failed = 0
    for path in options.images:
        try:
            [labels] = predictor([path], top_k=options.top_k)
        except ImageError as error:
            failed += 1
            print(f"deit predict: {error}", file=sys.stderr)
            continue
        print(_row(path, labels, options.json))
    return 1 if failed else 0


def _row(path: str, labels: list[dict[str, Any]], as_json: bool) -> str:
    if as_json:
        return json.dumps({"image": path, "labels": labels})
    return f"{path}: " + ", ".join(f"{found['label']} {found['score']:.3f}" for found in labels)


def _convert(options: argparse.Namespace) -> None:
    from deit.convert import convert

    print(convert(options.source, options.to, options.out))
