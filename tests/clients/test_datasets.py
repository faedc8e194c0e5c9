"""Our processor inside `datasets`, and our probabilities in cleanlab, against those of `transformers`."""

import numpy as np
import pytest
import torch
from support.hugging_face import pair
from support.models import images, small
from support.pictures import noise, worst
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from deit.image.processor import DeiTImageProcessor

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of these libraries themselves

OPTIONS = {"size": {"shortest_edge": 20}, "crop_size": 16}


@pytest.fixture
def photos(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    pictures = [Image.fromarray(noise(20 + i, 30, seed=i)) for i in range(5)]
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [0, 1, 2, 3, 4]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )


def expected(photos):
    return np.stack(DeiTImageProcessorPil(**OPTIONS)(list(photos["image"])).pixel_values)


@pytest.mark.parametrize("batched", [True, False])
def test_map(photos, batched):
    processor = DeiTImageProcessor(**OPTIONS)
    given = "np" if not batched else None

    def prepare(rows):
        found = processor(rows["image"], return_tensors=given)
        return found if batched else {"pixel_values": found["pixel_values"][0]}

    mapped = photos.map(prepare, batched=batched).with_format("numpy")
    assert worst(np.stack(list(mapped["pixel_values"])), expected(photos)) <= 1e-5
    assert list(mapped["label"]) == [0, 1, 2, 3, 4]


def test_with_transform(photos):
    processor = DeiTImageProcessor(**OPTIONS)
    data = photos.with_transform(
        lambda rows: {**processor(rows["image"], return_tensors="pt"), "labels": torch.tensor(rows["label"])}
    )
    (batch,) = torch.utils.data.DataLoader(data, batch_size=5)
    assert worst(batch["pixel_values"].numpy(), expected(photos)) <= 1e-5
    ours, theirs = pair("DeiTForImageClassification", small())
    with torch.no_grad():
        assert abs(float(ours(**batch).loss - theirs(**batch).loss)) < 1e-5


def test_the_cache_of_map_knows_the_options():
    """The same options give the same fingerprint, in every process; others give another one."""
    hash_of = pytest.importorskip("datasets").fingerprint.Hasher.hash
    assert hash_of(DeiTImageProcessor(**OPTIONS)) == hash_of(DeiTImageProcessor(**OPTIONS))
    assert hash_of(DeiTImageProcessor(**OPTIONS)) != hash_of(DeiTImageProcessor(**{**OPTIONS, "crop_size": 12}))


def test_label_issues():
    find = pytest.importorskip("cleanlab.filter").find_label_issues
    x = images(small(), 200)
    found = []
    for model in pair("DeiTForImageClassification", small()):
        with torch.no_grad():
            found.append((3 * model(x).logits).softmax(-1).double().numpy())
    assert np.abs(found[0] - found[1]).max() < 1e-5
    labels = found[1].argmax(1)
    certain = np.argsort(found[1].max(1))[::-1][:6]
    labels[certain] = (labels[certain] + 1) % 5  # wrong on purpose
    issues = [find(labels, probabilities, n_jobs=1) for probabilities in found]
    assert (issues[0] == issues[1]).all()
    assert issues[0][certain].all()
    assert issues[0].sum() < 60
