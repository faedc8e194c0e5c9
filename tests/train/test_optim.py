"""Groups, the optimizers' steps and state, clipping, learning rate, and the average of the weights."""

import math
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.models import build, images, loss_of, small

from deit.config import ConvNetConfig
from deit.model.convnet import ConvNet
from deit.recipe import LAMB, SGD, AdamW, Cosine, Muon, steps
from deit.train import optim
from deit.train.optim import EMA, clip_gradients, learning_rate, parameter_groups, peak_lr

PAPER = AdamW(lr=5e-4, per_images=512)
RECIPES = [
    AdamW(lr=1e-3, per_images=512, weight_decay=0.1, layer_decay=0.75, betas=(0.8, 0.95), eps=1e-6),
    SGD(lr=1e-2, per_images=512, weight_decay=0.1, layer_decay=0.75),
    LAMB(lr=5e-3, per_images=512, weight_decay=0.1, layer_decay=0.75),
    Muon(lr=1e-3, others_lr=4e-4, per_images=512, weight_decay=0.1, layer_decay=0.75, betas=(0.8, 0.95)),
]
every_optimizer = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)


def model(seed=0, **changes):
    return build("with_teacher", small(layer_scale_init_value=0.1, **changes), seed)


def names_in(model, group):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def per_name(model, recipe, what):
    return {name: group[what] for group in parameter_groups(model, recipe) for name in names_in(model, group)}


def give_gradients(models, seed):
    """The same random gradients to models with the same parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.clone()


def train(net, optimizers, first, last, average=None):
    """Steps `first` to `last`, which depend on nothing but their number."""
    for step in range(first, last):
        loss_of(net(images(net.config, 2, seed=step))).backward()
        clip_gradients(net.parameters(), 1.0)
        optimizers.set_lr(1e-2 / (step + 1))
        optimizers.step()
        optimizers.zero_grad()
        if average:
            average.update()


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def copied(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("decayed", [True, False])
def test_what_decays(decayed):
    """The original decays the distillation token, timm does not; neither decays what has one dimension, the
    positions or the class token."""
    net = model()
    decays = per_name(net, AdamW(lr=5e-4, per_images=512, decay_distillation_token=decayed), "weight_decay")
    assert decays.keys() == {name for name, _ in net.named_parameters()}
    free = {name for name, p in net.named_parameters() if p.ndim == 1} | {"deit.position", "deit.cls_token"}
    free |= set() if decayed else {"deit.distillation_token"}
    assert decays == {name: 0.0 if name in free else 0.05 for name in decays}
    assert {"deit.blocks.0.scale1", "deit.norm.weight", "deit.patch.bias"} <= free


def test_mask_token_is_free_and_frozen_parameters_are_left_out():
    net = build("masked_image", small())
    net.deit.patch.requires_grad_(False)
    decays = per_name(net, PAPER, "weight_decay")
    assert decays["deit.mask_token"] == 0.0
    assert decays.keys() == {name for name, _ in net.named_parameters() if ".patch." not in name}
    assert not any("patch" in name for name in optim.build(net, PAPER).state())


@pytest.mark.parametrize("kind", ["backbone", "masked_image", "with_teacher"])
def test_layer_decay(kind):
    """Three blocks: the patches and tokens are four powers below the head, each block one power below the next; a
    frozen block counts."""
    net = build(kind, small())
    net.backbone.blocks[2].requires_grad_(False)
    scales = per_name(net, AdamW(lr=1e-3, per_images=512, layer_decay=0.5), "lr_scale")
    expected = {
        "blocks.0": 1 / 8,
        "blocks.1": 1 / 4,
        "position": 1 / 16,
        "patch": 1 / 16,
        "cls_token": 1 / 16,
        "distillation_token": 1 / 16,
        "mask_token": 1 / 16,
        "norm": 1.0,
        "pooler": 1.0,
        "decoder": 1.0,
        "cls_classifier": 1.0,
        "distillation_classifier": 1.0,
    }
    found = {}
    for name, scale in scales.items():
        parts = name.removeprefix("deit.").split(".")
        part = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        assert found.setdefault(part, scale) == scale, name
    assert found == {part: expected[part] for part in found}
    assert len(found) == {"backbone": 8, "masked_image": 9, "with_teacher": 9}[kind]
    assert set(per_name(net, PAPER, "lr_scale").values()) == {1.0}


def test_what_a_model_has_nothing_for_is_refused():
    convnet = ConvNet(ConvNetConfig(widths=(4,)))
    with raises_saying(ValueError, "layer_decay=0.5", "ConvNet", "set optim.layer_decay=1"):
        optim.build(convnet, AdamW(lr=1e-3, per_images=512, layer_decay=0.5))
    with raises_saying(ValueError, "Muon", "ConvNet", "choose AdamW"):
        optim.build(convnet, Muon(lr=1e-3, others_lr=1e-3, per_images=512))
    with raises_saying(ValueError, "every parameter of ConvNet is frozen", "requires_grad"):
        optim.build(convnet.requires_grad_(False), PAPER)


# --------------------------------------------------------------------------------------------------------- optimizers


def references(net, recipe, rate):
    """torch's own optimizers with a group for each parameter, put together by hand."""
    depth = {name: 4 for name, _ in net.named_parameters()}
    depth |= {name: 1 + int(name.split(".")[2]) for name in depth if ".blocks." in name}
    depth |= {name: 0 for name in depth if name.startswith(("deit.patch", "deit.pos")) or name.endswith("_token")}
    matrices = [
        f"deit.blocks.{i}.{part}.weight"
        for i in range(3)
        for part in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
    ]

    def groups(names, lr):
        return [
            {
                "params": [net.get_parameter(name)],
                "lr": lr * 0.75 ** (4 - depth[name]),
                "weight_decay": 0.0
                if net.get_parameter(name).ndim == 1 or name in ("deit.position", "deit.cls_token")
                else 0.1,
            }
            for name in names
        ]

    if isinstance(recipe, SGD):
        return [torch.optim.SGD(groups(depth, rate), momentum=0.9, nesterov=True, foreach=False)]
    if isinstance(recipe, AdamW):
        return [torch.optim.AdamW(groups(depth, rate), betas=(0.8, 0.95), eps=1e-6, foreach=False)]
    others = [name for name in depth if name not in matrices]
    return [
        MuonByHand(groups(matrices, rate)),
        torch.optim.AdamW(groups(others, rate * 4e-4 / 1e-3), betas=(0.8, 0.95), foreach=False),
    ]


