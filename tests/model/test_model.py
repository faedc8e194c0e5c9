import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, build, images, loss_of, mask_for, small

from deit import weights
from deit.config import ViTConfig
from deit.model import network
from deit.model.network import (
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    ViTForImageClassification,
    ViTModel,
)

KINDS = pytest.mark.parametrize("kind", CLASS_OF)
RECTANGLES = [
    {},
    {"image_size": (8, 20)},
    {"image_size": (12, 15), "patch_size": (4, 3), "encoder_stride": (4, 3)},
    {"image_size": (13, 11), "patch_size": (2, 5), "encoder_stride": (2, 5), "num_channels": 1},
    {
        "image_size": (8, 12),
        "distillation_token": False,
        "layer_scale_init_value": 0.1,
        "position_on_class_token": False,
    },
]


def given_for(kind, config, size=None):
    given = {"pixel_values": images(config, size=size)}
    return given | ({"bool_masked_pos": mask_for(config, size=size)} if kind == "masked_image" else {})


def gradients(model, **given):
    model.zero_grad()
    loss_of(model(**given)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------- masked image modelling


@pytest.mark.parametrize("size", [None, (10, 15), (24, 10)])
@pytest.mark.parametrize("changes", RECTANGLES)
def test_masked_image_modelling(changes, size):
    """Any grid: each patch's pixels are one linear map of its token, and the loss is the hidden pixels' mean error."""
    config = small(**changes)
    model = build("masked_image", config)
    x, mask = images(config, size=size), mask_for(config, size=size)
    with torch.no_grad():
        out = model(x, mask, interpolate_pos_encoding=size is not None)
        tokens = model.deit(x, mask, interpolate_pos_encoding=size is not None).last_hidden_state
    (height, width), (rows, columns) = config.patch_hw, config.grid_of(*(size or config.image_hw))
    tokens = tokens[:, config.num_prefix_tokens :].double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (model.decoder.weight[..., 0, 0], model.decoder.bias))
    painted = np.zeros((2, config.num_channels, rows * height, columns * width))
    errors = []
    for b in range(2):
        for n in range(rows * columns):
            top, left = n // columns * height, n % columns * width
            patch = (weight @ tokens[b, n] + bias).reshape(config.num_channels, height, width)
            painted[b, :, top : top + height, left : left + width] = patch
            if mask[b, n]:
                errors.append(np.abs(patch - x[b, :, top : top + height, left : left + width].numpy()).mean())
    assert_close(out.reconstruction, torch.tensor(painted).float())
    assert out.loss.item() == pytest.approx(np.mean(errors), abs=1e-5)


@pytest.mark.parametrize(("size", "patch"), [((16, 16), (4, 4)), ((17, 22), (4, 5)), ((7, 9), (7, 3))])
def test_the_product_that_projects_patches_is_the_convolution(size, patch):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 24, patch, patch).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = (pixels, *convolution.parameters())
    expected = convolution(pixels)
    found = network._product(convolution, pixels, *expected.shape[2:])
    assert_close(found, expected.flatten(2).transpose(1, 2), 1e-12)
    upstream = torch.randn_like(found)
    theirs = torch.autograd.grad(expected, inputs, upstream.transpose(1, 2).view_as(expected))
    for ours, other in zip(torch.autograd.grad(found, inputs, upstream), theirs, strict=True):
        assert_close(ours, other, 1e-12)


