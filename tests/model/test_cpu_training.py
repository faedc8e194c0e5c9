"""A block trained by hand on the CPU has the values of autograd's."""

import pytest
import torch
from support.checks import assert_close
from support.models import CLASS_OF, build, images, loss_of, mask_for, small

from deit.model import cpu_training
from deit.model.blocks import Attention

KINDS = pytest.mark.parametrize("kind", CLASS_OF)
CHANGES = [
    {},
    {"drop_path_rate": 0.4},
    {"layer_scale_init_value": 0.1, "drop_path_rate": 0.5},
    {"qkv_bias": False},
    {"hidden_act": "gelu_new"},
    {"hidden_act": "gelu_pytorch_tanh", "image_size": (8, 12)},
]


MERGING = [{"merge": 3}, {"merge": 2, "layer_scale_init_value": 0.1, "drop_path_rate": 0.5}]


@pytest.fixture
def calls(monkeypatch):
    """Counts the branches that are computed by hand."""
    counts = []
    for branch in (cpu_training.AttentionBranch, cpu_training.MLPBranch):
        apply = branch.apply
        monkeypatch.setattr(branch, "apply", lambda *given, apply=apply: counts.append(1) or apply(*given))
    return counts


def trained(model, implementation, *, precision=torch.float32, **given):
    """Loss, and the gradients of the pixels and of every parameter."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.implementation = implementation
    model.train().zero_grad(set_to_none=True)
    pixels = given.pop("pixel_values").clone().requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        out = model(pixels, **given)
    loss = loss_of(out)
    loss.backward()
    found = {"loss": loss.detach(), "pixels": pixels.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def given_for(kind, config, batch=5):
    given = {"pixel_values": images(config, batch), "depth_draws": torch.rand(batch, config.num_hidden_layers, 2)}
    return given | ({"bool_masked_pos": mask_for(config, batch)} if kind == "masked_image" else {})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, changes) for kind in CLASS_OF for changes in CHANGES]
    + [(kind, changes) for kind in CLASS_OF if kind != "masked_image" for changes in MERGING],
    ids=str,
)
def test_values_and_gradients_are_autograds(kind, changes, calls):
    config = small(**changes)
    model, given = build(kind, config), given_for(kind, config)
    ours = trained(model, "auto", **given)
    assert len(calls) == 2 * config.num_hidden_layers
    theirs = trained(model, "eager", **given)
    assert len(calls) == 2 * config.num_hidden_layers, "eager is autograd"
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [*CHANGES[:3], MERGING[0]], ids=str)
def test_in_bfloat16_they_are_no_farther_from_float32_than_autocasts(changes):
    """Over eight models, because the distance of a single one is noise: from 0.89 to 1.35 times that of autocast."""
    config = small(**changes)
    distances = {"auto": 0.0, "eager": 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        model, given = build("with_teacher", config, seed), given_for("with_teacher", config)
        exact = trained(model, "eager", **given)
        for implementation in distances:
            found = trained(model, implementation, precision=torch.bfloat16, **given)
            assert all(value.dtype == torch.float32 for value in found.values())
            distances[implementation] += sum(
                float((found[name].float() - value).norm() / (value.norm() + 1e-6))
                for name, value in exact.items()
                if not name.endswith("qkv.bias")  # the keys' part has no gradient but rounding errors
            )
    assert 0 < distances["auto"] <= 1.1 * distances["eager"]


@pytest.mark.parametrize("kept", [0, 1])
def test_where_all_images_or_none_are_dropped(kept):
    config = small(drop_path_rate=0.5, drop_path_schedule="constant")
    model, given = build("with_teacher", config), given_for("with_teacher", config)
    given["depth_draws"] = torch.full_like(given["depth_draws"], 0.99 * kept)
    ours, theirs = trained(model, "auto", **given), trained(model, "eager", **given)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)
    assert bool(ours["deit.blocks.0.mlp.fc1.weight"].any()) == bool(kept)


def test_dropped_images_are_not_computed(monkeypatch):
    rows = []
    norm = cpu_training._norm
    monkeypatch.setattr(cpu_training, "_norm", lambda x, *rest: rows.append(len(x)) or norm(x, *rest))
    config = small(drop_path_rate=0.5, drop_path_schedule="constant", num_hidden_layers=2)
    model, given = build("classification", config), given_for("classification", config)
    given["depth_draws"] = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).repeat(5, 1, 1)
    given["depth_draws"][0] = 0.9
    trained(model, "auto", **given)
    assert rows == [5, 1, 1, 5, 5, 1, 1, 5]  # and once more backwards


def test_frozen_parameters_get_no_gradient():
    config = small()
    model, given = build("with_teacher", config), given_for("with_teacher", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attention" in name
    ours, theirs = trained(model, "auto", **given), trained(model, "eager", **given)
    assert ours.keys() == theirs.keys() >= {"deit.blocks.0.attention.qkv.weight"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("trained_part", ["norm1", "attention.qkv", "attention.out", "norm2", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("block", [0, 2])
def test_one_trained_part_among_frozen_ones(trained_part, block):
    """Below the first trained part, nothing needs a gradient, not even a block's input."""
    config = small(drop_path_rate=0.3, layer_scale_init_value=0.5)
    model, given = build("classification", config), given_for("classification", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f"blocks.{block}.{trained_part}." in name
    x, found = given.pop("pixel_values"), {}
    for implementation in ("auto", "eager"):
        for module in model.modules():
            if isinstance(module, Attention):
                module.implementation = implementation
        model.train().zero_grad(set_to_none=True)
        loss_of(model(x, **given)).backward()
        found[implementation] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found["auto"].keys() == found["eager"].keys()
    assert len(found["auto"]) == 2
    for name, value in found["eager"].items():
        torch.testing.assert_close(found["auto"][name], value, rtol=0, atol=1e-5, msg=name)


def test_frozen_blocks_cost_no_backward_pass(monkeypatch):
    """The last two of five blocks are trained: two backward passes of each branch. The norm in front of the first one
    is trained, but its input needs no gradient."""
    passes, norms = [], []
    for branch in (cpu_training.AttentionBranch, cpu_training.MLPBranch):
        backward = branch.backward
        monkeypatch.setattr(
            branch, "backward", staticmethod(lambda *given, back=backward: passes.append(1) or back(*given))
        )
    plain = cpu_training._norm_backward
    monkeypatch.setattr(cpu_training, "_norm_backward", lambda *given: norms.append(given[-1]) or plain(*given))
    config = small(num_hidden_layers=5)
    model, given = build("classification", config), given_for("classification", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "blocks.3" in name or "blocks.4" in name or "classifier" in name
    loss_of(model.train()(**given)).backward()
    assert len(passes) == 4
    assert norms == [(True, True, True)] * 3 + [(False, True, True)]


def test_recomputed_blocks():
    config = small(drop_path_rate=0.3)
    model, given = build("with_teacher", config), given_for("with_teacher", config)
    plain = trained(model, "auto", **given)
    model.gradient_checkpointing_enable()
    for name, value in trained(model, "auto", **given).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"attention_probs_dropout_prob": 0.1}, {}),
        ({"hidden_dropout_prob": 0.1}, {}),
        ({"hidden_act": "relu"}, {}),
        ({}, {"output_attentions": True}),
        ({}, {"head_mask": torch.ones(3)}),
    ],
    ids=str,
)
def test_what_only_autograd_knows_is_left_to_it(changes, given, calls):
    config = small(**changes)
    given = given | {"pixel_values": images(config)}
    out = build("classification", config).train()(**given)
    out.logits.sum().backward()
    assert calls == []


