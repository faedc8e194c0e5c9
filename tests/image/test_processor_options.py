"""Options of the image processor and their file."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise, smooth, worst
from transformers.image_utils import ChannelDimension

from deit.config import IMAGENET_MEAN, IMAGENET_STD
from deit.image.processor import DeiTFeatureExtractor, DeiTImageProcessor


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"size": 200}, {"size": {"height": 200, "width": 200}}),
        ({"size": [200, 300]}, {"size": {"height": 200, "width": 300}}),
        ({"size": np.int64(9)}, {"size": {"height": 9, "width": 9}}),
        ({"size": {"shortest_edge": 9}}, {"size": {"shortest_edge": 9}}),
        ({"crop_size": (8, 9)}, {"crop_size": {"height": 8, "width": 9}}),
        ({"resample": "bicubic"}, {"resample": Image.Resampling.BICUBIC}),
        ({"resample": 2}, {"resample": Image.Resampling.BILINEAR}),
        ({"resample": Image.Resampling.BOX}, {"resample": 4}),
        ({"image_mean": [0, 1, 0.5]}, {"image_mean": (0.0, 1.0, 0.5)}),
        ({"image_std": np.array([1.0, 2.0, 3.0])}, {"image_std": (1.0, 2.0, 3.0)}),
        ({"image_mean": 1}, {"image_mean": 1.0}),
        ({"size": None, "do_resize": None}, {"size": {"height": 256, "width": 256}, "do_resize": True}),
        ({"data_format": ChannelDimension.LAST}, {"data_format": "channels_last"}),
    ],
)
def test_option_forms(given, shown):
    processor, assigned = DeiTImageProcessor(**given), DeiTImageProcessor()
    for name, value in given.items():
        if value is not None:
            setattr(assigned, name, value)
    for name, value in shown.items():
        assert getattr(processor, name) == value
    assert processor == assigned == DeiTImageProcessor.from_dict(processor.to_dict())


REFUSED_OPTIONS = [
    ({"sise": 4}, "unknown option sise; the options are do_resize, size"),
    ({"size": 0}, r"size\['height'\] holds 0"),
    ({"size": 2.5}, r"size is 2.5, expected an int, a pair \(height, width\) or a dict of height, width or shortest"),
    ({"size": "224"}, "size is '224'"),
    ({"size": True}, "holds True"),
    ({"size": (1, 2, 3)}, "expected an int, a pair"),
    ({"size": {"longest_edge": 5}}, "expected an int, a pair"),
    ({"size": {"height": 5}}, "expected an int, a pair"),
    ({"crop_size": {"shortest_edge": 5}}, r"a dict of height, width$"),
    ({"resample": 9}, r"expected one of 0 \(nearest\)"),
    ({"resample": "best"}, "resample is 'best'"),
    ({"do_resize": 1}, "do_resize is 1, expected True or False"),
    ({"do_convert_rgb": "yes"}, "expected True or False"),
    ({"rescale_factor": float("nan")}, "expected a finite number"),
    ({"image_mean": []}, "image_mean is empty"),
    ({"image_mean": "half"}, "image_mean is 'half'"),
    ({"image_std": [1, 0, 1]}, "expected numbers above 0"),
    ({"data_format": "hwc"}, 'expected "channels_first" or "channels_last"'),
    ({"input_data_format": "none"}, 'expected "channels_first"'),
    ({"do_pad": True}, "do_pad=True is not done"),
    ({"pad_size": 9}, "pad_size=9 is not done"),
    ({"device": "cuda"}, r"\.to\(device\)"),
    ({"disable_grouping": True}, "never grouped"),
    ({"default_to_square": False, "size": 256}, r'write size={"shortest_edge": 256}'),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor()(noise(9, 9), **options)
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor.from_dict({}, **options)
    if len(options) == 1 and "sise" not in options:
        with pytest.raises(ValueError, match=message):
            DeiTImageProcessor.from_dict(options)


def test_attributes():
    processor = DeiTImageProcessor()
    processor.size = 100
    assert processor.size == {"height": 100, "width": 100}
    with pytest.raises(ValueError, match="holds 0"):
        processor.size = 0
    with pytest.raises(AttributeError, match="no option 'sise'"):
        processor.sise = 4
    processor.size["height"] = 0  # seen at the next call
    with pytest.raises(ValueError, match="holds 0"):
        processor(noise(9, 9))


def test_equality():
    assert DeiTImageProcessor() == DeiTImageProcessor(size=256)
    assert DeiTImageProcessor() != DeiTImageProcessor(size=255)
    assert DeiTImageProcessor() != "DeiTImageProcessor"
    processor = DeiTImageProcessor.from_dict({"note": [1]})
    for again in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert again == processor
    assert processor != DeiTImageProcessor()
    assert eval(repr(DeiTImageProcessor.paper())) == DeiTImageProcessor.paper()


def test_unknown_keys_survive(tmp_path):
    data = {"future": {"a": [1]}, "processor_class": "X", "do_pad": None, "do_flip": False, "size": 200}
    processor = DeiTImageProcessor.from_dict(data)
    data["future"]["a"].append(2)
    saved = json.loads(processor.save_pretrained(tmp_path / "new" / "folder").read_text())
    assert saved["future"] == {"a": [1]}
    assert saved["processor_class"] == "X"
    assert saved["do_pad"] is None
    assert saved["do_flip"] is False
    assert saved["image_processor_type"] == "DeiTImageProcessor"
    assert DeiTImageProcessor.from_dict(saved) == processor
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["preprocessor_config.json"]
    with pytest.raises(ValueError, match="do_flip=True is not done"):
        DeiTImageProcessor.from_dict({**saved, "do_flip": True})


def test_from_pretrained(tmp_path):
    DeiTImageProcessor(size=100).save_pretrained(tmp_path / "sub")
    processor = DeiTImageProcessor.from_pretrained(tmp_path, subfolder="sub", crop_size=90)
    assert processor == DeiTImageProcessor(size=100, crop_size=90)
    with pytest.raises(FileNotFoundError):
        DeiTImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown option sise"):
        DeiTImageProcessor.from_pretrained(tmp_path, subfolder="sub", sise=4)


def test_refused_files(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object, found list"),
        ('{"image_processor_type": "CLIPImageProcessor"}', "is for CLIPImageProcessor, which is not"),
        ('{"feature_extractor_type": "BeitFeatureExtractor"}', "is for BeitFeatureExtractor"),
        ('{"do_pad": true}', "do_pad=True is not done"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            DeiTImageProcessor.from_json_file(path)
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        DeiTImageProcessor().save_pretrained(path)


def test_former_name():
    with pytest.warns(FutureWarning, match="use DeiTImageProcessor"):
        extractor = DeiTFeatureExtractor(size=100)
    assert extractor == DeiTImageProcessor(size=100)
    assert extractor.to_dict()["image_processor_type"] == "DeiTImageProcessor"


def test_paper():
    processor = DeiTImageProcessor.paper()
    assert processor.size == {"shortest_edge": 256}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert (processor.image_mean, processor.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert processor.resample == Image.Resampling.BICUBIC
    assert DeiTImageProcessor.paper(384).size == {"shortest_edge": 438}
    assert DeiTImageProcessor.paper((96, 192), 1.0).size == {"shortest_edge": 192}
    with pytest.raises(ValueError, match=r"crop_ratio is 1\.5"):
        DeiTImageProcessor.paper(224, 1.5)


TIMM = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("size", "cfg"),
    [
        (224, {**TIMM, "crop_pct": 0.875}),
        (224, {**TIMM, "crop_pct": 0.9}),
        (384, {**TIMM, "crop_pct": 1.0}),
        (48, {**TIMM, "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bilinear"}),
        (64, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}),
    ],
)
def test_timm(size, cfg):
    from timm.data import create_transform

    processor = DeiTImageProcessor.from_timm(cfg, size)
    said = processor.to_timm()
    assert DeiTImageProcessor.from_timm(said, size) == processor
    image = smooth(300, 400)  # sizes whose crops round alike in both
    for keys in (cfg, said):
        theirs = create_transform(input_size=(3, size, size), **{"crop_pct": 0.875, **keys})(image)
        assert worst(processor(image, "np").pixel_values[0], theirs) <= 1e-5


def test_timm_refused():
    with pytest.raises(ValueError, match="crop_mode is 'border'"):
        DeiTImageProcessor.from_timm({"crop_mode": "border"})
    for options in (
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"size": {"shortest_edge": 50}, "crop_size": (30, 40)},
        {"size": {"shortest_edge": 50}, "do_center_crop": False},
    ):
        with pytest.raises(ValueError, match="timm's keys say"):
            DeiTImageProcessor(**options).to_timm()
