"""`pipeline()` beside transformers' on the same files."""

import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.models import trained_folder

import deit
from deit.image.decode import ImageError
from deit.image.processor import DeiTImageProcessor

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def assert_same(found, expected):
    assert isinstance(found, list)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        if isinstance(expected[0], dict):
            assert [each["label"] for each in found] == [each["label"] for each in expected]
            assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
        else:
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)


def theirs_of(transformers, task, model):
    """Their pipeline with Pillow's resampling: torchvision's differs from it by 0.0004 of a score."""
    from transformers import AutoImageProcessor

    return transformers.pipeline(
        task, model=str(model), device="cpu", image_processor=AutoImageProcessor.from_pretrained(model, backend="pil")
    )


@pytest.mark.parametrize("kind", ["classification", "with_teacher"])
def test_classification_is_that_of_transformers(folder, kind, quiet_transformers):
    model = trained_folder(folder / "m", kind, NAMES)
    theirs = theirs_of(quiet_transformers, "image-classification", model)
    ours = deit.pipeline("image-classification", model=model)
    paths = [str(folder / f"{i}.png") for i in range(5)]
    assert_same(ours(paths[0]), theirs(paths[0]))
    assert_same(ours(paths), theirs(paths))
    assert_same(ours(paths, top_k=2, batch_size=3), theirs(paths, top_k=2))
    assert_same(ours(Image.open(paths[1])), theirs(Image.open(paths[1])))
    assert_same(ours(np.asarray(Image.open(paths[1]))), theirs(np.asarray(Image.open(paths[1]))))
    assert_same(ours(paths[0], top_k=99), theirs(paths[0], top_k=99))
    for function in ("softmax", "sigmoid", "none"):
        assert_same(ours(paths[0], function_to_apply=function), theirs(paths[0], function_to_apply=function))
    assert_same(deit.pipeline(model=model, top_k=1)((folder / "0.png").read_bytes()), theirs(paths[0], top_k=1))


@pytest.mark.parametrize(
    "changes", [{"id2label": {0: "x"}}, {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}]
)
def test_the_default_function_is_that_of_transformers(folder, changes, quiet_transformers):
    model = trained_folder(folder / "m", "classification", NAMES, **changes)
    path = str(folder / "0.png")
    assert_same(deit.pipeline(model=model)(path), theirs_of(quiet_transformers, "image-classification", model)(path))


def test_iterables_are_read_as_they_are_asked(folder):
    pipe = deit.pipeline(model=trained_folder(folder / "m", labels=NAMES), top_k=1, batch_size=2)
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield folder / "0.png"

    answers = pipe(endless())
    assert_same(next(answers), pipe(folder / "0.png"))
    assert len(asked) == 2
    assert pipe([]) == []
    assert pipe(()) == []


@pytest.mark.parametrize("pool", [False, True])
def test_features_are_those_of_transformers(folder, pool, quiet_transformers):
    model = trained_folder(folder / "m", "backbone", NAMES)
    theirs = theirs_of(quiet_transformers, "image-feature-extraction", model)
    ours = deit.pipeline("image-feature-extraction", model=model, pool=pool)
    paths = [str(folder / f"{i}.png") for i in range(3)]
    found, expected = ours(paths), theirs(paths, pool=pool)
    np.testing.assert_allclose(np.array(found), np.array(expected).reshape(np.array(found).shape), atol=1e-5)
    assert isinstance(ours(paths[0]), list)
    tensor = deit.pipeline("image-feature-extraction", model=model, pool=pool, return_tensors=True)(paths[0])
    assert torch.allclose(tensor, torch.tensor(found[0]), atol=1e-6)


def test_heads(folder):
    model = trained_folder(folder / "m", labels=NAMES)
    path = folder / "0.png"
    for head in ("fused", "class", "distillation", "softmax"):
        assert deit.pipeline(model=model, head=head)(path) == deit.Predictor(model, head=head)([path])[0]
    with raises_saying(ValueError, "head 'softmax' has no logits of its own"):
        deit.pipeline(model=model, head="softmax")(path, function_to_apply="none")


