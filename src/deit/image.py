"""From a file or an array to `pixel_values`: THE preprocessing of evaluation, prediction, serving and export.

`deit.decode` reads files, `DeiTImageProcessor` converts, resizes, crops, rescales and normalises. Its options, their
defaults and the file `preprocessor_config.json` are Hugging Face's; the values equal those of the Pillow backend of
`transformers` to float rounding.

Legend: B images, C channels, H rows, W columns. Arrays inside this file are (H, W, C); sizes are (height, width),
except in calls to Pillow, which takes (width, height).
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit import files
from deit.config import IMAGENET_MEAN, IMAGENET_STD, DeiTConfig
from deit.decode import Decoded, convert, decode, is_encoded, name_of, reading

__all__ = ["BatchFeature", "DeiTFeatureExtractor", "DeiTImageProcessor"]

FILE_NAME = "preprocessor_config.json"


# ---- options -----------------------------------------------------------------------------------------------------


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def _pixels(name: str, value: Any) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} holds {value!r}, expected a whole number of pixels, 1 or more")
    return count


def _size(name: str, value: Any, forms: Sequence[set[str]] = ({"height", "width"},)) -> dict[str, int]:
    """A size option as its dict: an int is a square, a pair is (height, width)."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif isinstance(value, (int, np.integer)):
        value = {"height": value, "width": value}
    try:
        value = {key: side for key, side in dict(value).items() if side is not None}
    except (TypeError, ValueError):
        value = {"": value}
    if set(value) not in forms:
        keys = " or ".join(", ".join(sorted(form)) for form in forms)
        raise ValueError(
            f"{name} is {value.get('', value)!r}, expected an int, a pair (height, width) or a dict of {keys}"
        )
    return {key: _pixels(f"{name}[{key!r}]", side) for key, side in value.items()}


def _resize_size(name: str, value: Any) -> dict[str, int]:
    return _size(name, value, ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}))


def _resample(name: str, value: Any) -> Image.Resampling:
    try:
        if isinstance(value, str):
            return Image.Resampling[value.upper()]
        return Image.Resampling(operator.index(value))
    except (KeyError, ValueError, TypeError):
        known = ", ".join(f"{filter_.value} ({filter_.name.lower()})" for filter_ in sorted(Image.Resampling))
        raise ValueError(f"{name} is {value!r}, expected one of {known}") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return float(value)


def _per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return _number(name, value)
    if not value:
        raise ValueError(f"{name} is empty, expected a number or one number per channel")
    return tuple(_number(name, entry) for entry in value)


def _deviation(name: str, value: Any) -> float | tuple[float, ...]:
    std = _per_channel(name, value)
    if np.any(np.less_equal(std, 0)):
        raise ValueError(f"{name} is {value!r}, expected numbers above 0 (pixels are divided by it)")
    return std


def _layout(name: str, value: Any) -> str:
    layout = getattr(value, "value", value)  # an enum of transformers, or its text
    if layout not in ("channels_first", "channels_last"):
        raise ValueError(f'{name} is {value!r}, expected "channels_first" or "channels_last"')
    return str(layout)


