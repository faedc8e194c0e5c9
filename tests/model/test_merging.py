"""Merging of tokens against a slow second implementation of the paper's formulas (Bolya et al. 2023, section 3)."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_close, raises_saying
from support.models import build, images, loss_of, small

from deit.model import merging
from deit.recipe import Recipe, override
from deit.recipes.digits import digits
from deit.recipes.masked import simmim
from deit.train import compiling

SHAPES = [
    ("backbone", {"merge": 3, "image_size": (12, 20)}),
    ("classification", {"merge": 2, "image_size": (12, 20), "distillation_token": False}),
    ("with_teacher", {"merge": 4, "image_size": 24}),
    (
        "classification",
        {"merge": 100, "image_size": 24, "layer_scale_init_value": 0.1, "position_on_class_token": False},
    ),
]
KINDS = pytest.mark.parametrize(("kind", "changes"), SHAPES, ids=str)


# -------------------------------------------------------------------------------------------- the paper, token by token


def paired(keys, prefix, wanted):
    """Which tokens are merged into which, by lists of places among the tokens: pairs of (source, destination)."""
    units = [key / key.norm() for key in keys]
    sources = list(range(prefix, len(units), 2))
    destinations = list(range(prefix + 1, len(units), 2))
    edges = []
    for source in sources:
        alike = [float(units[source] @ units[destination]) for destination in destinations]
        best = max(alike) if alike else -2.0
        edges.append((best, source, destinations[alike.index(best)] if alike else None))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    count = min(wanted, (len(units) - prefix) // 2)
    return [(source, destination) for _, source, destination in edges[:count]]


def merged_by_hand(tokens, pairs, prefix):
    """`tokens` is a list of (vector, patches). A merged token is the mean of its patches' vectors."""
    gone = {source for source, _ in pairs}
    found = {}
    for place in range(len(tokens)):
        vector, patches = tokens[place]
        weight = max(1, len(patches))
        total, size, members = vector * weight, weight, list(patches)
        for source, destination in pairs:
            if destination == place:
                other, theirs = tokens[source]
                total, size, members = total + other * len(theirs), size + len(theirs), members + theirs
        found[place] = (total / size, members)
    order = [*range(prefix)]
    order += [place for place in range(prefix, len(tokens), 2) if place not in gone]
    order += list(range(prefix + 1, len(tokens), 2))
    return [found[place] for place in order]


def block_by_hand(block, tokens, prefix, heads, wanted):
    """One block on one image: attention in proportion to the sizes, merging, MLP."""
    x = torch.stack([vector for vector, _ in tokens])
    qkv = block.attention.qkv(F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps))
    width = x.shape[-1] // heads
    gathered, weights, keys = [], [], torch.zeros(len(x), width, dtype=x.dtype)
    for head in range(heads):
        q, k, v = (qkv[:, part * x.shape[-1] + head * width :][:, :width] for part in range(3))
        rows = []
        for i in range(len(x)):
            scores = [
                float(q[i] @ k[j]) / math.sqrt(width) + math.log(max(1, len(tokens[j][1]))) for j in range(len(x))
            ]
            powers = torch.tensor([math.exp(score - max(scores)) for score in scores], dtype=x.dtype)
            rows.append(powers / powers.sum())
        weights.append(torch.stack(rows))
        gathered.append(weights[-1] @ v)
        keys = keys + k / heads
    y = block.attention.out(torch.cat(gathered, -1))
    x = x + (y if block.scale1 is None else y * block.scale1)
    tokens = [(x[i], patches) for i, (_, patches) in enumerate(tokens)]
    tokens = merged_by_hand(tokens, paired(keys, prefix, wanted), prefix)
    x = torch.stack([vector for vector, _ in tokens])
    y = block.mlp(F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps))
    x = x + (y if block.scale2 is None else y * block.scale2)
    return [(x[i], patches) for i, (_, patches) in enumerate(tokens)], torch.stack(weights)


