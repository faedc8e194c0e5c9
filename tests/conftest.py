"""Helpers of the tests: small models with values that are all random, and comparisons that say where they differ."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config import ACTIVATIONS, DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    PreTrained,
)

torch.set_num_threads(1)

LABELS = dict(enumerate(("ant", "bee", "cat", "dog", "eel")))
CLASS_OF = {"backbone": DeiTModel, "masked_image": DeiTForMaskedImageModeling,
            "classification": DeiTForImageClassification, "with_teacher": DeiTForImageClassificationWithTeacher}


@contextmanager
def raises_saying(error: type[Exception], *parts: object) -> Iterator[None]:
    """Asserts that the block fails with `error`, in one line that holds all `parts`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [str(part) for part in parts if str(part) not in message] == [], message


def run_python(code: str, **environment: str | None) -> str:
    """Standard output of `code` in a fresh interpreter; None removes a variable."""
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={name: value for name, value in variables.items() if value is not None})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def quiet_transformers():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def photos(tmp_path):
    """Two files of noise: a small PNG and a wide JPEG."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "small.png", tmp_path / "wide.jpg"]
    for path, size in zip(paths, [(20, 30, 3), (90, 160, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def distilled(tmp_path):
    """The folder of a small distilled model of `LABELS`."""
    model = build("with_teacher", small(id2label=LABELS, num_labels=None))
    model.save_pretrained(tmp_path / "model")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shrink(config: DeiTConfig, **changes: Any) -> DeiTConfig:
    """The same architecture, narrow and two blocks deep."""
    width = 8 * config.num_attention_heads
    return config.replace(**{"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2,
                             "num_labels": 7, **changes})


def small(**changes: Any) -> DeiTConfig:
    return DeiTConfig(**{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
                         "image_size": 16, "patch_size": 4, "encoder_stride": 4, "layer_norm_eps": 1e-6,
                         "num_labels": 5, **changes})


def random_config(seed: int, *, square: bool = False, **changes: Any) -> DeiTConfig:
    """Sizes and options drawn from `seed`. `square`: image and patch both one number, with whole patches."""
    draw = random.Random(seed)
    heads, patch = draw.choice([1, 2, 3, 4]), draw.choice([2, 3, 4])
    width = heads * draw.choice([4, 6, 8])
    image: Any = patch * draw.randint(2, 5)
    if not square and draw.random() < 0.6:
        patch = (patch, draw.choice([2, 3, 5]))
        image = (patch[0] * draw.randint(1, 4) + draw.randint(0, 1), patch[1] * draw.randint(2, 4))
    fields = {
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": draw.randint(1, 4),
        "intermediate_size": draw.choice([5, 16, 32]), "hidden_act": draw.choice(ACTIVATIONS), "image_size": image,
        "patch_size": patch, "encoder_stride": patch if square else 16, "num_channels": draw.choice([1, 3, 4]),
        "qkv_bias": draw.random() < 0.5, "layer_norm_eps": draw.choice([1e-12, 1e-6, 1e-3]),
        "pooler_output_size": draw.choice([None, 3, 20]), "pooler_act": draw.choice(ACTIVATIONS),
        "num_labels": draw.choice([0, 1, 2, 9]),
    }
    return DeiTConfig(**{**fields, **changes})


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> Any:
    """Random values for every parameter, large enough that no term of the computation is negligible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(0.3 * noise + (1.0 if gain or name.endswith(("scale1", "scale2", "gamma")) else 0.0))
        elif any(word in name for word in ("token", "pos")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    return model


def build(kind: str, config: DeiTConfig, seed: int = 0, **options: Any) -> PreTrained:
    return scramble(CLASS_OF[kind](config, **options), seed).eval()


def images(config: DeiTConfig, count: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.num_channels, *(size or config.image_hw), generator=generator)


def mask_for(config: DeiTConfig, count: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    rows, columns = config.grid_of(*(size or config.image_hw))
    mask = torch.rand(count, rows * columns, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0], mask[:, -1] = True, False
    return mask


def assert_close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    """Asserts equality of tensors, or of tuples and mappings of tensors, within an absolute difference."""
    if isinstance(expected, Mapping):
        assert set(found) == set(expected)
        for name in expected:
            assert_close(found[name], expected[name], atol)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, atol)
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=atol)


def loss_of(output: Any) -> torch.Tensor:
    """A number that depends on every tensor of an output, with gradients of moderate size."""
    tensors = [output[name] for name in ("last_hidden_state", "pooler_output", "reconstruction", "logits",
                                         "cls_logits") if name in output]
    generator = torch.Generator().manual_seed(3)
    return sum((t * torch.randn(t.shape, generator=generator)).mean() for t in tensors)