@pytest.mark.parametrize(
    ("learns", "bfloat16", "expected"),
    [(True, False, True), (True, True, True), (False, True, True), (False, False, False)],
)
def test_where_a_product_projects_patches_on_a_cpu(learns, bfloat16, expected, monkeypatch):
    """Where it is faster, and never in an export, whose runtimes have convolutions of their own."""
    model, taken, product = build("backbone", small()), [], network._product
    model.patch.requires_grad_(learns)
    monkeypatch.setattr(network, "_product", lambda *given: [taken.append(1), product(*given)][1])
    x = images(model.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        found = model(x).last_hidden_state
    assert bool(taken) == expected
    monkeypatch.setattr(network, "_product_is_faster", lambda *_: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        assert_close(found, model(x).last_hidden_state, 0.05 if bfloat16 else 1e-5)
    monkeypatch.undo()
    program = torch.export.export(model.eval(), (x,))
    assert [node.target for node in program.graph.nodes if "conv2d" in str(node.target)]


def test_mask_hides_pixels():
    """What is hidden cannot be seen: pixels under the mask don't change the prediction."""
    model = build("masked_image", small())
    x, mask = images(model.config), mask_for(model.config)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        first = model(x, mask).reconstruction
        assert_close(model(torch.where(hidden, x + 9, x), mask).reconstruction, first, 0)
        assert (model(x + 9, mask).reconstruction - first).abs().max() > 0.1
        assert model(x).loss is None


# -------------------------------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize("size", [(20, 20), (24, 8), (9, 31)])
@pytest.mark.parametrize("changes", RECTANGLES)
def test_positions_are_resized_as_pytorch_interpolates(changes, size):
    config = small(**changes)
    model = build("backbone", config)
    prefix, grid = model.position.detach().tensor_split([config.num_prefix_positions], 1)
    grid = F.interpolate(grid.unflatten(1, config.grid).permute(0, 3, 1, 2), config.grid_of(*size), mode="bicubic")
    resized = DeiTModel(config.replace(image_size=size))
    resized.load_state_dict({**model.state_dict(), "position": torch.cat([prefix, grid.flatten(2).mT], 1)})
    x = images(config, size=size)
    with torch.no_grad():
        expected = resized.eval()(x).to_tuple()
        assert_close(model(x, interpolate_pos_encoding=True).to_tuple(), expected)
        assert model.resize_to(size) is model
        assert_close(model(x).to_tuple(), expected)
    assert model.config == config.replace(image_size=size)
    assert model.position.requires_grad


@KINDS
def test_resized_after_reading(kind, tmp_path):
    model = build(kind, small())
    model.save_pretrained(tmp_path)
    given = given_for(kind, model.config, (8, 24))
    resized = CLASS_OF[kind].from_pretrained(tmp_path, image_size=(8, 24))
    with torch.no_grad():
        assert_close(resized(**given).to_tuple(), model(**given, interpolate_pos_encoding=True).to_tuple())
    resized.save_pretrained(tmp_path)
    again = CLASS_OF[kind].from_pretrained(tmp_path)
    assert again.config.image_size == (8, 24)
    assert_close(again.state_dict(), resized.state_dict(), 0)


def test_resized_model_trains():
    model = build("with_teacher", small()).resize_to(20).train()
    assert set(gradients(model, pixel_values=images(model.config))) == {name for name, _ in model.named_parameters()}
    assert model.deit.position.shape == (1, 27, 24)


# ---------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("spread", [0.02, 0.1])
@KINDS
def test_initial_values(kind, spread):
    """Every tensor of the manifest: a spread within five standard errors of what the original code draws."""
    config = small(hidden_size=96, image_size=32, initializer_range=spread, layer_scale_init_value=1e-4, num_labels=50)
    options = {"use_mask_token": True} if kind == "backbone" else {}
    model = CLASS_OF[kind](config, **options)
    found = model._tensors()
    bound = 1 / math.sqrt(3 * 4 * 4)
    for name in weights.manifest(config, kind, pooler=kind == "backbone", mask_token=kind == "backbone"):
        values = found[name].double().flatten()
        if "patch." in name:
            assert values.abs().max() <= bound
            expected = bound / math.sqrt(3)
        elif ".scale" in name:
            assert (values == torch.tensor(1e-4).double()).all()
            continue
        elif ".norm" in name or name.endswith("bias"):
            assert (values == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all()
            continue
        else:
            expected = spread
        error = expected / math.sqrt(len(values))
        assert values.mean().abs() < 5 * error, name
        assert (values.std() - expected).abs() < 5 * error / math.sqrt(2), name
    assert (found["deit.cls_token"] - found["deit.distillation_token"]).std() > spread


# ----------------------------------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [0.0, 0.2, 0.4]), ("constant", [0.4, 0.4, 0.4])])
def test_each_block_drops_by_its_rate_and_its_draws(schedule, rates):
    """The whole forward pass again by hand, a branch times 0 or 1 / (1 - rate) for each image."""
    config = small(drop_path_rate=0.4, drop_path_schedule=schedule, layer_scale_init_value=0.1)
    model = build("backbone", config).train()
    x = images(config, 8)
    draws = torch.rand(8, 3, 2)
    trace = {}
    found = model(x, depth_draws=draws, trace=trace).last_hidden_state
    state = trace["embeddings"]
    for i, block in enumerate(model.blocks):
        first, second = ((draws[:, i, j] >= rates[i]).float() / (1 - rates[i]) for j in range(2))
        state = state + block.scale1 * block.attention(block.norm1(state))[0] * first.view(8, 1, 1)
        state = state + block.scale2 * block.mlp(block.norm2(state)) * second.view(8, 1, 1)
    assert_close(found, model.norm(state))
    assert_close(model.eval()(x, depth_draws=draws).last_hidden_state, model(x).last_hidden_state, 0)


def test_the_factor_of_a_kept_branch_is_not_rounded_in_bfloat16():
    """1 / 0.9 is 1.1094 in bfloat16, which would make each kept branch 0.15 % too small."""
    model = build("backbone", small(num_hidden_layers=2, drop_path_rate=0.1)).train()
    block, x = model.blocks[1], torch.randn(4, 6, 24)
    model.set_attn_implementation("eager")
    keep = torch.tensor([[1 / 0.9, 0.0, 1 / 0.9, 0.0], [0.0] * 4])
    with torch.autocast("cpu", torch.bfloat16):
        branch = block.attention(block.norm1(x))[0]
        found = block(x, keep=keep)[0]
    assert branch.dtype == torch.bfloat16
    expected = x.double() + branch.double() * keep[0].double().view(-1, 1, 1)
    assert_close(found.double(), expected, 1e-6)
    assert (branch.double().abs() * (1 / 0.9 - 1.1094)).max() > 1e-4  # what rounding would cost
    model.bfloat16()
    assert block(x.bfloat16(), keep=keep)[0].dtype == torch.bfloat16


def test_depth_draws_are_made_where_none_are_given_and_checked():
    model = build("with_teacher", small(drop_path_rate=0.4)).train()
    x = images(model.config, 3)
    torch.manual_seed(7)
    own = model(x).logits
    torch.manual_seed(7)
    assert_close(model(x, depth_draws=torch.rand(3, 3, 2)).logits, own, 0)
    assert not torch.equal(model(x).logits, own)
    with raises_saying(ValueError, "depth_draws must be (3, 3, 2)", "found (3, 2, 2)"):
        model(x, depth_draws=torch.rand(3, 2, 2))


def test_drop_path_keeps_the_expectation_in_the_model():
    """One block whose branches are dropped for whole images: four outcomes, at most, for each image."""
    config = small(num_hidden_layers=1, drop_path_rate=0.5)
    model = build("backbone", config).train()
    x = images(config, 1).expand(64, -1, -1, -1)
    with torch.no_grad():
        outcomes = model(x, output_hidden_states=True).hidden_states[1]
        first = {tuple(row.tolist()) for row in outcomes.flatten(1).mul(100).round()}
        assert 2 <= len(first) <= 4
        model.eval()
        assert_close(model(x).last_hidden_state, build("backbone", small(num_hidden_layers=1))(x).last_hidden_state, 0)


def test_dropout():
    config = small(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    model, x = build("backbone", config), images(small(), 16)
    with torch.no_grad():
        plain = build("backbone", small())
        assert_close(model(x).last_hidden_state, plain(x).last_hidden_state, 0)
        trace = {}
        out = model.train()(x, output_attentions=True, trace=trace)
        clean = {}
        expected = plain(x, output_attentions=True, trace=clean)
    kept = trace["embeddings"] != 0
    assert_close(trace["embeddings"][kept], clean["embeddings"][kept] / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.1875 / kept.numel()))
    zeros = (out.attentions[0] == 0).double().mean().item()
    assert zeros == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(out.attentions[0].numel()))
    assert_close(expected.attentions[0].sum(-1), torch.ones(16, 3, 18))
    model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    first = model(x).last_hidden_state
    assert (model(x).last_hidden_state - first).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "auto"])
