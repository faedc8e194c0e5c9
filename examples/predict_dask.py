"""Labels any number of images on the machines of a Dask cluster.

    python examples/predict_dask.py MODEL photos --out labels --workers 4
    find /shared/archive -name '*.jpg' | python examples/predict_dask.py MODEL - --out /shared/labels \
        --scheduler tcp://head:8786

This page uses Dask and not Spark, because a Dask worker is an ordinary Python process that keeps its model in memory,
starts under Slurm, Kubernetes or ssh alike, and needs no Java.

Without a scheduler, the workers start on this machine. Start your own with `dask worker --nthreads 1 ADDRESS`, one for
each copy of the model. All machines must reach the model, the images and the output folder under the same paths. The
same command continues after a stop. At the end, `cat labels/*.jsonl` is what `deit predict --json` prints for the same
images.
"""

import argparse
import sys
from itertools import islice

from dask.distributed import Client, LocalCluster, WorkerPlugin, as_completed, get_worker

from deit import Predictor
from deit.predict import find_images, missing_parts

AHEAD = 4
"""Number of parts that are sent for each worker. A scheduler that got all parts at once would hold every path."""


class Model(WorkerPlugin):
    """Loads the model in each worker once, in workers that join later too."""

    name = "deit"

    def __init__(self, model, device):
        self.model, self.device = model, device

    def setup(self, worker):
        worker.predictor = Predictor(self.model, device=self.device)


def label(part):
    return len(part.images), part.answer(get_worker().predictor)


parser = argparse.ArgumentParser(description="Labels images on a Dask cluster.")
parser.add_argument("model", help="a trained folder, a hub name, or what `deit export` wrote")
parser.add_argument("inputs", nargs="+", help="files, folders and patterns, as for `deit predict`; - for a list")
parser.add_argument("--out", required=True, help="folder for the labels")
parser.add_argument("--top-k", type=int, default=3, help="labels for each image")
parser.add_argument("--part", type=int, default=512, help="images in a part")
parser.add_argument("--workers", type=int, default=1, help="workers to start on this machine")
parser.add_argument("--scheduler", help="address of a cluster that is running already")
parser.add_argument("--device", default="cpu", help="cpu, or cuda")


def main():
    options = parser.parse_args()
    images = find_images(options.inputs, sys.stdin)
    parts = missing_parts(images, options.out, model=options.model, top_k=options.top_k, size=options.part)
    cluster = options.scheduler or LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None)
    with Client(cluster) as client:
        client.register_plugin(Model(options.model, options.device))
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        waiting = as_completed(
            [client.submit(label, part, pure=False) for part in islice(parts, AHEAD * max(workers, 1))]
        )
        total = unreadable = 0
        for done in waiting:
            counts = done.result()
            total, unreadable = total + counts[0], unreadable + counts[1]
            for part in islice(parts, 1):
                waiting.add(client.submit(label, part, pure=False))
    print(f"{total} images, {unreadable} unreadable", file=sys.stderr)


if __name__ == "__main__":
    main()
