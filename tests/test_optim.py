"""Groups, learning rate and the step itself, against timm and the paper."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from deit.config import VARIANTS
from deit.model import DeiTForImageClassificationWithTeacher, DeiTForMaskedImageModeling
from deit.optim import EMA, learning_rate, optimizer, parameter_groups, peak_lr
from deit.recipe import AdamW, Cosine, epochs, steps

PAPER = AdamW(lr=5e-4, per_images=512)


def small(name="deit-tiny-distilled-patch16-224", **changes):
    return VARIANTS[name].replace(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                  image_size=32, num_labels=3, **changes)


def names_in(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("decayed", [True, False])
def test_what_decays(decayed):
    """The original decays the distillation token, timm does not; neither decays what has one dimension, the
    positions or the class token."""
    model = DeiTForImageClassificationWithTeacher(small(layer_scale_init_value=0.1))
    recipe = AdamW(lr=5e-4, per_images=512, decay_distillation_token=decayed)
    first, second = parameter_groups(model, recipe)
    assert (first["weight_decay"], second["weight_decay"]) == (0.05, 0.0)
    free = names_in(model, second)
    assert {"deit.position", "deit.cls_token"} <= free
    assert ("deit.distillation_token" in free) is not decayed
    assert {name for name, p in model.named_parameters() if p.ndim == 1} <= free
    everything = names_in(model, first) | free
    assert everything == {name for name, _ in model.named_parameters()}
    assert not names_in(model, first) & free
    matrices = names_in(model, first) - {"deit.distillation_token"}
    assert all(name.endswith(".weight") for name in matrices)


def test_mask_token_is_free_and_frozen_parameters_are_left_out():
    model = DeiTForMaskedImageModeling(small())
    model.deit.patch.requires_grad_(False)
    first, second = parameter_groups(model, PAPER)
    assert "deit.mask_token" in names_in(model, second)
    assert not any("patch" in name for name in names_in(model, first) | names_in(model, second))


def test_one_step_is_adamw():
    """Decoupled decay and bias-corrected moments (Loshchilov & Hutter 2019), from zero state."""
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(small())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = optimizer(model, PAPER)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optim.step()
    free = names_in(model, optim.param_groups[1])
    for name, parameter in model.named_parameters():
        decay = 0.0 if name in free else 0.05
        expected = before[name] * (1 - 5e-4 * decay) - 5e-4 * grads[name] / (grads[name].abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_average_is_the_weighted_sum(decay):
    """After its first updates, which are a plain mean, each weight's share shrinks by `decay` per update."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = EMA(model, decay)
    history = [model[0].weight.detach().clone()]
    expected = history[0].double()
    for update in range(1, 30):
        with torch.no_grad():
            model[0].weight.normal_()
        model[1].running_mean.normal_()
        average.update(model)
        history.append(model[0].weight.detach().clone())
        share = max(1 - decay, 1 / (update + 1))
        expected = (1 - share) * expected + share * history[-1].double()
        if 1 / (update + 1) >= 1 - decay:
            torch.testing.assert_close(expected, torch.stack(history).double().mean(0))
    torch.testing.assert_close(average.model[0].weight.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_learning_rate_grows_with_the_batch():
    assert peak_lr(PAPER, 1024) == pytest.approx(1e-3)  # section 6: 0.0005 x 1024 / 512


def test_cosine_equals_timm_after_warmup():
    recipe = Cosine(total=epochs(30), warmup=epochs(5), floor=1e-5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(torch.optim.SGD([parameter], lr=1e-3), t_initial=25 * 40, lr_min=1e-5)
    for step in range(5 * 40, 30 * 40):
        assert learning_rate(recipe, 1e-3, step, 40) == pytest.approx(theirs._get_lr(step - 200)[0], rel=1e-9)


def test_warmup_reaches_the_peak_and_the_end_stays_at_the_floor():
    """Per step from the first on: the original steps by epoch and trains two epochs at the start value."""
    recipe = Cosine(total=steps(100), warmup=steps(10), floor=1e-5, start=1e-6)
    rates = [learning_rate(recipe, 1e-3, step, 20) for step in range(120)]
    assert rates[0] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 10)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[10:100] == sorted(rates[10:100], reverse=True)
    assert rates[100] == rates[119] == pytest.approx(1e-5)
    assert learning_rate(Cosine(total=steps(10)), 1e-3, 0, 20) == 1e-3
