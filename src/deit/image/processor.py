"""From a file or an array to `pixel_values`: the one preprocessing of evaluation, prediction, serving and export.

`deit.image.decode` reads files. `deit.image.pixels` converts, resizes, crops, rescales and normalises by the options
of a `DeiTImageProcessor`. The options, their defaults and the file `preprocessor_config.json` are Hugging Face's.

Legend: B images, C channels, H rows, W columns. Sizes are (height, width).
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from deit import files
from deit.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from deit.image.pixels import Normalisation, as_tensors, flatten, levels, normalisation, pixel_values, type_of

__all__ = ["BatchFeature", "DeiTFeatureExtractor", "DeiTImageProcessor"]

FILE_NAME = "preprocessor_config.json"
MAX_SIDE = 2**14
"""Largest side of an image that is made, in pixels."""


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
    if not 1 <= count <= MAX_SIDE:
        raise ValueError(f"{name} holds {value!r:.80}, expected a whole number of pixels from 1 to {MAX_SIDE}")
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


# The check of every option, which also returns the option in its normal form.
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
_BIT = {  # the processor of DINOv2's files
    **_DEIT,
    "size": {"shortest_edge": 224},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_convert_rgb": True,
}
# Every processor type that a published file may name, with the defaults of its class.
_TYPES = {
    f"{family}{kind}": defaults
    for family, defaults in (("DeiT", _DEIT), ("ViT", _VIT), ("Bit", _BIT))
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
    if (family, kind) != ("Bit", "FeatureExtractor")  # which never was
}
# Options of transformers that have no counterpart here, and what to do instead.
_UNDONE = {
    "do_pad": "crop_size pads a small image with zeros",
    "pad_size": "crop_size pads a small image with zeros",
    "device": "move the result with .to(device)",
    "disable_grouping": "leave it out, images are never grouped here",
    "image_seq_length": "leave it out, it does not change an image",
    "return_tensors": "give it in the call",
}


def _refuse_undone(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first option that would change the result and cannot be honoured."""
    for name, value in options.items():
        if name not in _CHECKS and (name in _UNDONE or name.startswith("do_")) and value:
            advice = _UNDONE.get(name, "take the step yourself and remove the setting")
            raise ValueError(f"{name}={value!r} is not done by DeiTImageProcessor, expected False or None; {advice}")
    size = options.get("size")
    if options.get("default_to_square") is False and not isinstance(size, (Mapping, list, tuple, type(None))):
        raise ValueError(f'size is {size!r} with default_to_square=False; write size={{"shortest_edge": {size!r}}}')


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given. None means the default. Unknown names are refused."""
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
        """Moves or casts every entry with `torch.Tensor.to`, in place. Needs return_tensors="pt".

        Only entries of floating point take another dtype. Labels and masks keep theirs, and move.
        """
        torch = sys.modules.get("torch")
        if torch is None or not all(isinstance(value, torch.Tensor) for value in self.values()):
            name, value = next((n, v) for n, v in self.items() if torch is None or not isinstance(v, torch.Tensor))
            raise ValueError(f'{name} is {type_of(value)}, .to() needs torch tensors; pass return_tensors="pt"')
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        for name, value in self.items():
            if value.is_floating_point():
                self[name] = value.to(*args, **kwargs)
            elif device is not None:
                self[name] = value.to(device, non_blocking=non_blocking)
        return self


class DeiTImageProcessor:
    """Turns images into the `pixel_values` of a DeiT model. Options, defaults and files are those of transformers.

    You can pass options to the constructor, set them as attributes, or pass them for one call. They take effect in this
    order (defaults in brackets):

    - `do_convert_rgb` (None): True converts every image to RGB and drops alpha. False leaves the channels alone. None
      gives a Pillow image or a file the channels of `image_mean` (RGB for 3 entries or a scalar, grey for 1) and leaves
      arrays alone. `input_data_format` (None: inferred) is the layout of arrays.
    - `do_resize` (True), `size` (256x256), `resample` (bicubic): `size` is an int (a square, which loses the aspect
      ratio), a pair (height, width), {"height", "width"}, or {"shortest_edge"}, optionally with "longest_edge" as its
      bound. `resample` is a Pillow filter, its number or its name.
    - `do_center_crop` (True), `crop_size` (224x224): a smaller image is padded with zeros.
    - `do_rescale` (True), `rescale_factor` (1/255): pixels are multiplied by the factor.
    - `do_normalize` (True), `image_mean` and `image_std` (0.5): one number, or one for each channel.
    - `data_format` ("channels_first"): layout of the result, also "channels_last".

    None as a value means the default. Raises `ValueError` for unknown options and bad values.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

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
        self.__dict__["_extra"] = {}  # keys of a file that mean nothing here; to_dict writes them back
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
        """Turns images into `{"pixel_values": ...}`: float32, (B, C, H, W), or (B, H, W, C) for "channels_last".

        Args:
            images: one image, a list (a nested one is flattened) or a batch of 4 dimensions. An image is a path, the
                bytes of a file, a file object, a Pillow image, or a NumPy array or torch tensor as (C, H, W) or
                (H, W, C). A Pillow image is taken as it is; `decode.load_image` turns one upright. An array that is
                resized must hold uint8, whole numbers in 0..255, or floats in 0..1. Such floats are cut to 8 bits and
                stay in 0..1, so pass `do_rescale=False` with them.
            return_tensors: None (a list of B arrays), "np", "pt" or "tf".
            overrides: options for this call.

        Raises `ValueError` for images that do not fit the options, `ImageError` for files that cannot be read.
        """
        if return_tensors not in (None, "np", "pt", "tf"):
            raise ValueError(f'return_tensors is {return_tensors!r}, expected None, "np", "pt" or "tf"')
        options = self._options(overrides)
        arrays = [pixel_values(image, options, f"image {i}") for i, image in enumerate(flatten(images))]
        if not arrays:
            raise ValueError("the list of images is empty, expected at least one image")
        return BatchFeature(pixel_values=as_tensors(arrays, return_tensors))

    def _options(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        merged = {**{name: self.__dict__[name] for name in _CHECKS}, **_given(overrides)}
        return {name: _CHECKS[name](name, value) for name, value in merged.items()}

    @classmethod
    def paper(cls, image_size: int | tuple[int, int] = 224, crop_ratio: float = 0.875) -> DeiTImageProcessor:
        """The preprocessing of evaluation in Touvron et al. 2020 (arXiv 2012.12877), as in its code and in timm.

        The shortest edge is resized to int(image_size / crop_ratio) (256 for 224), bicubic. Then come a centre crop and
        ImageNet's statistics. For a pair (height, width), the longer side sets the shortest edge, so that the crop
        stays inside every image.
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
        """The preprocessing that timm's `pretrained_cfg` describes, for a model of `image_size` (a pair as in `paper`).

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
        """The same preprocessing in timm's keys: mean, std, interpolation, crop_pct and crop_mode.

        Raises `ValueError` for options that timm's keys cannot express.
        """
        size, crop = self.size, self.crop_size if self.do_center_crop else self.size
        if "height" not in crop or ("shortest_edge" in size and crop["height"] != crop["width"]):
            raise ValueError(
                f"timm's keys say a square crop, found crop {crop} after size {size}; set crop_size, or keep the "
                "format of Hugging Face, which can say it"
            )
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
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but timm's keys say {said_value!r}; set {name} to that first"
                )
        return said

    def levels(self, image: Any) -> np.ndarray | None:
        """One image as `preprocess` resizes and crops it, before `normalisation`: uint8, in the layout of the result.

        None if more than 8 bits of a value are kept, as of an array or a 16-bit image that is not resized.
        """
        options = self._options({})
        array, in_unit = levels(image, options, "image 0")
        normalisation(array.shape[2], in_unit, options, "image 0")  # refuses channels that don't fit
        if in_unit or array.dtype != np.uint8:
            return None
        return array.transpose(2, 0, 1) if self.data_format == "channels_first" else array

    @property
    def normalisation(self) -> Normalisation:
        """The arithmetic that turns levels into normalised pixels, by the options that are on."""
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (0.0, 1.0)
        return Normalisation(mean, std, self.rescale_factor if self.do_rescale else 1.0)

    @property
    def crop_ratio(self) -> float | None:
        """Side of the crop divided by that of the resized image. 1 without a crop, None without resizing.

        The side of the resized image is its shortest edge, or its height if the image is squashed into `size`.
        """
        if not self.do_resize:
            return None
        if not self.do_center_crop:
            return 1.0
        squashed = "height" in self.size
        side = self.crop_size["height"] if squashed else max(self.crop_size.values())
        return float(side / (self.size["height"] if squashed else self.size["shortest_edge"]))

    def with_crop_ratio(self, ratio: float) -> DeiTImageProcessor:
        """A copy that resizes to int(crop / ratio) before it crops.

        Nothing else changes: not the size of the result, and not whether the image keeps its aspect ratio (`size` is a
        shortest edge) or is squashed into `size`. Raises `ValueError` if `ratio` is outside (0, 1], if nothing is
        resized, or if the result has no fixed size.
        """
        crop = self.crop_size if self.do_center_crop else self.size
        if not self.do_resize or "height" not in crop:
            raise ValueError(
                f"a crop ratio needs images that are resized and cropped, found do_resize={self.do_resize}"
                f" and do_center_crop={self.do_center_crop} with size={self.size}; set these options"
            )
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
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **overrides: Any,
    ) -> DeiTImageProcessor:
        """Reads `preprocessor_config.json` from a folder, or from a model on the hub. `overrides` replace its options.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it cannot be honoured.
        """
        path = files.find_file(
            pretrained_model_name_or_path,
            FILE_NAME,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        return cls.from_json_file(path, **overrides)

    @classmethod
    def of_model(cls, name_or_folder: str | Path, config: ModelConfig, **where: Any) -> DeiTImageProcessor:
        """The preprocessing in a model's files: `preprocessor_config.json`, or timm's `pretrained_cfg` in its config.

        `where` is as for `from_pretrained`. Raises `FileNotFoundError` if the files have neither.
        """
        try:
            return cls.from_pretrained(name_or_folder, **where)
        except FileNotFoundError as error:
            if timm := getattr(config, "pretrained_cfg", None) or config.extra.get("pretrained_cfg"):
                return cls.from_timm(timm, image_size=config.image_size)
            raise FileNotFoundError(
                f"{error}, so how its images are prepared is not known; save the processor it was "
                "trained with there, e.g. DeiTImageProcessor.paper(224).save_pretrained(FOLDER)"
            ) from None

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **overrides: Any) -> DeiTImageProcessor:
        """Reads one file in the format of `preprocessor_config.json`."""
        return cls.from_dict(files.read_json(Path(json_file)), **overrides)

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> DeiTImageProcessor:
        """Builds a processor from the content of a file of a DeiT, ViT or BiT processor or feature extractor.

        The type that the file names sets the defaults (a ViT type: 224x224, bilinear, no crop). Unknown keys are kept
        for `to_dict`. Raises `ValueError` for other types, and for options that cannot be honoured.
        """
        extra = copy.deepcopy(dict(image_processor_dict))
        kinds = [extra.pop("image_processor_type", None), extra.pop("feature_extractor_type", None)]
        kind = str(kinds[0] or kinds[1] or "DeiTImageProcessor")
        if kind not in _TYPES:
            kind = kind if kind.isidentifier() else repr(kind)
            raise ValueError(f"the file is for {kind}, which is not supported; expected one of {', '.join(_TYPES)}")
        if kind.startswith("Bit") and isinstance(extra.get("size"), int):  # a square for the other types
            extra["size"] = {"shortest_edge": extra["size"]}
        _refuse_undone(extra)
        known = {name: extra.pop(name) for name in _CHECKS if name in extra}
        processor = cls(**{**_TYPES[kind], **_given(known), **_given(overrides)})
        processor.__dict__["_extra"] = extra
        return processor

    def to_dict(self) -> dict[str, Any]:
        """A copy of all options that are set and all unknown keys that were read, as JSON types."""
        options = {name: value for name, value in self._options({}).items() if value is not None}
        options["resample"] = int(options["resample"])
        for name in ("image_mean", "image_std"):
            if isinstance(options[name], tuple):
                options[name] = list(options[name])
        return {**copy.deepcopy(self.__dict__["_extra"]), **options, "image_processor_type": "DeiTImageProcessor"}

    def to_json_string(self) -> str:
        """`to_dict` as text with sorted keys. It ends in a newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> Path:
        """Writes `preprocessor_config.json` into the folder, whole or not at all. Makes the folder if it is missing.

        The options from `repo_id` on are for `push_to_hub`, and refused without it. Returns the path of the file.
        """
        push = files.push_options(
            push_to_hub,
            save_directory,
            repo_id=repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )
        path = Path(save_directory, FILE_NAME)
        files.write_text(path, self.to_json_string())
        if push_to_hub:
            self.push_to_hub(**push)
        return path

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the file (`token`, `private`, `revision`, `commit_message`); returns the commit's address."""
        return files.upload_saved(self.save_pretrained, repo_id, **{"commit_message": "Upload processor", **options})


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The former name of `DeiTImageProcessor`."""

    def __init__(self, **options: Any) -> None:
        warnings.warn(
            "DeiTFeatureExtractor is the former name of DeiTImageProcessor; use DeiTImageProcessor",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(**options)
