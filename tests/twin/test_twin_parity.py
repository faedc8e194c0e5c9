"""The Keras models against the PyTorch ones, by value: every published architecture, every head, every option."""

import numpy as np
import pytest
import torch
from support.models import images, mask_for, random_config, scramble, shrink, small
from twins import (
    SLOW_ON_JAX,
    TWIN_OF,
    arrays,
    as_arrays,
    assert_alike,
    distance,
    given_for,
    gradients,
    keras,
    slow_on_jax,
    twins,
)

import deit
from deit import weights
from deit.config import VARIANTS
from deit.model.heads import fuse_heads
from deit.model_keras.network import fuse_heads as fuse_twins_heads

KINDS = pytest.mark.parametrize("kind", TWIN_OF)


def kinds_of(config):
    return [kind for kind in TWIN_OF if config.distillation_token or kind != "with_teacher"]


QUICK = ("deit-tiny-distilled-patch16-224", "deit3-small-patch16-224")
"""On JAX the others are slow."""


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in QUICK else SLOW_ON_JAX) for name in VARIANTS]
)
def test_every_variant(variant):
    """Every head x mask or not x its own size, another one by interpolation, and a model of non-square images."""
    config = shrink(VARIANTS[variant])
    height, width = (7 * side for side in config.patch_hw)
    for changes, sizes in (({}, (None, (height + 3, 2 * width))), ({"image_size": (2 * height, width)}, (None,))):
        changed = config.replace(encoder_stride=config.patch_size, **changes)
        for kind in kinds_of(changed):
            ours, twin = twins(kind, changed, **({"use_mask_token": True} if kind == "backbone" else {}))
            for mask in (False, True) if kind in ("backbone", "masked_image") else (False,):
                for size in sizes:
                    given = given_for(changed, size=size, mask=mask)
                    assert_alike(ours, twin, given | ({"interpolate_pos_encoding": True} if size else {}))


@slow_on_jax
@pytest.mark.parametrize(
    "variant", ["deit-tiny-distilled-patch16-224", pytest.param("deit-base-distilled-patch16-224", marks=SLOW_ON_JAX)]
)
def test_full_size(variant):
    """With values as large as training leaves them: random ones of the other tests grow through 12 blocks."""
    ours = deit.DeiTForImageClassificationWithTeacher(VARIANTS[variant]).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    twin = TWIN_OF["with_teacher"](VARIANTS[variant])
    twin.set_tensors(arrays(ours))
    assert sum(value.size for value in twin.tensors().values()) == ours.num_parameters()
    assert_alike(ours, twin, given_for(VARIANTS[variant], 1))


@KINDS
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW_ON_JAX) for seed in range(1, 6))])
def test_random_configs(kind, seed):
    """Sizes, activations, biases, channels and patches drawn at random."""
    config = random_config(
        seed,
        distillation_token=kind == "with_teacher" or seed % 2 == 0,
        layer_scale_init_value=None if seed % 3 else 0.1,
        position_on_class_token=seed % 3 > 0,
    )
    config = config.replace(encoder_stride=config.patch_size)
    assert_alike(*twins(kind, config), given_for(config, mask=kind == "masked_image"))


@KINDS
def test_attentions_and_hidden_states(kind):
    config = small(output_hidden_states=True, output_attentions=True)
    ours, twin = twins(kind, config)
    given = given_for(config, mask=kind == "masked_image")
    assert_alike(ours, twin, given)
    assert_alike(ours, twin, given | {"head_mask": torch.tensor([0.0, 1.0, 0.5])})
    assert_alike(ours, twin, given | {"head_mask": torch.rand(3, 3)})
    with torch.no_grad():
        expected = ours(**given, return_dict=False)
    found = twin(**as_arrays(given), return_dict=False)
    assert isinstance(found, tuple)
    assert distance(found, expected) < 1e-5
    assert "attentions" not in twin(**as_arrays(given), output_attentions=False)


