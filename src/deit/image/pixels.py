"""Turns one image into pixels: converts, resizes, crops, rescales and normalises it by an image processor's options.

The values equal those of the Pillow backend of `transformers` up to float rounding.

Legend: B images, C channels, H rows, W columns. Arrays inside this file are (H, W, C); sizes are (height, width),
except in calls to Pillow, which takes (width, height).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from deit.image.decode import Decoded, convert, decode, is_encoded, name_of, reading


def type_of(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def flatten(images: Any) -> Iterator[Any]:
    """The single images in lists, nested lists and batches of 4 dimensions."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from flatten(entry)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def pixel_values(source: Any, options: Mapping[str, Any], name: str) -> np.ndarray:
    """One image as (C, H, W) or (H, W, C) in float32, by the processor's `options`."""
    array, in_unit = levels(source, options, name)
    first = options["data_format"] == "channels_first"
    out = np.empty(array.transpose(2, 0, 1).shape if first else array.shape, np.float32)
    normalisation(array.shape[2], in_unit, options, name).apply(array, out, channels_first=first)
    return out


def levels(source: Any, options: Mapping[str, Any], name: str) -> tuple[np.ndarray, bool]:
    """One image as (H, W, C), resized and cropped by the processor's `options`, and whether floats in 0..1 became
    8-bit levels for the resize."""
    full, box, in_unit = None, None, False
    pixels: Any  # a Pillow image while that is possible, then (H, W, C) or (H, W)
    if isinstance(source, Image.Image) or is_encoded(source):
        image, full, box = _picture(source, options)
        pixels = image if image.mode in ("RGB", "L") else np.asarray(image)
    else:
        pixels = _channels_last(_to_numpy(source, name), options, name)
    if options["do_resize"]:
        if isinstance(pixels, np.ndarray):
            pixels, in_unit = _to_picture(pixels, name)
        height, width = _target_size(full or (pixels.height, pixels.width), options["size"])
        if options["do_center_crop"] and height * width > _LARGE:
            (height, width), box = _middle(pixels, (height, width), options["crop_size"], box)
        pixels = pixels.resize((width, height), options["resample"], box=box)
    array = np.asarray(pixels)
    if array.ndim == 2:
        array = array[..., None]
    if options["do_center_crop"]:
        array = _center_crop(array, **options["crop_size"])
    return array, in_unit


def _picture(source: Any, options: Mapping[str, Any]) -> Decoded:
    """A file or Pillow image with the channels that the options need, decoded no larger than the resize needs."""
    if isinstance(source, Image.Image):
        decoded = Decoded(source, (source.height, source.width), None)
    else:
        size = options["size"]
        side = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        decoded = decode(source, side if options["do_resize"] else None)
    with reading(name_of(source)):
        decoded.image.load()
        return decoded._replace(image=convert(decoded.image, _wanted_mode(options), name_of(source)))


def _wanted_mode(options: Mapping[str, Any]) -> str | None:
    if options["do_convert_rgb"] is not None:
        return "RGB" if options["do_convert_rgb"] else None
    mean = options["image_mean"]
    return {1: "L", 3: "RGB"}.get(len(mean)) if isinstance(mean, tuple) else "RGB"


