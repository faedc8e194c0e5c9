"""Folders of single-coloured images, and what is found in them."""

from PIL import Image
from support.runs import small_recipe

from deit.config import ConvNetConfig
from deit.data.folders import read_data
from deit.recipe import SGD, Cosine, steps

CONVNET = small_recipe(
    name="convnet",
    model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
    optim=SGD(lr=1e-2, per_images=8),
    schedule=Cosine(total=steps(4)),
)


def save(path, colour=(200, 100, 50), size=(12, 12), **options):
    """A file of one colour, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def names(split):
    return [path.name for path in split.files]


def found_in(root, **options):
    """Its training and validation images."""
    return read_data(root, **{"holdout": 0.1, "seed": 0, **options})