@KINDS
def test_tensors_are_those_of_the_manifest(kind):
    for changes in ({}, {"layer_scale_init_value": 0.1, "position_on_class_token": False}, {"qkv_bias": False}):
        config = small(**changes)
        twin = TWIN_OF[kind](config)
        expected = weights.manifest(config, kind, pooler=kind == "backbone")
        assert {name: value.shape for name, value in twin.tensors().items()} == expected
        assert len(twin.weights) == len(expected)
        assert sum(np.prod(shape) for shape in expected.values()) == twin.count_params()


@KINDS
def test_initial_values(kind):
    """As the PyTorch models draw them: moments of every tensor within five standard errors."""
    config = small(hidden_size=96, image_size=32, layer_scale_init_value=1e-4, num_labels=50)
    found = TWIN_OF[kind](config).tensors()
    bound = 1 / np.sqrt(3 * 4 * 4)
    for name, value in found.items():
        if ".scale" in name:
            assert (value == np.float32(1e-4)).all()
        elif ".norm" in name or (name.endswith("bias") and "patch" not in name):
            assert (value == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all()
        else:
            expected = bound / np.sqrt(3) if "patch" in name else config.initializer_range
            error = expected / np.sqrt(value.size)
            assert abs(value.mean()) < 5 * error, name
            assert abs(value.std() - expected) < 5 * error, name
    if kind == "with_teacher":
        assert np.abs(found["deit.cls_token"] - found["deit.distillation_token"]).max() > 0.02
        assert np.abs(found["cls_classifier.weight"] - found["distillation_classifier.weight"]).max() > 0.02


# -------------------------------------------------------------------------------------------------------- in training


TRAINED = {
    "classification": {"labels": torch.tensor([1, 0, 4])},
    "with_teacher": {"labels": torch.tensor([1, 0, 4]), "teacher_logits": torch.randn(3, 5)},
    "masked_image": {},
}


def training_data(kind, config):
    given = given_for(config, 3, mask=kind == "masked_image") | TRAINED[kind]
    return given | ({"depth_draws": torch.rand(3, 3, 2)} if config.drop_path_rate else {})


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("changes", [{}, {"drop_path_rate": 0.5, "layer_scale_init_value": 0.1}])
def test_gradients(kind, changes):
    config = small(**changes)
    ours, twin = twins(kind, config)
    given = training_data(kind, config)
    ours.train()(**given).loss.backward()
    found = gradients(twin, **as_arrays(given))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert distance(found[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("kind", TRAINED)
def test_one_step_of_adamw(kind):
    """`fit`'s step and PyTorch's. `eps` outweighs rounding errors: the keys' biases have no gradient but these. Keras
    adds it before correcting the second moment, PyTorch after."""
    config = small(drop_path_rate=0.5)
    ours, twin = twins(kind, config)
    given = training_data(kind, config)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.05}
    optimizer = torch.optim.AdamW(ours.parameters(), eps=1e-3, **settings)
    loss = ours.train()(**given).loss
    loss.backward()
    optimizer.step()
    twin.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.05, beta_2=0.99, epsilon=1e-3 * np.sqrt(1 - 0.99)))
    found = twin.train_on_batch(as_arrays(given), return_dict=True)
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    before = arrays(scramble(type(ours)(config)))
    after = twin.tensors()
    for name, value in arrays(ours).items():
        assert distance(after[name], value) < 1e-5, name
        assert "attention.qkv" in name or distance(before[name], value) > 1e-4, name


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [0.0, 0.2, 0.4]), ("constant", [0.4, 0.4, 0.4])])
def test_stochastic_depth(schedule, rates):
    """The draws decide alike in both; its own draws have the stated rate and keep the expectation."""
    config = small(drop_path_rate=0.4, drop_path_schedule=schedule)
    ours, twin = twins("backbone", config)
    given = given_for(config, 8) | {"depth_draws": torch.rand(8, 3, 2)}
    with torch.no_grad():
        expected = ours.train()(**given).last_hidden_state
        kept = ours.eval()(**given).last_hidden_state
    assert distance(twin(**as_arrays(given), training=True).last_hidden_state, expected) < 1e-5
    assert distance(twin(**as_arrays(given)).last_hidden_state, kept) < 1e-5
    one = np.zeros((4000, 1, 1), "float32")
    for rate, keep in zip(rates, twin._keeps(one, None, True), strict=True):
        if not rate:
            assert keep is None
            continue
        keep = keras.ops.convert_to_numpy(keep)
        assert set(np.unique(keep)) == {0.0, np.float32(1 / (1 - rate))}
        assert np.mean(keep == 0) == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / keep.size))
    first, second = (twin(given["pixel_values"].numpy(), training=True).last_hidden_state for _ in range(2))
    assert distance(first, second) > 0.1