def test_head_mask(shape, implementation):
    """Weighing a head is weighing what the output projection reads of it."""
    config = small()
    model, x = build("backbone", config), images(config)
    mask = torch.rand(shape)
    mask[..., 0] = 0
    with torch.no_grad():
        plain = model(x, output_attentions=True).attentions[0]
        model.set_attn_implementation(implementation)
        out = model(x, head_mask=mask, output_attentions=True)
        quiet = model(x, head_mask=mask)
        for block, weights_of_heads in zip(model.blocks, mask.expand(3, 3), strict=True):
            block.attention.out.weight.mul_(weights_of_heads.repeat_interleave(config.head_width))
        expected = model(x)
    assert_close(out.last_hidden_state, expected.last_hidden_state)
    assert_close(quiet.last_hidden_state, expected.last_hidden_state)
    assert_close(out.attentions[0], plain * mask.expand(3, 3)[0].view(3, 1, 1))


@KINDS
@pytest.mark.parametrize("implementation", ["sdpa", "auto"])
def test_attentions_whatever_the_kernel(kind, implementation):
    model = build(kind, small())
    model.set_attn_implementation("eager")
    given = given_for(kind, model.config)
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        model.set_attn_implementation(implementation)
        assert_close(dict(model(**given, output_attentions=True).items()), dict(expected.items()))
        assert model(**given).attentions is None