class MuonByHand(torch.optim.Optimizer):
    """One matrix at a time, in float64, by the formulas of Jordan et al. 2024 and Liu et al. 2025."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            [parameter] = group["params"]
            gradient = parameter.grad.double()
            state = self.state[parameter]
            state["mean"] = 0.95 * state.get("mean", torch.zeros_like(gradient)) + 0.05 * gradient
            found = 0.05 * gradient + 0.95 * state["mean"]
            found /= found.norm()
            if wide := found.shape[0] <= found.shape[1]:
                found = found.T
            for _ in range(5):
                found = (
                    3.4445 * found
                    - 4.7750 * found @ found.T @ found
                    + 2.0315 * found @ (found.T @ found) @ (found.T @ found)
                )
            found = 0.2 * max(found.shape) ** 0.5 * (found.T if wide else found)
            parameter *= 1 - group["lr"] * group["weight_decay"]
            parameter -= group["lr"] * found.float()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it since 2.9")
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 0.03)])
def test_muon_is_pytorchs_apart_from_bfloat16(precision, tolerance, monkeypatch):
    monkeypatch.setattr(optim, "resolve_precision", lambda *_: precision)
    ours, theirs = model(), model()
    recipe = Muon(lr=1e-3, others_lr=4e-4, per_images=512, weight_decay=0.1)
    mine = optim.build(ours, recipe)
    blocks = [p for name, p in theirs.named_parameters() if "blocks" in name and p.ndim == 2]
    reference = torch.optim.Muon(blocks, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients([ours, theirs], step)
        mine.step()
        reference.step()
    start = dict(model().named_parameters())
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if "blocks" in name and one.ndim == 2:
            assert (one - other).norm() <= tolerance * (other - start[name]).norm(), name


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (7, 7)])
def test_singular_values_become_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ optim._orthogonal(matrices) @ right.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() <= values.max() < 1.25
    assert_close(found, torch.diag_embed(values), atol=1e-9)


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if not isinstance(recipe, LAMB)], ids=lambda recipe: type(recipe).__name__
)
def test_steps_equal_torch(recipe, monkeypatch):
    """With layer decay, weight decay and a rate that changes. Muon's reference is written here."""
    monkeypatch.setattr(optim, "resolve_precision", lambda *_: torch.float32)
    ours, theirs = model(), model()
    optimizers, expected = optim.build(ours, recipe), references(theirs, recipe, 3e-3)
    for step in range(10):
        give_gradients([ours, theirs], step)
        optimizers.set_lr(3e-3 * 0.9**step)
        optimizers.step()
        for reference in expected:
            reference.step()
            for group in reference.param_groups:
                group["lr"] *= 0.9
    start = dict(model().named_parameters())
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved, rounding = (other - start[name]).norm(), 3e-7 * other.norm()
        assert moved > 100 * rounding, name
        assert (one - other).norm() <= 1e-5 * moved + rounding, name


