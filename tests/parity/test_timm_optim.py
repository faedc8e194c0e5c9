"""Layer decay, LAMB and the learning rate against `timm`, by value."""

import copy

import pytest
import torch
from support.models import build, small

from deit import weights
from deit.config import TimmConfig
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import LAMB, AdamW, Cosine, steps
from deit.train.optim import build as build_optimizers
from deit.train.optim import learning_rate, parameter_groups

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.scheduler")


def as_timm_names(model, values):
    """One number for each of our parameters, under timm's names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(values[name])
    return {name: set(tensor.unique().tolist()) for name, tensor in weights.from_ours(model._tensors(), "timm").items()}


def per_name(model, groups, what):
    """A group's value for each of its parameters; float32, as the tensors that carry it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: float(torch.tensor(group[what])) for group in groups for p in group["params"]}


@pytest.mark.parametrize("decay", [0.7, 1.0])
@pytest.mark.parametrize(
    "architecture",
    ["test_resnet", "test_efficientnet", "test_vit", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"],
)
def test_layer_decay_and_weight_decay_of_models_of_timm(architecture, decay):
    """Groups are timm's own, and so is what it exempts from weight decay: positions, or Swin's relative ones."""
    model = TimmClassifier(TimmConfig(architecture=architecture))
    free = model.model.no_weight_decay() if hasattr(model.model, "no_weight_decay") else ()
    groups = timm.optim.param_groups_layer_decay(model.model, 0.05, free, layer_decay=decay)
    found = parameter_groups(model, AdamW(lr=1e-3, per_images=1024, layer_decay=decay))
    for what in ("lr_scale", "weight_decay"):
        expected = {f"model.{name}": value for name, value in per_name(model.model, groups, what).items()}
        assert per_name(model, found, what) == pytest.approx(expected, rel=1e-6)
    assert len({group["lr_scale"] for group in found}) > 3 or decay == 1.0


@pytest.mark.parametrize("distilled", [True, False])
def test_layer_decay_and_weight_decay_of_every_parameter(distilled):
    """But for the final norm, which timm counts to the last block, and BEiT's code, where the method comes from for
    images, to the head."""
    config = small(distillation_token=distilled)
    ours = build("with_teacher" if distilled else "classification", config)
    theirs = timm.create_model(
        f"deit_tiny_{'distilled_' * distilled}patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=5,
    )
    groups = timm.optim.param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.7)
    recipe = AdamW(lr=1e-3, per_images=1024, layer_decay=0.7, decay_distillation_token=False)
    found = parameter_groups(ours, recipe)
    for what in ("lr_scale", "weight_decay"):
        expected = per_name(theirs, groups, what)
        values = as_timm_names(ours, per_name(ours, found, what))
        assert values.keys() == expected.keys()
        if what == "lr_scale":
            for name in ("norm.weight", "norm.bias"):
                assert (values.pop(name), expected.pop(name)) == ({1.0}, pytest.approx(0.7))
        assert {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()} == {
            name: value for name, (value,) in values.items()
        }


class Shapes(torch.nn.Module):
    """Tensors of every shape that a model has, zeros among them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(24,), (1, 1, 24), (72, 24), (24, 72), (24, 3, 4, 4), (1,), ()]
        self.weights = torch.nn.ParameterList(torch.randn(size, generator=generator).double() for size in sizes)
        self.zero = torch.nn.Parameter(torch.zeros(5, 24).double())


@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["below the largest norm", "above"])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_lamb_follows_timm(decay, size):
    """Forty steps: norms of gradients below and above 1, a tensor whose gradient is zero, weights that start at
    zero, and a rate that changes."""
    ours = Shapes()
    theirs = copy.deepcopy(ours)
    recipe = LAMB(lr=3e-3, per_images=2048, weight_decay=decay, betas=(0.8, 0.95))
    optimizers = build_optimizers(ours, recipe)
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    reference = timm.optim.Lamb(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.8, 0.95),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(40):
        for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator).double() * size * (name != "weights.2")
            other.grad = one.grad.clone()
        optimizers.set_lr(3e-3 / (step + 1))
        for group in reference.param_groups:
            group["lr"] = 3e-3 / (step + 1)
        optimizers.step()
        reference.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # the division by the norm leaves them alone
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert (decay == 0) is torch.equal(ours.weights[2], Shapes().weights[2])


def test_lamb_follows_timm_in_single_precision():
    ours = build("with_teacher", small())
    theirs = copy.deepcopy(ours)
    optimizers = build_optimizers(ours, LAMB(lr=4e-3, per_images=2048))
    reference = timm.optim.Lamb(parameter_groups(theirs, LAMB(lr=4e-3, per_images=2048)), lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizers.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(("total", "warmup"), [(60, 0), (60, 10), (1000, 37), (12, 11)])
def test_learning_rate_of_every_update(total, warmup):
    recipe = Cosine(total=steps(total), floor=1e-5, start=1e-6)
    theirs = timm.scheduler.CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3),
        t_initial=total - warmup,
        lr_min=1e-5,
        warmup_t=warmup,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    group = theirs.optimizer.param_groups[0]
    for step in range(total + 20):
        theirs.step_update(step)
        assert learning_rate(recipe, 1e-3, step, total, warmup) == pytest.approx(group["lr"], rel=1e-9)