@torch.no_grad()
def model_by_hand(model, pixels):
    """For each image, the tokens before the first and after each block, and each block's attention."""
    model, config = model.double(), model.config
    backbone, prefix = model.backbone, config.num_prefix_tokens
    found = []
    for image in backbone._embed(pixels.double(), None, False):
        tokens = [(vector, [] if i < prefix else [i - prefix]) for i, vector in enumerate(image)]
        states, attentions = [tokens], []
        for block in backbone.blocks:
            tokens, attention = block_by_hand(block, tokens, prefix, config.num_attention_heads, config.merge)
            states.append(tokens)
            attentions.append(attention)
        found.append((states, attentions))
    return found


@KINDS
def test_a_model_as_the_paper_writes_it(kind, changes):
    model = build(kind, small(**changes))
    x = images(model.config, 3)
    with torch.no_grad():
        out = model(x, output_hidden_states=True, output_attentions=True)
    by_hand = model_by_hand(build(kind, small(**changes)), x)
    for i, (states, attentions) in enumerate(by_hand):
        for level, tokens in enumerate(states):
            assert out.hidden_states[level].shape[1] == len(tokens)
            assert_close(out.hidden_states[level][i].double(), torch.stack([vector for vector, _ in tokens]))
            holds = {patch: place for place, (_, patches) in enumerate(tokens) for patch in patches}
            assert out.token_of_patch[level][i].tolist() == [holds[patch] for patch in sorted(holds)]
            assert sorted(holds) == list(range(model.config.num_patches))
        for level, attention in enumerate(attentions):
            assert_close(out.attentions[level][i].double(), attention)
    assert out.hidden_states[-1].shape[1] < out.hidden_states[1].shape[1] < out.hidden_states[0].shape[1]


