"""Pictures made up for tests, their files, and how far apart two sets of pixel values are."""

import io

import numpy as np
from PIL import Image

from deit.data.augment import erased


def noise(height, width, channels=3, seed=0):
    """An array (height, width, channels) of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def erase(pixels, settings, rng):
    """Fills the rectangle that `erased` draws for `pixels` (channels, height, width), in place."""
    box = erased(pixels.shape, settings, rng)
    if box is not None:
        top, left, values = box
        pixels[:, top : top + values.shape[1], left : left + values.shape[2]] = values


def smooth(height, width):
    """A photo-like picture: slow waves of three colours, and a hard edge."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + 2 * y)], axis=-1) * 100 + 128
    waves[: height // 3, : width // 2] *= 0.5
    return Image.fromarray(waves.astype(np.uint8))


def photo(height, width, seed=0):
    """As much detail at every scale, as in photographs: amplitudes fall with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    waves = [(rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency for _ in range(3)]
    grey, *colours = (np.fft.irfft2(wave, (height, width)) for wave in waves)
    pixels = np.stack([grey, 0.8 * grey + 0.2 * colours[0], 0.8 * grey + 0.2 * colours[1]], axis=-1)
    return Image.fromarray(np.clip(120 + 50 * pixels / grey.std(), 0, 255).astype(np.uint8))


def encode(image, form="JPEG", **options):
    """The bytes of its file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation):
    """The entry that says how the camera was held."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def worst(ours, theirs):
    """Largest difference of a pixel value. Ours are float32, of the same shape as theirs."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    return np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