def test_dropout():
    config = small(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    ours, twin = twins("backbone", config)
    x = given_for(config, 16)
    assert_alike(ours, twin, x)
    trace = {}
    out = twin(**as_arrays(x), training=True, output_attentions=True, trace=trace)
    clean = {}
    twin(**as_arrays(x), trace=clean)
    noisy, plain = (keras.ops.convert_to_numpy(t["embeddings"]) for t in (trace, clean))
    kept = noisy != 0
    np.testing.assert_allclose(noisy[kept], plain[kept] / 0.75, atol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=5 * np.sqrt(0.1875 / kept.size))
    dropped = keras.ops.convert_to_numpy(out.attentions[0]) == 0
    assert dropped.mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(dropped.size))


# ---------------------------------------------------------------------------------------------------------- interface


def test_positional_dictionary_and_named_inputs_agree():
    twin = TWIN_OF["with_teacher"](small())
    x = given_for(small())["pixel_values"].numpy()
    expected = twin(pixel_values=x).logits
    for found in (
        twin(x),
        twin({"pixel_values": x}),
        twin(
            deit.DeiTImageProcessor(
                do_resize=False,
                do_center_crop=False,
                do_rescale=False,
                do_normalize=False,
                image_mean=0.0,
                image_std=1.0,
            )(list(x), return_tensors="np")
        ),
    ):
        assert distance(found.logits, expected) == 0.0
    with pytest.raises(ValueError, match="takes no pixels; it takes pixel_values, head_mask, "):
        twin({"pixel_values": x, "pixels": x})


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("backbone", {"pixel_values": None}, "pixel_values are missing; pass a tensor"),
        (
            "backbone",
            {"pixel_values": np.zeros((3, 16, 16), "float32")},
            r"must be \(images, 3, height, width\), found \(",
        ),
        (
            "backbone",
            {"pixel_values": np.zeros((2, 16, 16, 3), "float32")},
            r"found \(2, 16, 16, 3\); DeiTImageProcessor",
        ),
        ("backbone", {"pixel_values": np.zeros((2, 3, 16, 16), "uint8")}, "must be normalised floats, found uint8"),
        ("backbone", {"pixel_values": np.zeros((2, 3, 16, 20), "float32")}, "images are 16x20, this model takes 16x16"),
        (
            "backbone",
            {"pixel_values": np.zeros((2, 3, 3, 20), "float32"), "interpolate_pos_encoding": True},
            "images of 3x20 hold no patch of 4x4",
        ),
        ("backbone", {"bool_masked_pos": np.zeros((2, 16), bool)}, "needs a mask token; build TFDeiTModel"),
        ("backbone", {"head_mask": np.ones(4, "float32")}, r"head_mask must be \(3,\) or \(3, 3\), found \(4,\)"),
        ("backbone", {"depth_draws": np.ones((2, 2, 2), "float32")}, r"depth_draws must be \(2, 3, 2\)"),
        ("masked_image", {"bool_masked_pos": np.zeros((2, 9), bool)}, r"must be \(2, 16\): 4x4 patches for each of 2"),
        (
            "with_teacher",
            {"labels": np.array([0, 1]), "training": True},
            "trains on labels and teacher_logits together",
        ),
        (
            "classification",
            {"labels": np.zeros((2, 3), "float32")},
            r"multi label classification needs labels of shape",
        ),
    ],
)
def test_refused_inputs(kind, given, sentence):
    config = small()
    with pytest.raises(ValueError, match=sentence):
        TWIN_OF[kind](config)(**{"pixel_values": np.zeros((2, 3, 16, 16), "float32"), **given})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: deit.TFDeiTForMaskedImageModeling(small(encoder_stride=16)),
            "encoder_stride=16 must equal patch_size=4",
        ),
        (
            lambda: deit.TFDeiTForImageClassificationWithTeacher(small(distillation_token=False)),
            "needs a distillation tok",
        ),
        (lambda: deit.TFViTModel(small()), "a ViT has no distillation token"),
        (lambda: deit.TFViTForImageClassification(small()), "a ViT has no distillation token"),
    ],
)
def test_refused_configs(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("head", ["fused", "softmax", "class", "distillation"])
def test_fused_heads(head):
    one, other = torch.randn(2, 4, 7)
    assert distance(fuse_twins_heads(one.numpy(), other.numpy(), head), fuse_heads(one, other, head)) < 1e-6
    with pytest.raises(ValueError, match="head='mean' is not known"):
        fuse_twins_heads(one.numpy(), other.numpy(), "mean")


def test_inside_a_functional_model():
    config = small()
    ours, twin = twins("backbone", config)
    image = keras.Input((3, 16, 16))
    model = keras.Model(image, twin(image).pooler_output)
    x = given_for(config)["pixel_values"]
    with torch.no_grad():
        assert distance(model(x.numpy()), ours(x).pooler_output) < 1e-5


def test_compiled_as_it_runs():
    """XLA's graph, from `predict`, gives what the layers one by one give."""
    config = small(output_hidden_states=True)
    ours, twin = twins("with_teacher", config)
    x = given_for(config, 5)
    with torch.no_grad():
        expected = ours(**x)
    found = twin.predict(x["pixel_values"].numpy(), batch_size=2, verbose=0)
    assert type(found) is type(expected)
    for name in expected:
        assert distance(found[name], expected[name]) < 1e-5


@slow_on_jax
@pytest.mark.parametrize(("policy", "atol"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision(policy, atol):
    """Near the float32 values for what the format holds, in its type, with weights of the policy's."""
    config = small(layer_scale_init_value=0.1)
    ours, twin = twins("with_teacher", config, dtype=policy)
    x = given_for(config)
    with torch.no_grad():
        expected = ours(**x).logits
    found = twin(**as_arrays(x)).logits
    assert keras.backend.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(twin.deit.cls_token.dtype) == policy.replace(
        "mixed_bfloat16", "float32"
    ).replace("mixed_float16", "float32")
    assert 0 < distance(found, expected) < atol * expected.abs().max().item()


@pytest.mark.parametrize("kind", TWIN_OF)
def test_a_dictionary_holds_options_too(kind):
    """The first argument of the TensorFlow classes of transformers: tensors and options by name."""
    ours, twin = twins(kind, small())
    given = {"pixel_values": images(ours.config).numpy()}
    mask = {"bool_masked_pos": mask_for(ours.config).numpy()} if kind == "masked_image" else {}
    found = twin({**given, **mask, "output_hidden_states": True, "output_attentions": None, "training": False})
    expected = twin(given["pixel_values"], output_hidden_states=True, training=False, **mask)
    assert list(found.keys()) == list(expected.keys())
    assert len(found.hidden_states) == ours.config.num_hidden_layers + 1
    assert distance(found.hidden_states[-1], expected.hidden_states[-1]) == 0
    tuple_of = twin({**given, **mask, "return_dict": False})
    assert isinstance(tuple_of, tuple)
