"""Labels any number of images on the machines of a Ray cluster.

    python examples/predict_ray.py MODEL photos --out labels --workers 4
    find /shared/archive -name '*.jpg' | python examples/predict_ray.py MODEL - --out /shared/labels --device cuda

Without a cluster, Ray starts its workers on this machine. All machines must reach the model, the images and the output
folder under the same paths. The same command continues after a stop. At the end, `cat labels/*.jsonl` is what
`deit predict --json` prints for the same images.

Each row of the Ray dataset is a part: a few hundred paths and the file for their labels. The workers read the images
themselves, because Ray's own readers stop at the first file that can't be read.
"""

import argparse
import sys

import ray

from deit import Predictor
from deit.predict import find_images, missing_parts


class Labeller:
    """An actor, which loads the model once and keeps it."""

    def __init__(self, model, device):
        self.predictor = Predictor(model, device=device)

    def __call__(self, batch):
        parts = list(batch["item"])
        return {"images": [len(part.images) for part in parts], "unreadable": [*map(self.answered, parts)]}

    def answered(self, part):
        return part.answer(self.predictor)


parser = argparse.ArgumentParser(description="Labels images on a Ray cluster.")
parser.add_argument("model", help="a trained folder, a hub name, or what `deit export` wrote")
parser.add_argument("inputs", nargs="+", help="files, folders and patterns, as for `deit predict`; - for a list")
parser.add_argument("--out", required=True, help="folder for the labels")
parser.add_argument("--top-k", type=int, default=3, help="labels for each image")
parser.add_argument("--part", type=int, default=512, help="images in a part")
parser.add_argument("--workers", type=int, default=1, help="copies of the model")
parser.add_argument("--cores", type=int, default=1, help="cores for each copy")
parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU for each copy")


def main():
    options = parser.parse_args()
    images = find_images(options.inputs, sys.stdin)
    parts = list(missing_parts(images, options.out, model=options.model, top_k=options.top_k, size=options.part))
    print(f"{len(parts)} parts to answer", file=sys.stderr)
    if not parts:
        return
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        Labeller,
        fn_constructor_args=(options.model, options.device),
        batch_size=1,
        concurrency=min(options.workers, len(parts)),
        num_cpus=options.cores,
        num_gpus=1 if options.device.startswith("cuda") else 0,
    )
    rows = done.take_all()
    print(
        f"{sum(row['images'] for row in rows)} images, {sum(row['unreadable'] for row in rows)} unreadable",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