def test_lamb_scales_each_tensor_to_its_weights():
    """One step from zero moments, by the formula (You et al. 2020, algorithm 2); timm is compared in `parity`."""
    net = model()
    before = {name: p.detach().clone().double() for name, p in net.named_parameters()}
    optimizers = optim.build(net, LAMB(lr=4e-3, per_images=2048))
    give_gradients([net], 0)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))
    assert norm > 1
    optimizers.step()
    for name, parameter in net.named_parameters():
        gradient = parameter.grad.double() / norm
        change = gradient / (gradient.abs() + 1e-6)
        if parameter.ndim > 1 and name not in ("deit.position", "deit.cls_token"):
            change += 0.05 * before[name]
            change *= before[name].norm() / change.norm()
        assert_close(parameter.detach().double(), before[name] - 4e-3 * change, atol=1e-6)


def test_rate_before_the_schedule_gives_one():
    optimizers = optim.build(model(), RECIPES[3])
    rates = sorted({round(group["lr"], 12) for one in optimizers.optimizers for group in one.param_groups})
    assert rates == sorted(
        {round(rate * 0.75**power, 12) for rate, powers in ((1e-3, (1, 2, 3)), (4e-4, range(5))) for power in powers}
    )


@pytest.mark.parametrize(
    "recipe",
    [
        AdamW(lr=3e-3, per_images=512),
        SGD(lr=0.03, per_images=512),
        LAMB(lr=2e-2, per_images=512),
        SGD(lr=0.3, per_images=512, momentum=0.0),
        Muon(lr=3e-3, others_lr=3e-3, per_images=512),
    ],
    ids=lambda r: type(r).__name__,
)
def test_five_steps_lower_the_loss(recipe):
    net = model().train()
    optimizers = optim.build(net, recipe)
    pixels, labels = images(net.config, 8), torch.arange(8) % 5
    losses = []
    for _ in range(6):
        out = net(pixels)
        loss = sum(
            torch.nn.functional.cross_entropy(logits, labels) for logits in (out.cls_logits, out.distillation_logits)
        )
        losses.append(loss.item())
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


# -------------------------------------------------------------------------------------------------------------- state


@every_optimizer
@pytest.mark.parametrize("stop", [0, 3])
def test_going_on_is_bit_identical(recipe, stop):
    straight, stopped, other = model(), model(), model(seed=7)
    optimizers = optim.build(straight, recipe)
    train(straight, optimizers, 0, 6)
    first = optim.build(stopped, recipe)
    train(stopped, first, 0, stop)
    state = copied(first.state())
    assert ("deit.position.step" in state) is isinstance(recipe, AdamW | LAMB | Muon)
    other.load_state_dict(stopped.state_dict())
    second = optim.build(other, recipe)
    second.load_state(state)
    train(other, second, stop, 6)
    same_bits(dict(other.named_parameters()), dict(straight.named_parameters()))
    same_bits(second.state(), optimizers.state())