@KINDS
@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
def test_every_way_of_computing_gives_the_same(kind, changes, implementation):
    """With and without attentions, in evaluation and in training, with the last block cut short and without."""
    model, plain = build(kind, small(**changes)), build(kind, small(**{**changes, "merge": 0}))
    model.set_attn_implementation(implementation)
    x = images(model.config, 3)
    with torch.no_grad():
        whole = model(x, output_attentions=True)
        expected = whole.to_tuple()[0]
        assert_close(model(x).to_tuple()[0], expected)
        assert_close(model.train()(x).to_tuple()[0], expected)
        assert (plain(x).to_tuple()[0][:, :1] - expected[:, :1]).abs().max() > 1e-3
    assert_close(model(x).to_tuple()[0], expected)  # by hand, in part


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(model, x, draws):
    model.train().zero_grad()
    pixels = x.clone().requires_grad_()
    loss_of(model(pixels, depth_draws=draws)).backward()
    return {"pixels": pixels.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def plainly_merged(x, sizes, match, prefix):
    """`merging.merge` as one matrix of means for each image."""
    images, tokens, _ = x.shape
    sizes = torch.ones(images, tokens) if sizes is None else sizes
    found = []
    for image in range(images):
        sources = [prefix + 2 * int(number) for number in match.merged[image]]
        to = [prefix + 1 + 2 * int(number) for number in match.into[image]]
        order = [*range(prefix), *(prefix + 2 * int(number) for number in match.kept[image])]
        order += range(prefix + 1, tokens, 2)
        matrix = torch.zeros(len(order), tokens)
        for row, place in enumerate(order):
            matrix[row, place] = sizes[image, place]
            for source, destination in zip(sources, to, strict=True):
                if destination == place:
                    matrix[row, source] = sizes[image, source]
        found.append((matrix / matrix.sum(1, keepdim=True) @ x[image], matrix.sum(1)))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


@KINDS
def test_gradients_are_those_of_a_plain_implementation(kind, changes, monkeypatch):
    """With stochastic depth and blocks by hand; and the same if blocks are recomputed."""
    model = build(kind, small(**changes, drop_path_rate=0.4))
    x, draws = images(model.config, 5), torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(4))
    ours = gradients(model, x, draws)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, x, draws)
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    monkeypatch.setattr(merging, "merge", plainly_merged)
    theirs = gradients(model, x, draws)
    assert ours.keys() == theirs.keys() >= {"pixels"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(recomputed[name], ours[name], rtol=0, atol=0, msg=name)


def test_one_step_is_the_same_each_time():
    model = build("with_teacher", small(merge=4, image_size=32))
    x, draws = images(model.config, 4), torch.rand(4, 3, 2)
    first, second = gradients(model, x, draws), gradients(model, x, draws)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------- properties


def test_no_merging_is_the_model_as_it_was():
    plain, none = build("with_teacher", small()), build("with_teacher", small(merge=0))
    x = images(plain.config)
    for train in (False, True):
        assert torch.equal(plain.train(train)(x).logits, none.train(train)(x).logits)
    out = none(x, output_hidden_states=True, output_attentions=True)
    assert "token_of_patch" not in out
    assert {state.shape for state in out.hidden_states} == {(2, 18, 24)}


def test_sizes_add_up_to_the_patches():
    generator = torch.Generator().manual_seed(0)
    for tokens in (4, 5, 12, 13):
        x, sizes, patches = torch.randn(3, tokens, 6, generator=generator), None, tokens - 2
        mean = x[:, 2:].mean(1)
        while (count := min(2, (x.shape[1] - 2) // 2)) > 0:
            match = merging.match(torch.randn(3, 2, x.shape[1] - 2, 5, generator=generator), count)
            x, sizes = merging.merge(x, sizes, match, 2)
            assert_close(sizes[:, 2:].sum(1), torch.full((3,), float(patches)))
            assert_close(sizes[:, :2], torch.ones(3, 2))
            assert_close((x[:, 2:] * sizes[:, 2:, None]).sum(1) / patches, mean)
        assert x.shape[1] == 3


def test_the_best_matches_win_and_equal_ones_go_by_their_numbers():
    """Keys along four axes, whose products are exact."""
    axes = torch.eye(4)
    keys = axes[[0, 3, 1, 1, 2, 3, 3, 2, 1, 1]].view(1, 1, 10, 4)  # sources 0 1 2 3 1, destinations 3 1 3 2 1
    match = merging.match(keys, 3)
    assert match.merged.tolist() == [[1, 2, 3]]  # of four sources with a perfect match
    assert match.into.tolist() == [[1, 3, 0]]  # 1 goes to the first of its two, 3 too
    assert match.kept.tolist() == [[0, 4]]
    nothing_alike = merging.match(axes[[0, 1, 0, 1, 0, 1]].view(1, 1, 6, 4), 2)
    assert (nothing_alike.merged.tolist(), nothing_alike.into.tolist()) == ([[0, 1]], [[0, 0]])


def test_merging_tokens_that_are_the_same_changes_nothing():
    """Each patch twice, as source and as destination. One block later half are left, and the answer is the same,
    because a token counts as often as its size says."""
    config = small(distillation_token=False, image_size=(8, 32), num_hidden_layers=4)
    merging_model = build("classification", config.replace(merge=8))
    plain = build("classification", config)
    for model in (merging_model, plain):
        with torch.no_grad():
            model.deit.position[:, 2::2] = model.deit.position[:, 1::2]
    x = images(config, 3)
    for column in range(0, 32, 8):
        x[..., column + 4 : column + 8] = x[..., column : column + 4]
    once = merging_model.deit.blocks[0]
    for block in merging_model.deit.blocks[1:]:
        block.merge = 0
    seen = []
    merging_model.deit.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given))
    assert_close(merging_model(x).logits, plain(x).logits, 2e-6)
    assert once.merge == 8
    assert seen[0][0].shape[1] == 9
    assert seen[0][5].unique().tolist() == [1.0, 2.0]


def test_patches_in_another_order_give_the_same_answer_if_their_positions_go_along():
    """Sources change places among sources, and destinations among destinations. The last block merges nothing, because
    only its class token is read."""
    config = small(merge=3, image_size=(8, 24), num_hidden_layers=2)
    model = build("with_teacher", config)
    expected = build("with_teacher", config)
    generator = torch.Generator().manual_seed(1)
    order = torch.arange(12)
    for first in (0, 1):
        order[first::2] = order[first::2][torch.randperm(6, generator=generator)]
    patches = (
        images(config, 2).unflatten(3, (6, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    )
    x = patches.unflatten(1, (2, 6)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    with torch.no_grad():
        model.deit.position[:, 2:] = model.deit.position[:, 2:][:, order]
    assert_close(model(x).logits, expected(images(config, 2)).logits)


# ------------------------------------------------------------------------------------------------------- where it works


def test_autocast_merges_as_float32_does():
    """The choice is made in float32, and so is the mean; the products in bfloat16 move the keys a little."""
    x, keys = torch.randn(2, 14, 8), torch.randn(2, 3, 12, 4).bfloat16()
    expected = merging.match(keys, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = merging.match(keys, 3)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        merged, sizes = merging.merge(x, None, found, 2)
    assert torch.equal(merged, merging.merge(x, None, expected, 2)[0])
    assert merged.dtype == sizes.dtype == torch.float32
    model = build("with_teacher", small(merge=3))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(images(model.config)).logits
    assert_close(found.float(), model(images(model.config)).logits, 0.3)
    half = build("with_teacher", small(merge=3)).bfloat16()
    assert half(images(half.config).bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_model_gives_the_same(train):
    torch._dynamo.reset()
    model = build("with_teacher", small(merge=3)).train(train)
    x = images(model.config, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x).logits, model(x).logits)


def test_an_exported_program_takes_any_number_of_images():
    model = build("classification", small(merge=3))
    with torch.no_grad():
        program = torch.export.export(
            model, (images(model.config),), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1)}}
        )
    for count in (1, 5):
        x = images(model.config, count)
        assert_close(program.module()(x).logits, model(x).logits)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's forward mode
def test_functions_of_torch_func():
    model = build("classification", small(merge=2))
    x = images(model.config, 3)
    each = torch.func.vmap(lambda one: model(one.unsqueeze(0)).logits[0])(x)
    assert_close(each, model(x).logits)
    slopes = torch.func.jacrev(lambda one: model(one.unsqueeze(0)).logits[0])(x[0])
    forward = torch.func.jacfwd(lambda one: model(one.unsqueeze(0)).logits[0])(x[0])
    assert_close(slopes, forward)


def test_timms_feature_maps_keep_the_grid():
    model = build("backbone", small(merge=3, image_size=(12, 20)))
    x = images(model.config)
    out = model(x, output_hidden_states=True)
    last, [found] = model.forward_intermediates(x, indices=[1])
    assert found.shape == (2, 24, 3, 5)
    for image in range(2):
        for patch in range(15):
            token = out.hidden_states[2][image, out.token_of_patch[2][image, patch]]
            assert_close(found[image, :, patch // 5, patch % 5], token, 0)
    assert_close(last, out.last_hidden_state, 0)


def test_masked_images_are_refused():
    with raises_saying(ValueError, "masked images", "found merge=2 in the config", "set merge=0"):
        build("masked_image", small(merge=2))


def test_images_of_another_size():
    model = build("classification", small(merge=3))
    x = images(model.config, 2, (24, 16))
    out = model(x, interpolate_pos_encoding=True, output_hidden_states=True)
    assert [state.shape[1] for state in out.hidden_states] == [26, 23, 20, 17]
    assert_close(out.logits, model(x, interpolate_pos_encoding=True).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler looks at
def test_blocks_compiled_as_in_training_stay_within_their_graphs():
    """Each block has another number of tokens, and few graphs serve them all."""
    changes = {"merge": 3, "image_size": 48, "num_hidden_layers": 8, "drop_path_rate": 0.1}
    model, plain, said = build("with_teacher", small(**changes)), build("with_teacher", small(**changes)), []
    torch._dynamo.reset()
    compiling.compile_parts(model, backend="eager")
    with compiling.graphs(said.append):
        for training, count in ((True, 4), (True, 3), (False, 4), (False, 3)):
            x, draws = images(model.config, count), torch.rand(count, 8, 2)
            with torch.set_grad_enabled(training):
                found = model.train(training)(x, depth_draws=draws).logits
                assert_close(found, plain.train(training)(x, depth_draws=draws).logits)
    assert not said


def test_a_recipe_sets_it():
    assert override(digits(), ["model.merge=3"]).model.merge == 3
    assert override(digits(), ["seed=1"]).to_dict()["model"] == digits().to_dict()["model"]
    merging_recipe = override(digits(), ["model.merge=3"])
    assert Recipe.from_dict(merging_recipe.to_dict()) == merging_recipe
    assert override(merging_recipe, ["model.merge=0"]) == digits()
    with raises_saying(ValueError, "merge must be a whole number of at least 0, found -1"):
        override(digits(), ["model.merge=-1"])
    with raises_saying(ValueError, "masked images are painted patch by patch", "set model.merge=0"):
        override(simmim(), ["model.merge=3"])