def _to_numpy(source: Any, name: str) -> np.ndarray:
    """An array or tensor in a NumPy type that NumPy can compute with: bool, integer, float32 or float64."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() and source.itemsize < 4 else source).numpy()
    elif tensorflow is not None and isinstance(source, tensorflow.Tensor):
        source = source.numpy()
    if not isinstance(source, np.ndarray):
        raise ValueError(
            f"{name} is {type_of(source)}, expected a PIL image, a NumPy array, a torch tensor, a path or the bytes of "
            f"a file; convert it first"
        )
    if source.dtype == np.float16:
        source = source.astype(np.float32)
    if source.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {source.dtype}, expected integers or floats; convert it first")
    if source.dtype.kind == "f" and not np.isfinite(source).all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite pixels; replace them first")
    return source


def _channels_last(array: np.ndarray, options: Mapping[str, Any], name: str) -> np.ndarray:
    """An array image as (H, W, C), converted to three channels if the options say so."""
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected (C, H, W) or (H, W, C), all above 0; "
            f"give a grey image a channel axis with array[None]"
        )
    layout = options["input_data_format"] or _infer_layout(array, name)
    if layout == "channels_first":
        array = array.transpose(1, 2, 0)
    if options["do_rescale"] and array.dtype.kind == "f" and 0 < array.max() <= 1 and array.min() >= 0:
        warnings.warn(
            f"{name} holds floats in 0..1, which do_rescale=True scales down again; pass do_rescale=False with it",
            UserWarning,
            stacklevel=2,
        )
    if not options["do_convert_rgb"]:
        return array
    channels = array.shape[2]
    if channels not in (1, 3, 4):
        raise ValueError(f"{name} has {channels} channels, expected 1, 3 or 4 to convert to RGB; check its layout")
    return np.repeat(array, 3, axis=2) if channels == 1 else array[..., :3]


def _infer_layout(array: np.ndarray, name: str) -> str:
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    if not first and not last:
        raise ValueError(
            f"{name} has shape {array.shape}, expected 1, 3 or 4 channels on the first or last axis; "
            f"pass input_data_format if it has another number of channels"
        )
    if first and last:
        warnings.warn(
            f"{name} has shape {array.shape}, which fits two layouts; it is taken as (C, H, W), "
            "pass input_data_format to decide",
            UserWarning,
            stacklevel=2,
        )
    return "channels_first" if first else "channels_last"


def _to_picture(array: np.ndarray, name: str) -> tuple[Image.Image, bool]:
    """An (H, W, C) array as the 8-bit image that Pillow resizes, and whether its values were in 0..1.

    The rule is that of transformers: whole numbers are taken as they are, other floats are cut (not rounded) to n/255.
    """
    in_unit = False
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        whole = array.dtype.kind != "f" or np.allclose(array, np.trunc(array))
        in_unit = not whole
        if low < 0 or high > (255 if whole else 1):
            raise ValueError(
                f"{name} holds {'whole numbers' if whole else 'floats'} in {low:g}..{high:g}, expected "
                f"{'0..255' if whole else '0..1'} to resize it; scale it first, or pass do_resize=False"
            )
        array = ((array * array.dtype.type(255)).astype(np.float32) if in_unit else array).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    elif array.ndim == 3 and array.shape[2] > 4:
        raise ValueError(f"{name} has {array.shape[2]} channels, expected at most 4 to resize; pass do_resize=False")
    return Image.fromarray(np.ascontiguousarray(array)), in_unit


def shrunk(source: Decoded, side: int) -> Image.Image:
    """An RGB or grey image whose short side becomes `side`, by the rule and with the bicubic kernel of `size=side`."""
    height, width = _target_size(source.full, {"shortest_edge": side})
    return source.image.resize((width, height), Image.Resampling.BICUBIC, box=source.box)


def _target_size(full: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """The (height, width) to which the option `size` resizes an image of `full` (height, width)."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = min(full), max(full)
    edge: float = size["shortest_edge"]
    longest = size.get("longest_edge")
    new_short = size["shortest_edge"]
    if longest is not None and long / short * edge > longest:
        edge = longest * short / long
        new_short = max(1, round(edge))
    if short == new_short:
        return full
    new_long = max(1, int(edge * long / short))
    return (new_short, new_long) if full[0] <= full[1] else (new_long, new_short)


_LARGE = 2**25
"""If a resized image has more pixels, only the part that the crop keeps is computed. A 1x5000 image would take 3 GB."""