@every_optimizer
def test_state_is_by_name_whatever_the_groups(recipe):
    """A state that was taken with other groups lands in the same parameters."""
    one, other = model(), model(seed=1)
    taken = optim.build(one, recipe)
    train(one, taken, 0, 2)
    single = type(recipe)(lr=1e-3, per_images=512, **({"others_lr": 1e-3} if isinstance(recipe, Muon) else {}))
    given = optim.build(other, single)
    assert len(given.optimizers[-1].param_groups) == 2
    given.load_state(taken.state())
    same_bits(given.state(), taken.state())
    kept = copied(given.state())
    train(one, taken, 2, 3)
    same_bits(given.state(), kept)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    optimizers = optim.build(model(), PAPER)
    before = copied(optimizers.state())
    state = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in state.items() if name != "deit.norm.bias.exp_avg"}
    with raises_saying(ValueError, "lacks deit.norm.bias.exp_avg;", "recipe that it was saved from"):
        optimizers.load_state(missing)
    with raises_saying(ValueError, "lacks", "(and", "more)"):
        optimizers.load_state({})
    with raises_saying(ValueError, "knows no deit.norm.bias.momentum_buffer;"):
        optimizers.load_state(state | {"deit.norm.bias.momentum_buffer": torch.ones(24)})
    with raises_saying(ValueError, "deit.norm.bias.exp_avg", "(25,)", "(24,)"):
        optimizers.load_state(state | {"deit.norm.bias.exp_avg": torch.ones(25)})
    same_bits(optimizers.state(), before)


# ----------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("limit", [None, 1.0, 1e6])
def test_clipping_equals_torch(limit):
    ours, theirs = model(), model()
    give_gradients([ours, theirs], 0)
    ours.deit.position.grad = theirs.deit.position.grad = None
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf if limit is None else limit)
    found = clip_gradients(ours.parameters(), limit)
    assert found.shape == ()
    assert_close(found, expected, atol=1e-4)
    assert float(found) > 10
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            assert_close(one.grad, other.grad, atol=1e-7)
    if limit == 1.0:
        assert float(clip_gradients(ours.parameters(), None)) == pytest.approx(1.0, rel=1e-4)


def test_norm_of_what_is_not_finite_and_of_nothing():
    net = model()
    assert clip_gradients(net.parameters(), 1.0) == 0.0
    give_gradients([net], 0)
    net.deit.norm.bias.grad[3] = math.inf
    assert clip_gradients(net.parameters(), None) == math.inf
    net.deit.norm.bias.grad[3] = math.nan
    assert clip_gradients(net.parameters(), None).isnan()


# ------------------------------------------------------------------------------------------------------ learning rate


def test_learning_rate_grows_with_the_batch():
    assert peak_lr(PAPER, 1024) == pytest.approx(1e-3)  # section 6: 0.0005 x 1024 / 512


def test_warmup_rises_by_update_and_the_end_stays_at_the_floor():
    """From the first epoch (20 steps) on: the original goes by epoch and trains the first two at the start value."""
    recipe = Cosine(total=steps(400), floor=1e-5, start=1e-6)
    rates = [learning_rate(recipe, 1e-3, step, 400, 100) for step in range(420)]
    rise = (1e-3 - 1e-6) / 100
    assert rates[:101] == pytest.approx([1e-6 + rise * step for step in range(101)], rel=1e-9)
    assert all(later > earlier for earlier, later in pairwise(rates[:21]))
    assert max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[250] == pytest.approx((1e-3 + 1e-5) / 2)
    assert all(later < earlier for earlier, later in pairwise(rates[100:401]))
    assert rates[400] == rates[419] == pytest.approx(1e-5)
    assert learning_rate(recipe, 1e-3, 0, 10) == 1e-3


# ----------------------------------------------------------------------------------------------- average of the weights


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_average_is_the_weighted_sum(decay):
    """After its first steps, which are a plain mean, each weight's share shrinks by `decay` per step."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = EMA(net, decay)
    history = [net[0].weight.detach().clone()]
    expected = history[0].double()
    for step in range(1, 30):
        with torch.no_grad():
            net[0].weight.normal_()
        average.update()
        history.append(net[0].weight.detach().clone())
        share = max(1 - decay, 1 / (step + 1))
        expected = (1 - share) * expected + share * history[-1].double()
        if 1 / (step + 1) >= 1 - decay:
            torch.testing.assert_close(expected, torch.stack(history).double().mean(0))
    state = average.state()
    assert state.pop("updates") == 29
    assert state.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert_close(state["0.weight"].double(), expected, atol=1e-6)


class Stopped(Exception):
    """Ends an evaluation early."""


def test_the_model_itself_is_averaged_and_then_as_it_was():
    """The same parameters, in place, also where an evaluation fails; buffers are the model's own."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = EMA(net, 0.9)
    with torch.no_grad():
        net[0].weight.normal_()
    net[1].running_mean.normal_()
    average.update()
    own, buffers, places = copied(net.state_dict()), copied(dict(net.named_buffers())), list(net.parameters())
    expected = average.state()
    with suppress(Stopped), average.averaged():
        within = dict(net.named_parameters())
        same_bits(within, {name: expected[name] for name in within})
        assert not torch.equal(within["0.weight"], own["0.weight"])
        same_bits(dict(net.named_buffers()), buffers)
        same_bits(average.state(), expected)
        raise Stopped
    same_bits(net.state_dict(), own)
    assert all(one is other for one, other in zip(net.parameters(), places, strict=True))
    same_bits(average.state(), expected)