def test_trace():
    model = build("with_teacher", small())
    trace = {}
    x = images(model.config)
    with torch.no_grad():
        out = model(x, output_hidden_states=True, trace=trace)
        tokens = model.deit.norm(out.hidden_states[-1])
    assert list(trace) == ["embeddings", "block00", "block01", "block02", "norm", "cls_logits", "distillation_logits"]
    assert_close([trace[name] for name in ("embeddings", "block00", "block01", "block02")], list(out.hidden_states), 0)
    assert_close(trace["norm"], tokens, 0)
    assert_close((trace["cls_logits"], trace["distillation_logits"]), (out.cls_logits, out.distillation_logits), 0)


@pytest.mark.parametrize(
    ("kind", "last"), [("backbone", "pooler"), ("masked_image", "reconstruction"), ("classification", "logits")]
)
def test_trace_ends_in_the_answer(kind, last):
    model = build(kind, small())
    trace = {}
    out = model(images(model.config), trace=trace)
    assert list(trace)[-1] == last
    assert_close(trace[last], out["pooler_output" if last == "pooler" else last], 0)


# --------------------------------------------------------------------------------- compilation, memory, number formats


@KINDS
def test_compiles_whole(kind):
    """No graph breaks, in evaluation and training, with masks, attentions and images of sizes seen and unseen."""
    torch._dynamo.reset()
    model = build(kind, small(num_hidden_layers=2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size, options in [
        (None, {}),
        ((8, 12), {"interpolate_pos_encoding": True}),
        ((20, 24), {"interpolate_pos_encoding": True, "output_attentions": True}),
        (None, {"head_mask": torch.tensor([1.0, 0.5, 0.0]), "output_hidden_states": True}),
    ]:
        given = {**given_for(kind, model.config, size), **options}
        with torch.no_grad():
            assert_close(dict(compiled(**given).items()), dict(model(**given).items()))
    given = given_for(kind, model.train().config)
    expected = gradients(model, **given)
    trained = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(trained(**given)).backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, {name: 2 * g for name, g in expected.items()})


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model = build("with_teacher", small())
    x = images(model.config)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x).logits, model(x).logits)


@pytest.mark.parametrize("changes", [{}, {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}])
@KINDS
def test_gradient_checkpointing(kind, changes):
    model = build(kind, small(**changes)).train()
    given = given_for(kind, model.config)
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        torch.manual_seed(5)
        found.append(gradients(model, **given))
    assert_close(found[1], found[0], 0)
    calls = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, **given)
    assert len(calls) == 2  # computed again in the backward pass