def test_addresses_only_when_allowed(folder):
    model = trained_folder(folder / "m", labels=NAMES)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        pipe = deit.pipeline(model=model)
        with raises_saying(ValueError, "is an address, and fetching is not allowed; pass allow_urls=True"):
            pipe(f"{address}/0.png")
        allowed = deit.pipeline(model=model, allow_urls=True)
        assert allowed(f"{address}/0.png") == pipe(folder / "0.png")
        with raises_saying(ValueError, "can't be fetched", "404"):
            allowed(f"{address}/gone.png")
        assert allowed(f"{address}/to/{address}/0.png") == pipe(folder / "0.png")
        for elsewhere in ("ftp://127.0.0.1/0.png", f"file://{folder}/0.png"):
            with raises_saying(ValueError, "can't be fetched", elsewhere):
                allowed(f"{address}/to/{elsewhere}")
        server.shutdown()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda model, at: deit.pipeline("text-generation", model=model), ValueError, "there is no pipeline 'text-gen"),
        (lambda model, at: deit.pipeline("image-classification"), ValueError, "pipeline needs a model"),
        (
            lambda model, at: deit.pipeline(model=model)(7),
            ValueError,
            "expected a path, bytes, a Pillow image or an array",
        ),
        (lambda model, at: deit.pipeline(model=model)(at / "0.png", top_k=0), ValueError, "top_k must be at least 1"),
        (lambda model, at: deit.pipeline(model=model, batch_size=-1)(at / "0.png"), ValueError, "batch_size must be"),
        (
            lambda model, at: deit.pipeline(model=model)(at / "0.png", function_to_apply="max"),
            ValueError,
            "function_to_apply='max' is not known",
        ),
        (lambda model, at: deit.pipeline(model=model)(b"no image"), ImageError, "is not an image"),
        (
            lambda model, at: deit.pipeline("image-feature-extraction", model=model, pool=True),
            ValueError,
            "pool=True needs a model with a pooler, found none in",
        ),
    ],
)
def test_refusals(folder, call, error, sentence):
    with raises_saying(error, sentence):
        call(trained_folder(folder / "m", labels=NAMES), folder)


def test_our_model_inside_their_pipeline(folder, quiet_transformers):
    """As far as it goes: a single image with our processor. What asks for more is their class, from the same folder."""
    at = trained_folder(folder / "m", labels=NAMES)
    pipe = quiet_transformers.pipeline(
        "image-classification", model=deit.load_model(at), image_processor=DeiTImageProcessor.from_pretrained(at)
    )
    assert_same(pipe(str(folder / "0.png")), deit.pipeline(model=at)(folder / "0.png"))


@pytest.mark.parametrize("kind", ["with_teacher", "plain", "convnet"])
def test_a_model_in_memory(tmp_path, photos, kind):
    folder = trained_folder(tmp_path / "m", kind)
    model, processor = deit.load_model(folder).train(), DeiTImageProcessor.from_pretrained(folder)
    pipe = deit.pipeline(model=model, image_processor=processor)
    assert pipe([str(path) for path in photos]) == deit.pipeline(model=folder)([str(path) for path in photos])
    assert not model.training
    with raises_saying(ValueError, "a model in memory says nothing about its images; pass image_processor too"):
        deit.pipeline(model=model)
    features = {"task": "image-feature-extraction", "image_processor": processor}
    if kind == "convnet":
        with raises_saying(ValueError, "found a ConvNet, expected a model of the DeiT family"):
            deit.pipeline(model=model, **features)
    else:
        expected = deit.pipeline("image-feature-extraction", model=folder)(str(photos[0]))
        assert np.allclose(deit.pipeline(model=model, **features)(str(photos[0])), expected, atol=1e-6)


def test_another_processor_than_the_folders(tmp_path, photos):
    folder = trained_folder(tmp_path / "m")
    processor = DeiTImageProcessor.from_pretrained(folder, image_mean=[0.1, 0.2, 0.3])
    found = deit.pipeline(model=folder, image_processor=processor)(str(photos[0]))
    assert found == deit.pipeline(model=deit.load_model(folder), image_processor=processor)(str(photos[0]))
    assert found != deit.pipeline(model=folder)(str(photos[0]))