# Every option: its check, which also gives its normal form.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "do_resize": _flag,
    "size": _resize_size,
    "resample": _resample,
    "do_center_crop": _flag,
    "crop_size": _size,
    "do_rescale": _flag,
    "rescale_factor": _number,
    "do_normalize": _flag,
    "image_mean": _per_channel,
    "image_std": _deviation,
    "do_convert_rgb": _or_none(_flag),
    "data_format": _layout,
    "input_data_format": _or_none(_layout),
}
_DEIT: dict[str, Any] = {
    "do_resize": True,
    "size": 256,
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "do_convert_rgb": None,
    "data_format": "channels_first",
    "input_data_format": None,
}
_VIT = {**_DEIT, "size": 224, "resample": Image.Resampling.BILINEAR, "do_center_crop": False}
# Every processor type that a published file may name, with the defaults of its class.
_TYPES = {
    f"{family}{kind}": defaults
    for family, defaults in (("DeiT", _DEIT), ("ViT", _VIT))
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
# Options of transformers without a counterpart here, and what to do instead.
_UNDONE = {
    "do_pad": "crop_size pads a small image with zeros",
    "pad_size": "crop_size pads a small image with zeros",
    "device": "move the result with .to(device)",
    "disable_grouping": "leave it out, images are never grouped here",
    "image_seq_length": "leave it out, it does not change an image",
    "return_tensors": "give it in the call",
}


def _refuse_undone(options: Mapping[str, Any]) -> None:
    """Raise for the first setting that would change the result and cannot be honoured."""
    for name, value in options.items():
        if name not in _CHECKS and (name in _UNDONE or name.startswith("do_")) and value:
            advice = _UNDONE.get(name, "take the step yourself and remove the setting")
            raise ValueError(f"{name}={value!r} is not done by DeiTImageProcessor, expected False or None; {advice}")
    size = options.get("size")
    if options.get("default_to_square") is False and not isinstance(size, (Mapping, list, tuple, type(None))):
        raise ValueError(f'size is {size!r} with default_to_square=False; write size={{"shortest_edge": {size!r}}}')


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given: None means the default. Unknown names are refused."""
    unknown = sorted(set(options) - set(_CHECKS) - set(_UNDONE) - {"default_to_square"})
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}; the options are {', '.join(_CHECKS)}")
    _refuse_undone(options)
    return {name: value for name, value in options.items() if name in _CHECKS and value is not None}


# ---- the processor -----------------------------------------------------------------------------------------------


class BatchFeature(dict[str, Any]):
    """What a processor returns: a dict whose entries are attributes too (`out["pixel_values"]`, `out.pixel_values`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}, this batch has {', '.join(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move or cast every entry with `torch.Tensor.to`, in place; needs return_tensors="pt"."""
        torch = sys.modules.get("torch")
        for name, value in self.items():
            if torch is None or not isinstance(value, torch.Tensor):
                raise ValueError(f'{name} is {_type(value)}, .to() moves torch tensors; pass return_tensors="pt"')
            self[name] = value.to(*args, **kwargs)
        return self


class DeiTImageProcessor:
    """Images to the `pixel_values` of a DeiT model; the options, defaults and files of the class in transformers.

    In the order of their effect (given to the constructor, set as attributes, or for one call):

    - `do_convert_rgb` (None): True converts every image to RGB, alpha dropped; False leaves the channels alone;
      None gives a Pillow image or a file the channels of `image_mean` (RGB for 3 entries or a scalar, grey for 1)
      and leaves arrays alone. `input_data_format` (None: inferred): layout of arrays.
    - `do_resize` (True), `size` (256x256), `resample` (bicubic): `size` is an int (a square: the aspect ratio is
      lost), a pair (height, width), {"height", "width"}, or {"shortest_edge"}, optionally with "longest_edge" as its
      bound. `resample` is a Pillow filter, its number or its name.
    - `do_center_crop` (True), `crop_size` (224x224): a smaller image is padded with zeros.
    - `do_rescale` (True), `rescale_factor` (1/255): pixels times the factor.
    - `do_normalize` (True), `image_mean` and `image_std` (0.5): a number, or one per channel.
    - `data_format` ("channels_first"): layout of the result, also "channels_last".

    None as a value means the default. Raises `ValueError` for unknown options and bad values.
    """

    do_resize: bool
    size: Any
    resample: Any
    do_center_crop: bool
    crop_size: Any
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any
    do_convert_rgb: bool | None
    data_format: str
    input_data_format: str | None

    def __init__(self, **options: Any) -> None:
        self.__dict__["_extra"] = {}  # keys of a file that mean nothing here: written back by to_dict
        for name, value in {**_DEIT, **_given(options)}.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHECKS:
            raise AttributeError(f"no option {name!r}; the options are {', '.join(_CHECKS)}")
        self.__dict__[name] = _CHECKS[name](name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeiTImageProcessor) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # options can be set

    def __repr__(self) -> str:
        shown = {**self._options({}), "resample": self.resample.name.lower()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __call__(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors, **overrides)

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """Images to `{"pixel_values": ...}`, float32, (B, C, H, W), or (B, H, W, C) with data_format "channels_last".

        `images` is one image, a list (also nested, which is flattened) or a batch of 4 dimensions. An image is a
        Pillow image (as it is: `decode.load_image` turns it upright), a path, the bytes of a file, a file object, or a
        NumPy array or torch tensor, (C, H, W) or (H, W, C). To be resized, an array must hold uint8, whole numbers in
        0..255, or floats in 0..1, which are cut to 8 bits and stay in 0..1: pass `do_rescale=False` with them.

        `return_tensors` is None (a list of B arrays), "np", "pt" or "tf". `overrides` are options for this call.

        Raises `ValueError` for images that do not fit the options, `ImageError` for files that cannot be read.
        """
        if return_tensors not in (None, "np", "pt", "tf"):
            raise ValueError(f'return_tensors is {return_tensors!r}, expected None, "np", "pt" or "tf"')
        options = self._options(overrides)
        arrays = [_pixel_values(image, options, f"image {i}") for i, image in enumerate(_flatten(images))]
        if not arrays:
            raise ValueError("the list of images is empty, expected at least one image")
        return BatchFeature(pixel_values=_as_tensors(arrays, return_tensors))

    def _options(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        merged = {**{name: self.__dict__[name] for name in _CHECKS}, **_given(overrides)}
        return {name: _CHECKS[name](name, value) for name, value in merged.items()}

    @classmethod
    def paper(cls, image_size: int | tuple[int, int] = 224, crop_ratio: float = 0.875) -> DeiTImageProcessor:
        """The evaluation of Touvron et al. 2020 (arXiv 2012.12877), as in its published code and in timm.

        Shortest edge to int(image_size / crop_ratio) (256 for 224), bicubic, centre crop, ImageNet statistics. For a
        pair (height, width) the longer side sets the shortest edge, so that the crop stays inside every image.
        """
        crop = _size("image_size", image_size)
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio is {crop_ratio!r}, expected a number above 0, at most 1")
        edge = int(max(crop.values()) / crop_ratio)
        return cls(size={"shortest_edge": edge}, crop_size=crop, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)

    @classmethod
    def from_timm(
        cls, pretrained_cfg: Mapping[str, Any], image_size: int | tuple[int, int] = 224
    ) -> DeiTImageProcessor:
        """The evaluation that timm's `pretrained_cfg` describes, for models of `image_size` (a pair as in `paper`).

        Reads mean, std, interpolation, crop_pct and crop_mode ("center" or "squash"; others are refused).
        """
        statistics = {
            "image_mean": pretrained_cfg.get("mean") or IMAGENET_MEAN,
            "image_std": pretrained_cfg.get("std") or IMAGENET_STD,
            "resample": pretrained_cfg.get("interpolation") or "bicubic",
        }
        ratio = pretrained_cfg.get("crop_pct") or 0.875
        paper = cls.paper(image_size, ratio)
        mode = pretrained_cfg.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ValueError(f'crop_mode is {mode!r}, expected "center" or "squash"; build DeiTImageProcessor yourself')
        size = paper.size if mode == "center" else {key: int(side / ratio) for key, side in paper.crop_size.items()}
        return cls(size=size, crop_size=paper.crop_size, **statistics)

    def to_timm(self) -> dict[str, Any]:
        """The same evaluation as timm's keys: mean, std, interpolation, crop_pct and crop_mode.

        Raises `ValueError` for options that timm's keys cannot say.
        """
        size, crop = self.size, self.crop_size if self.do_center_crop else self.size
        if "height" not in crop or ("shortest_edge" in size and crop["height"] != crop["width"]):
            raise ValueError(f"crop is {crop} after size {size}, timm's keys say a square crop; set crop_size")
        edge = size.get("shortest_edge") or size["height"]
        ratio = crop["height"] / edge
        if int(crop["height"] / ratio) != edge:  # timm rounds down
            ratio = crop["height"] / (edge + 0.5)
        said: dict[str, Any] = {
            "mean": list(self.image_mean) if isinstance(self.image_mean, tuple) else [self.image_mean] * 3,
            "std": list(self.image_std) if isinstance(self.image_std, tuple) else [self.image_std] * 3,
            "interpolation": self.resample.name.lower(),
            "crop_pct": ratio,
            "crop_mode": "center" if "shortest_edge" in size else "squash",
        }
        again = self.from_timm(said, (crop["height"], crop["width"]))
        for name in ("size", "do_resize", "do_rescale", "rescale_factor", "do_normalize"):
            if getattr(again, name) != getattr(self, name):
                said_value = getattr(again, name)
                raise ValueError(f"{name} is {getattr(self, name)!r}, timm's keys say {said_value!r}; set that first")
        return said

    @property
    def crop_ratio(self) -> float | None:
        """Side of the crop by the resized image's (the shortest edge, or the height of one squashed into `size`); 1
        without a crop, None without resizing."""
        if not self.do_resize:
            return None
        if not self.do_center_crop:
            return 1.0
        squashed = "height" in self.size
        side = self.crop_size["height"] if squashed else max(self.crop_size.values())
        return float(side / (self.size["height"] if squashed else self.size["shortest_edge"]))

    def with_crop_ratio(self, ratio: float) -> DeiTImageProcessor:
        """A copy that resizes to int(crop / ratio) before it crops. All else stays: the size of the result, and whether
        the image keeps its aspect ratio (`size` a shortest edge) or is squashed into `size`.

        Raises `ValueError` for a ratio outside (0, 1], and where nothing is resized or the result has no fixed size.
        """
        crop = self.crop_size if self.do_center_crop else self.size
        if not self.do_resize or "height" not in crop:
            raise ValueError(f"a crop ratio needs images that are resized and cropped, found do_resize={self.do_resize}"
                             f" and do_center_crop={self.do_center_crop} with size={self.size}; set these options")
        paper = self.paper((crop["height"], crop["width"]), ratio)
        changed = copy.deepcopy(self)
        squashed = {key: int(side / ratio) for key, side in crop.items()}
        changed.do_center_crop, changed.crop_size = True, crop
        changed.size = squashed if "height" in self.size else paper.size
        return changed

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path, *, revision: str | None = None, subfolder: str = "",
        cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | bool | None = None,
        **overrides: Any,
    ) -> DeiTImageProcessor:
        """Read `preprocessor_config.json` of a folder or of a model on the Hub; `overrides` replace its options.

        Raises `FileNotFoundError` without such a file, `ValueError` for one that cannot be honoured.
        """
        path = files.find_file(
            name_or_folder, FILE_NAME, revision=revision, subfolder=subfolder, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token,
        )
        return cls.from_json_file(path, **overrides)

    @classmethod
    def of_model(cls, name_or_folder: str | Path, config: DeiTConfig, **where: Any) -> DeiTImageProcessor:
        """The preprocessing that a model's files say: `preprocessor_config.json`, or timm's `pretrained_cfg` in its
        config; `where` as for `from_pretrained`.

        Raises `FileNotFoundError` where they say nothing.
        """
        try:
            return cls.from_pretrained(name_or_folder, **where)
        except FileNotFoundError as error:
            if timm := config.extra.get("pretrained_cfg"):
                return cls.from_timm(timm, image_size=config.image_size)
            raise FileNotFoundError(f"{error}, so how its images are prepared is not known; save the processor it was "
                                    "trained with there, e.g. DeiTImageProcessor.paper(224).save_pretrained(FOLDER)"
                                    ) from None

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> DeiTImageProcessor:
        """Read one file in the format of `preprocessor_config.json`."""
        return cls.from_dict(files.read_json(Path(path)), **overrides)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **overrides: Any) -> DeiTImageProcessor:
        """From the contents of a file: any DeiT or ViT processor or feature extractor of transformers.

        The named type sets the defaults (a ViT type: 224x224, bilinear, no crop). Unknown keys are kept for
        `to_dict`. Raises `ValueError` for other types, and for settings that cannot be honoured.
        """
        extra = copy.deepcopy(dict(data))
        kinds = [extra.pop("image_processor_type", None), extra.pop("feature_extractor_type", None)]
        kind = str(kinds[0] or kinds[1] or "DeiTImageProcessor")
        if kind not in _TYPES:
            raise ValueError(f"the file is for {kind}, which is not supported; expected one of {', '.join(_TYPES)}")
        _refuse_undone(extra)
        known = {name: extra.pop(name) for name in _CHECKS if name in extra}
        processor = cls(**{**_TYPES[kind], **_given(known), **_given(overrides)})
        processor.__dict__["_extra"] = extra
        return processor

    def to_dict(self) -> dict[str, Any]:
        """Every option that is set and every kept key, as JSON types; a copy."""
        options = {name: value for name, value in self._options({}).items() if value is not None}
        options["resample"] = int(options["resample"])
        for name in ("image_mean", "image_std"):
            if isinstance(options[name], tuple):
                options[name] = list(options[name])
        return {**copy.deepcopy(self.__dict__["_extra"]), **options, "image_processor_type": "DeiTImageProcessor"}

    def to_json_string(self) -> str:
        """`to_dict` as text, keys sorted, ending in a newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `preprocessor_config.json` into `folder` (made when absent), whole or not at all; its path."""
        path = Path(folder, FILE_NAME)
        files.write_text(path, self.to_json_string())
        return path


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The former name of `DeiTImageProcessor`."""

    def __init__(self, **options: Any) -> None:
        warnings.warn(
            "DeiTFeatureExtractor is the former name of DeiTImageProcessor; use DeiTImageProcessor",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(**options)


# ---- one image ---------------------------------------------------------------------------------------------------


def _type(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _flatten(images: Any) -> Iterator[Any]:
    """Single images out of lists, nested lists and batches of 4 dimensions."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from _flatten(entry)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def _pixel_values(source: Any, options: Mapping[str, Any], name: str) -> np.ndarray:
    """One image, all the way: (C, H, W) or (H, W, C) in float32."""
    full, box, in_unit = None, None, False
    pixels: Any  # a Pillow image as long as it can be, (H, W, C) or (H, W) otherwise
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
    return _rescale_and_normalize(array, in_unit, options, name)


def _picture(source: Any, options: Mapping[str, Any]) -> Decoded:
    """A file or Pillow image, decoded no larger than the resize needs, in the channels that the options ask for."""
    if isinstance(source, Image.Image):
        decoded = Decoded(source, (source.height, source.width), None)
    else:
        size = options["size"]
        side = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        decoded = decode(source, side if options["do_resize"] else None)
    with reading(name_of(source)):
        decoded.image.load()
        return decoded._replace(image=convert(decoded.image, _wanted_mode(options)))


def _wanted_mode(options: Mapping[str, Any]) -> str | None:
    if options["do_convert_rgb"] is not None:
        return "RGB" if options["do_convert_rgb"] else None
    mean = options["image_mean"]
    return {1: "L", 3: "RGB"}.get(len(mean)) if isinstance(mean, tuple) else "RGB"


def _to_numpy(source: Any, name: str) -> np.ndarray:
    """An array or tensor as NumPy in a type that NumPy computes with: bool, integer, float32 or float64."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() and source.itemsize < 4 else source).numpy()
    elif tensorflow is not None and isinstance(source, tensorflow.Tensor):
        source = source.numpy()
    if not isinstance(source, np.ndarray):
        raise ValueError(
            f"{name} is {_type(source)}, expected a PIL image, a NumPy array, a torch tensor, a path or the bytes of a "
            f"file; convert it first"
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
            f"pass input_data_format if it has another number"
        )
    if first and last:
        warnings.warn(
            f"{name} has shape {array.shape}, taken as (C, H, W); pass input_data_format to decide",
            UserWarning,
            stacklevel=2,
        )
    return "channels_first" if first else "channels_last"


def _to_picture(array: np.ndarray, name: str) -> tuple[Image.Image, bool]:
    """An (H, W, C) array as the 8-bit image that Pillow resizes, and whether it stood for 0..1.

    The rule of transformers: whole numbers are taken as they are, other floats are cut (not rounded) to n/255.
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


def _target_size(full: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """The (height, width) that `size` asks of an image of `full` (height, width)."""
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
"""Pixels of a resized image from which on what the crop discards is not computed: of a 1x5000 image, 3 GB."""


def _middle(picture: Image.Image, target: tuple[int, int], crop: Mapping[str, int],
            box: tuple[float, float, float, float] | None) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """The part of a resize to `target` (height, width) that a central crop keeps: its size, and the part of the picture
    that it shows. Pillow rounds such a box, so that pixels differ by less than 1 of 255 on average."""
    left, top, right, bottom = box or (0.0, 0.0, float(picture.width), float(picture.height))
    sides, spans = [], []
    for size, kept, start, end in ((target[0], crop["height"], top, bottom), (target[1], crop["width"], left, right)):
        first, scale = max(0, (size - kept) // 2), (end - start) / size
        sides.append(min(size, kept))
        spans.append((start + first * scale, start + (first + sides[-1]) * scale))
    return (sides[0], sides[1]), (spans[1][0], spans[0][0], spans[1][1], spans[0][1])


def _center_crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle (height, width) of an (H, W, C) array; what lies outside is 0, and an odd rest falls to the start."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    inside = array[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    padded = np.zeros((height, width, array.shape[2]), array.dtype)
    row, column = max(-top, 0), max(-left, 0)
    padded[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return padded


def _rescale_and_normalize(array: np.ndarray, in_unit: bool, options: Mapping[str, Any], name: str) -> np.ndarray:
    """(pixel * rescale_factor - mean) / std as one multiplication and one addition, into the layout asked for."""
    channels = array.shape[2]
    scale = np.full(channels, (options["rescale_factor"] if options["do_rescale"] else 1.0) / (255 if in_unit else 1))
    shift = np.zeros(channels)
    if options["do_normalize"]:
        mean, std = (_fit(options[key], channels, key, name) for key in ("image_mean", "image_std"))
        scale, shift = scale / std, -mean / std
    if options["data_format"] == "channels_first":
        array, scale, shift = array.transpose(2, 0, 1), scale[:, None, None], shift[:, None, None]
    out = np.empty(array.shape, np.float32)
    np.multiply(array, scale.astype(np.float32), out=out, casting="same_kind")
    out += shift.astype(np.float32)
    return out


def _fit(statistic: float | tuple[float, ...], channels: int, key: str, name: str) -> np.ndarray:
    if isinstance(statistic, tuple) and len(statistic) != channels:
        raise ValueError(
            f"{name} has {channels} channels, {key} has {len(statistic)}; pass do_convert_rgb=True for three, "
            f"or as many entries of {key} as channels"
        )
    return np.broadcast_to(np.asarray(statistic, np.float64), channels)


def _as_tensors(arrays: list[np.ndarray], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return arrays
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"the images end in different shapes, {shapes[0]} and {shapes[1]}, expected one to stack them; "
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
