"""`torch.func`, forward-mode derivatives, second derivatives and many gradients at once, against `transformers`."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import pair
from support.models import build, images, small
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from deit import weights

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's forward mode

NAME = "DeiTForImageClassification"
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def models(training, **changes):
    """Ours, and the class of transformers with the same weights, both in double precision."""
    ours, theirs = pair(NAME, small(num_hidden_layers=2, image_size=8, **changes))
    return ours.double().train(training), theirs.double().train(training)


def inputs(model, count=3):
    x = images(model.config, count).double()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    return x, direction, torch.arange(count)


def assert_near(found, expected, within=1e-6):
    """Equality of dictionaries of tensors, as a part of each tensor's largest value. transformers' softmax is float32,
    so its double precision is not exact."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= within * value.abs().max(), name


def scalar(model):
    return lambda x: model(x).logits.square().sum()


@MODES
def test_gradients_for_each_image(training):
    ours, theirs = models(training)
    x, _, labels = inputs(ours)

    def loss(parameters, image, label):
        logits = functional_call(ours, parameters, (image[None],)).logits
        return torch.nn.functional.cross_entropy(logits, label[None])

    found = vmap(grad(loss), (None, 0, 0))(dict(ours.named_parameters()), x, labels)
    for i in range(len(x)):
        theirs.zero_grad()
        theirs(x[i : i + 1], labels=labels[i : i + 1]).loss.backward()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        one = weights.from_ours({name: value[i] for name, value in found.items()}, "hf5")
        assert_close(one, expected)


@MODES
def test_a_mapped_model_answers_as_for_the_batch(training):
    ours, theirs = models(training)
    x, *_ = inputs(ours)
    assert_close(vmap(lambda image: ours(image[None]).logits[0])(x), theirs(x).logits)


@MODES
def test_forward_mode(training):
    ours, theirs = models(training)
    x, direction, _ = inputs(ours)
    expected = torch.autograd.functional.jvp(lambda v: theirs(v).logits, x, direction)[1]  # by two backward passes
    assert_close(jvp(lambda v: ours(v).logits, (x,), (direction,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        assert_close(forward_ad.unpack_dual(ours(dual).logits).tangent, expected)


@MODES
def test_jacobians_and_hessians(training):
    ours, theirs = models(training)
    x, *_ = inputs(ours, 1)
    expected = torch.autograd.functional.jacobian(lambda v: theirs(v).logits, x)
    for found in (
        jacrev(lambda v: ours(v).logits)(x),
        jacfwd(lambda v: ours(v).logits)(x),
        torch.autograd.functional.jacobian(lambda v: ours(v).logits, x, vectorize=True),
    ):
        assert_close(found, expected)
    found, expected = hessian(scalar(ours))(x), torch.autograd.functional.hessian(scalar(theirs), x)
    assert_near({"hessian": found}, {"hessian": expected})


def penalised(model, x, wanted):
    """Gradients of a function of gradients: those of the pixels and of all parameters take part."""
    x = x.clone().requires_grad_()
    inner = [x, *model.parameters()]
    first = torch.autograd.grad(model(x).logits.square().sum(), inner, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), wanted or [x])


@MODES
def test_second_derivatives(training):
    """A loss of gradients, as in gradient penalties. In evaluation the fused kernel has none, and PyTorch says so."""
    ours, theirs = models(training)
    if not training:
        with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention.* is not implemented"):
            penalised(ours, inputs(ours)[0], None)
        ours.set_attn_implementation("eager")
    x, direction, _ = inputs(ours)
    assert_near(*({"pixels": penalised(m, x, None)[0]} for m in (ours, theirs)))
    found = dict(zip(dict(ours.named_parameters()), penalised(ours, x, list(ours.parameters())), strict=True))
    names = dict(theirs.named_parameters())
    expected = dict(zip(names, penalised(theirs, x, list(theirs.parameters())), strict=True))
    # The keys' bias changes no softmax, so both derivatives are rounding errors.
    keys = [name for name in expected if name.endswith("k_proj.bias")]
    found = weights.from_ours(found, "hf5")
    assert all(max(some.pop(name).abs().max() for name in keys) < 1e-2 for some in (found, expected))
    assert_near(found, expected)
    assert_near(*({"product": torch.autograd.functional.vhp(scalar(m), x, direction)[1]} for m in (ours, theirs)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"drop_path_rate": 0.4}, {"layer_scale_init_value": 0.1, "drop_path_rate": 0.5}, {"qkv_bias": False}],
    ids=str,
)
def test_second_derivatives_of_every_kind_of_block(changes):
    """Against our blocks by autograd, because transformers has neither stochastic depth nor LayerScale."""
    model = build("with_teacher", small(**changes)).double().train()
    x, draws = images(model.config, 4).double(), torch.rand(4, model.config.num_hidden_layers, 2)
    found = []
    for implementation in ("auto", "eager"):
        model.set_attn_implementation(implementation)
        pixels = x.clone().requires_grad_()
        first = torch.autograd.grad(
            model(pixels, depth_draws=draws).logits.square().sum(), [pixels, *model.parameters()], create_graph=True
        )
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [pixels, *model.parameters()]))
    assert found[0][0].abs().max() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_second_derivatives_in_bfloat16_are_autocasts():
    model = build("classification", small()).train()
    x, found = images(model.config, 4), []
    for implementation in ("auto", "eager"):
        model.set_attn_implementation(implementation)
        pixels = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixels).logits.float().square().mean()
        (first,) = torch.autograd.grad(loss, pixels, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), pixels)[0])
    assert found[0].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.99


def test_many_gradients_at_once():
    ours, theirs = models(training=True)
    x, *_ = inputs(ours)
    seeds = torch.randn(4, 3, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(8))
    batched = torch.autograd.grad(ours(x).logits, list(ours.parameters()), seeds, is_grads_batched=True)
    found = dict(zip(dict(ours.named_parameters()), batched, strict=True))
    for i, seed in enumerate(seeds):
        theirs.zero_grad()
        theirs(x).logits.backward(seed)
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        assert_close(weights.from_ours({name: g[i] for name, g in found.items()}, "hf5"), expected)