def test_average_goes_on_bit_identically():
    straight, stopped, other = model(), model(), model(seed=7)
    average, first = EMA(straight, 0.8), EMA(stopped, 0.8)
    train(straight, optim.build(straight, PAPER), 0, 6, average)
    optimizers = optim.build(stopped, PAPER)
    train(stopped, optimizers, 0, 2, first)
    second = EMA(other, 0.8)
    second.load_state(copied(first.state()))
    other.load_state_dict(stopped.state_dict())
    going_on = optim.build(other, PAPER)
    going_on.load_state(copied(optimizers.state()))
    train(other, going_on, 2, 6, second)
    same_bits(second.state(), average.state())
    with raises_saying(ValueError, "the average of the weights lacks deit.position;"):
        second.load_state({name: value for name, value in first.state().items() if name != "deit.position"})


# ----------------------------------------------------------------------------------------------------------- sharding

SHARDED = """
import sys
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path[:0] = {tests!r}
from test_optim import EMA, RECIPES, Muon, clip_gradients, copied, images, loss_of, model, optim, same_bits

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://{meeting}", rank=rank, world_size=2,
                               timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (2,))


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        difference, size = ((found[name] - expected[name]).double().norm(), expected[name].double().norm())
        assert difference <= tolerance * size + 1e-7, (name, difference, size)


def update(net, optimizers, average, step, parts):
    for part in parts:
        (loss_of(net(part)) / len(parts)).backward()
    norm = clip_gradients(net.parameters(), 0.01)
    optimizers.step()
    optimizers.zero_grad()
    average.update()
    return float(norm)


for recipe in RECIPES:
    plain, net = model(), model()
    for block in net.deit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    sides = [(each, optim.build(each, recipe), EMA(each, 0.9)) for each in (plain, net)]
    (_, whole, whole_average), (_, sharded, sharded_average) = sides
    # Muon computes in bfloat16, and sharded in another order.
    tolerance = 2e-2 if isinstance(recipe, Muon) else 1e-4
    pixels = images(plain.config, 4)
    for step in range(2):
        one = update(*sides[0], step, [pixels[:2], pixels[2:]])
        other = update(*sides[1], step, [pixels[2 * rank:2 * rank + 2]])
        assert one > 0.01 and abs(one - other) < 1e-3 * one, (one, other)
        if step == 0:  # goes on where the sharded one is
            plain.load_state_dict({{name: value.full_tensor() for name, value in net.state_dict().items()}})
            whole.load_state(sharded.state())
            whole_average.load_state(sharded_average.state())
    close(sharded.state(), whole.state(), tolerance)
    close(sharded_average.state(), whole_average.state(), tolerance)
    own = {{name: value.full_tensor() for name, value in net.state_dict().items()}}
    with torch.no_grad():
        outputs = [[each(pixels).logits, None, None] for each in (plain, net)]
        for (each, _, average), found in zip(sides, outputs):
            with average.averaged():
                found[1] = each(pixels).logits
            found[2] = each(pixels).logits
    for one, other in zip(*outputs):
        assert (one - other).norm() < tolerance * one.norm(), (one, other)
    assert torch.equal(outputs[1][0], outputs[1][2]) and not torch.equal(outputs[1][0], outputs[1][1])
    for module in (net, *net.deit.blocks):
        module.reshard()
    same_bits({{name: value.full_tensor() for name, value in net.state_dict().items()}}, own)
    sharded.load_state(copied(whole.state()))
    same_bits(sharded.state(), whole.state())
    sharded_average.load_state(whole_average.state())
    same_bits(sharded_average.state(), whole_average.state())
distributed.destroy_process_group()
print("all agree")
"""


def test_sharded_over_two_processes(tmp_path, request):
    """FSDP2 against one process on the same images: norms, steps, state in both directions, and the average."""
    code = SHARDED.format(tests=[str(request.path.parent), str(request.path.parents[1])], meeting=tmp_path / "meeting")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "all agree"), errors