def test_parts_that_were_replaced_or_hooked_are_called(calls):
    """As adapters and whoever looks at features do it."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    config = small()
    model = build("classification", config).train()
    seen = []
    handle = model.deit.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    before = model(images(config)).logits
    assert len(seen) == 1
    assert len(calls) == 2 * (config.num_hidden_layers - 1)
    handle.remove()
    model.deit.blocks[0].attention.out.__class__ = Doubled
    torch.nn.utils.parametrizations.weight_norm(model.deit.blocks[1].mlp.fc1)
    calls.clear()
    assert not torch.allclose(model(images(config)).logits, before, atol=1e-3)
    assert len(calls) == 2 * (config.num_hidden_layers - 2)


def test_evaluation_is_autograds(calls):
    config = small()
    build("with_teacher", config).eval()(images(config))
    assert calls == []


@KINDS
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_last_block_computes_what_is_read(kind, mode):
    """And the answer is that of a model which computes all."""
    config = small(drop_path_rate=0.3)
    model = getattr(build(kind, config), mode)()
    shapes, norm = [], model.backbone.norm
    apply = norm.forward
    norm.forward = lambda x: shapes.append(x.shape[1]) or apply(x)  # a hook would see all tokens
    given = given_for(kind, config)
    short = model(**given)
    whole = model(**given, output_hidden_states=True)
    tokens = config.num_prefix_tokens + config.num_patches
    assert shapes == [{"classification": 1, "with_teacher": 2}.get(kind, tokens), tokens]
    assert whole.hidden_states[-1].shape[1] == tokens
    for name in ("logits", "cls_logits", "distillation_logits", "reconstruction", "last_hidden_state"):
        if name in whole:
            assert_close(short[name], whole[name])