@KINDS
def test_bfloat16(kind):
    model = build(kind, small())
    given = given_for(kind, model.config)
    with torch.no_grad():
        expected = model(**given).to_tuple()
        model.bfloat16()
        found = model(**given).to_tuple()
    assert model.dtype == found[-1].dtype == torch.bfloat16
    assert_close([t.float() for t in found], list(expected), 0.15)


# ------------------------------------------------------------------------------------------------------------ surface


@KINDS
def test_tuples(kind):
    model = build(kind, small())
    given = given_for(kind, model.config)
    with torch.no_grad():
        out = model(**given)
        assert_close(model(**given, return_dict=False), out.to_tuple(), 0)
        every = build(kind, small(return_dict=False, output_hidden_states=True, output_attentions=True))(**given)
        assert_close(every, model(**given, output_hidden_states=True, output_attentions=True).to_tuple())
        assert len(every) == len(out) + 2


def test_vit():
    config = ViTConfig(
        **{
            name: getattr(small(), name)
            for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size", "num_hidden_layers")
        }
    )
    model = ViTForImageClassification(config)
    assert model.vit is model.deit is model.backbone
    assert model.num_parameters() == sum(map(math.prod, weights.manifest(config, "classification").values()))
    model.deit.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 24 * 2 + 2
    assert model.device == torch.device("cpu")


def test_vit_from_files(tmp_path):
    plain = build("classification", small(distillation_token=False))
    plain.save_pretrained(tmp_path / "plain")
    model = ViTForImageClassification.from_pretrained(tmp_path / "plain")
    assert isinstance(model.config, ViTConfig)
    x = images(plain.config)
    assert torch.equal(model(x).logits, plain(x).logits)
    build("classification", small()).save_pretrained(tmp_path / "distilled")
    with raises_saying(
        ValueError, "a model without a distillation token, found distillation_token=True; use DeiTConfig"
    ):
        ViTForImageClassification.from_pretrained(tmp_path / "distilled")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pixel_values": None}, "pixel_values are missing; pass a tensor (images, channels, height, width)"),
        (
            {"pixel_values": torch.zeros(3, 16, 16)},
            "pixel_values must be (images, 3, height, width), found (3, 16, 16)",
        ),
        (
            {"pixel_values": torch.zeros(2, 1, 16, 16)},
            "pixel_values must be (images, 3, height, width), found (2, 1, 16",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)},
            "must be normalised floats, found torch.uint8",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 16, 20)},
            "images are 16x20, this model takes 16x16; resize them, pass inter",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 3, 20), "interpolate_pos_encoding": True},
            "images of 3x20 hold no patch of 4",
        ),
        (
            {"bool_masked_pos": torch.zeros(2, 16).bool()},
            "bool_masked_pos needs a mask token; build DeiTModel(config, use",
        ),
        ({"head_mask": torch.ones(4)}, "head_mask must be (3,) or (3, 3), found (4,)"),
    ],
)
def test_refused_inputs(given, sentence):
    model = build("backbone", small())
    with raises_saying(ValueError, sentence):
        model(**{"pixel_values": images(model.config), **given})


def test_refused_mask():
    model = build("masked_image", small())
    with raises_saying(ValueError, "bool_masked_pos must be (2, 16): 4x4 patches for each of 2 images; found (2, 9)"):
        model(images(model.config), torch.zeros(2, 9).bool())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: DeiTForMaskedImageModeling(small(encoder_stride=16)),
            "encoder_stride=16 must equal patch_size=4; use",
        ),
        (
            lambda: DeiTForImageClassificationWithTeacher(small(distillation_token=False)),
            "a model with a teacher needs a distillation token, found distillation_token=False",
        ),
        (lambda: ViTModel(small()), "a ViT has no distillation token, found distillation_token=True in the config"),
        (lambda: ViTForImageClassification(small()), "a ViT has no distillation token"),
        (
            lambda: DeiTModel(small()).set_attn_implementation("flash"),
            "attn_implementation='flash' is not known; choose",
        ),
        (lambda: DeiTModel(small()).resize_to(3), "image_size=3 is smaller than patch_size=4"),
    ],
)
def test_refusals(make, sentence):
    with raises_saying(ValueError, sentence):
        make()
