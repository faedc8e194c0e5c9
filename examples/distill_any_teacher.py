"""Distils whatever gives logits into a DeiT: here the nearest neighbours of scikit-learn.

    python examples/distill_any_teacher.py --data deit-quickstart/data --out runs/distilled
    python examples/distill_any_teacher.py --data photos --out runs/distilled --teacher mine.py:teacher

FILE.py:FUNCTION names a teacher. The function takes no arguments and returns a torch module that maps images (B,
channels, height, width) to logits. The attributes of the module say how it wants the images and what its outputs mean.
What it doesn't say is taken from the student. `teacher` below is such a function.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.neighbors import KNeighborsClassifier

from deit import DeiTImageProcessor
from deit.data import read_data
from deit.recipe import Distilled, epochs
from deit.recipes.digits import digits
from deit.train import train

SIDE = 16
HOLDOUT = 0.1  # of the training images, if there are no others for validation


class Neighbours(torch.nn.Module):
    """The nearest neighbours among the training images, by their pixels, as a torch module."""

    mean, std, image_size = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SIDE  # pixels from 0 to 1

    def __init__(self, classifier, classes):
        super().__init__()
        self.classifier, self.classes = classifier, classes

    def forward(self, pixels):
        probabilities = self.classifier.predict_proba(pixels.flatten(1).cpu().numpy())
        return torch.from_numpy(probabilities).clamp(min=1e-6).log().to(pixels)


def teacher():
    """The neighbours in the folder that the environment variable TEACHER_DATA names."""
    split, _ = read_data(os.environ["TEACHER_DATA"], holdout=HOLDOUT, seed=0)
    processor = DeiTImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, do_normalize=False, do_convert_rgb=True
    )
    pixels = processor(list(split.files), return_tensors="np").pixel_values
    classifier = KNeighborsClassifier(5, weights="distance").fit(pixels.reshape(len(split), -1), split.labels)
    return Neighbours(classifier, split.classes)


parser = argparse.ArgumentParser(description="Distils any PyTorch module into a DeiT.")
parser.add_argument("--data", required=True, help="folder or list of labelled images")
parser.add_argument("--out", required=True, help="folder of the run")
parser.add_argument("--teacher", default=f"{Path(__file__).resolve()}:teacher", help="FILE.py:FUNCTION")
parser.add_argument("--kind", default="hard", choices=["hard", "soft"], help="learn from decisions or probabilities")
parser.add_argument("--epochs", type=float, default=50, help="length of training")


def main():
    options = parser.parse_args()
    os.environ["TEACHER_DATA"] = options.data
    recipe = digits()
    recipe = replace(
        recipe,
        data=replace(recipe.data, holdout=HOLDOUT),
        objective=Distilled(teacher=options.teacher, kind=options.kind),
        schedule=replace(recipe.schedule, total=epochs(options.epochs), warmup=epochs(options.epochs / 16)),
    )
    splits = read_data(options.data, holdout=HOLDOUT, seed=recipe.seed)
    run = train(recipe, *splits, options.out)
    print(f"{run.score:.3f} of the validation images are right; the model is in {run.model}")


if __name__ == "__main__":
    main()