def _middle(
    picture: Image.Image,
    target: tuple[int, int],
    crop: Mapping[str, int],
    box: tuple[float, float, float, float] | None,
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """The part of a resize to `target` (height, width) that a central crop keeps.

    Returns its size, and the box of the picture that it shows. Pillow rounds such a box, so pixels differ by less than
    1 of 255 on average.
    """
    left, top, right, bottom = box or (0.0, 0.0, float(picture.width), float(picture.height))
    sides, spans = [], []
    for size, kept, start, end in ((target[0], crop["height"], top, bottom), (target[1], crop["width"], left, right)):
        first, scale = max(0, (size - kept) // 2), (end - start) / size
        sides.append(min(size, kept))
        spans.append((start + first * scale, start + (first + sides[-1]) * scale))
    return (sides[0], sides[1]), (spans[1][0], spans[0][0], spans[1][1], spans[0][1])


def _center_crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle (height, width) of an (H, W, C) array. Pixels outside the array are 0.

    An odd number of pixels is split unevenly: the end is cut by one more, or the start is padded by one more.
    """
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    inside = array[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    padded = np.zeros((height, width, array.shape[2]), array.dtype)
    row, column = max(-top, 0), max(-left, 0)
    padded[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return padded


class Normalisation:
    """Computes (level * factor - mean) / std for each channel, by one multiplication and one addition in float32.

    Training, evaluation and prediction all use it. Levels run from 0 to 255 if `factor` is 1 / 255.
    """

    def __init__(self, mean: npt.ArrayLike, std: npt.ArrayLike, factor: float = 1 / 255):
        self.mean, self.std, self.factor = np.asarray(mean, np.float64), np.asarray(std, np.float64), factor
        self.scale = (factor / self.std).astype(np.float32)
        self.shift = (-self.mean / self.std).astype(np.float32)

    def apply(self, levels: np.ndarray, out: np.ndarray, *, channels_first: bool = True) -> None:
        """Writes the normalised (H, W, C) levels into `out`, which is float32 and (C, H, W) or (H, W, C)."""
        scale, shift = self.scale, self.shift
        if channels_first:
            levels, scale, shift = levels.transpose(2, 0, 1), scale[:, None, None], shift[:, None, None]
        np.multiply(levels, scale, out=out, casting="same_kind")
        out += shift

    def undo(self, pixels: np.ndarray) -> np.ndarray:
        """The uint8 levels that the normalised pixels (..., H, W, C) were made from."""
        return ((pixels.astype(np.float64) * self.std + self.mean) / self.factor).round().clip(0, 255).astype(np.uint8)


def normalisation(channels: int, in_unit: bool, options: Mapping[str, Any], name: str) -> Normalisation:
    """The arithmetic that turns the result of `levels` into pixel values, by the processor's `options`."""
    mean, std = (
        (_fit(options[key], channels, key, name) for key in ("image_mean", "image_std"))
        if options["do_normalize"]
        else (np.zeros(channels), np.ones(channels))
    )
    factor = (options["rescale_factor"] if options["do_rescale"] else 1.0) / (255 if in_unit else 1)
    return Normalisation(mean, std, factor)


def _fit(statistic: float | tuple[float, ...], channels: int, key: str, name: str) -> np.ndarray:
    if isinstance(statistic, tuple) and len(statistic) != channels:
        raise ValueError(
            f"{name} has {channels} channels, {key} has {len(statistic)}; pass do_convert_rgb=True for three "
            f"channels, or one number of {key} for each channel"
        )
    return np.broadcast_to(np.asarray(statistic, np.float64), channels)


def as_tensors(arrays: list[np.ndarray], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return arrays
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"the results have different shapes, {shapes[0]} and {shapes[1]}, expected one shape to stack them; "
            f"pass do_center_crop=True or return_tensors=None"
        )
    batch = np.stack(arrays)
    if return_tensors == "pt":
        try:
            import torch
        except ImportError:
            raise ImportError('return_tensors="pt" needs PyTorch, which is missing; pip install torch') from None
        return torch.from_numpy(batch)
    if return_tensors == "tf":
        try:
            import tensorflow
        except ImportError:
            raise ImportError(
                'return_tensors="tf" needs TensorFlow, which is missing; pip install "deit[keras]"'
            ) from None
        return tensorflow.convert_to_tensor(batch)
    return batch
