"""Outputs as dictionaries and as trees of tensors, in each library that takes them apart, beside `transformers`'."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.hugging_face import CLASSES, inputs_for, pair
from support.models import build, images, small
from torch.nn.parallel.scatter_gather import gather
from torch.utils import _pytree

from deit.model.outputs import BaseModelOutputWithPooling, ImageClassifierOutput

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(params=CLASSES)
def both(request):
    """The outputs of both models, everything in them, and the models with their inputs."""
    name = request.param
    config = small(distillation_token=name.startswith("DeiT"), num_hidden_layers=2)
    ours, theirs = pair(name, config)
    given = inputs_for(name, config)
    with torch.no_grad():
        found, expected = (
            model(**given, output_hidden_states=True, output_attentions=True) for model in (ours, theirs)
        )
    return ours, theirs, given, found, expected


def test_dictionary(both):
    *_, found, expected = both
    assert isinstance(found, OrderedDict)
    assert list(found) == list(expected)
    assert_close(dict(found), dict(expected))
    assert_close({**found}, {**expected})
    assert isinstance(found, dict) == isinstance(expected, dict)


def test_built_again(both):
    """From a dictionary, from pairs and from keywords, as gathering and casting libraries do."""
    *_, found, expected = both
    for again in (
        type(found)(dict(found)),
        type(found)((key, value) for key, value in found.items()),
        type(found)(**found),
        copy.copy(found),
        copy.deepcopy(found),
        pickle.loads(pickle.dumps(found)),
        found.copy(),
    ):
        assert type(again) is type(found)
        assert list(again) == list(expected)
        assert_close(again, expected)
        assert all(getattr(again, name) is again[name] for name in again)


def test_tree(both):
    *_, found, expected = both
    leaves, spec = _pytree.tree_flatten(found)
    assert_close(tuple(leaves), tuple(_pytree.tree_flatten(expected)[0]))
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(found)[0]]
    assert len(paths) == len(set(paths)) == len(leaves)
    assert paths[0] == f"['{next(iter(found))}']"
    doubled = _pytree.tree_map(lambda value: 2 * value, found)
    assert type(doubled) is type(found)
    assert_close(doubled, _pytree.tree_map(lambda value: 2 * value, expected))
    again = _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(spec)))
    assert type(again) is type(found)


def test_gathered(both):
    """`DataParallel` puts the outputs of its replicas together."""
    *_, found, expected = both
    whole = _gathered([found, found])
    assert type(whole) is type(found)
    assert_close(whole, _gathered([expected, expected]))


def _gathered(outputs):
    """`gather` of torch, whose operation for tensors needs several GPUs, with a concatenation in its place."""

    class Joined:
        @staticmethod
        def apply(_, dim, *tensors):
            return torch.cat([torch.atleast_1d(tensor) for tensor in tensors], dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.parallel.scatter_gather.Gather", Joined)
        return gather(outputs, "cpu")


def test_cast_by_accelerate(both):
    from accelerate.utils import convert_to_fp32, recursively_apply

    *_, found, expected = both
    half, theirs = (recursively_apply(lambda value: value.bfloat16(), output) for output in (found, expected))
    whole = convert_to_fp32(half)
    assert type(half) is type(whole) is type(found)
    assert {leaf.dtype for leaf in _pytree.tree_leaves(whole)} == {torch.float32}
    assert_close(whole, convert_to_fp32(theirs), 0.1)


def test_compiled(both):
    """Without a break in the graph, the class of the output included."""
    ours, _, given, *_ = both
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = compiled(**given), ours(**given)
    assert type(found) is type(expected)
    assert_close(found, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program(both, strict, tmp_path):
    """`torch.export` keeps the class of the output, through a file too."""
    ours, theirs, given, *_ = both
    given = {name: value for name, value in given.items() if name != "labels"}
    torch.export.save(torch.export.export(ours, (), given, strict=strict), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(**given)
    with torch.no_grad():
        expected = theirs(**given)
    assert type(found).__name__ == type(ours(**given)).__name__
    assert_close(found, expected)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*deprecated", "ignore:`is_gradient_check"
)
@pytest.mark.parametrize("tuples", [False, True])
def test_traced(both, tuples):
    """`torch.jit.trace` gives a dictionary, or with `return_dict=False` a tuple, as of `transformers`."""
    ours, theirs, given, *_ = both
    given = {"pixel_values": given["pixel_values"]}
    traced = []
    for model in (ours, theirs):
        model = Tuples(model) if tuples else model
        traced.append(torch.jit.trace(model, example_kwarg_inputs=given, strict=False, check_trace=False)(**given))
    found, expected = traced
    assert type(found) is type(expected)
    assert_close(found, expected)


class Tuples(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values, return_dict=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(tmp_path):
    """`torch.onnx.export` names the outputs, in the order of the output's fields."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = small(num_hidden_layers=1)
    ours, theirs = pair("DeiTForImageClassificationWithTeacher", config)
    x = images(config)
    torch.onnx.export(ours, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_close(tuple(found), theirs(x).to_tuple())


def test_set_fields():
    """A field that is set is a key, one that is set to None is none; the order is that of the fields."""
    output, tensor = ImageClassifierOutput(logits=torch.ones(2)), torch.zeros(())
    output.loss = tensor
    assert list(output) == ["loss", "logits"]
    assert output["loss"] is output.loss is output[0] is tensor
    output["logits"] = None
    assert list(output) == ["loss"]
    assert output.logits is None
    assert output.get("logits", "none") == "none"


def test_refusals():
    output = BaseModelOutputWithPooling(last_hidden_state=torch.ones(1))
    with raises_saying(TypeError, "BaseModelOutputWithPooling has no field 'logits'; it has last_hidden_state, "):
        BaseModelOutputWithPooling(logits=torch.ones(1))
    with raises_saying(TypeError, "has no field 'logits'"):
        output["logits"] = torch.ones(1)
    theirs = transformers.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=torch.ones(1))
    for change in (
        lambda out: out.pop("last_hidden_state"),
        lambda out: out.update(pooler_output=1),
        lambda out: out.setdefault("pooler_output", 1),
        lambda out: out.__delitem__("last_hidden_state"),
    ):
        with raises_saying(TypeError, "keeps its fields; make a dictionary of it first"):
            change(output)
        with pytest.raises(Exception, match="You cannot use"):
            change(theirs)
    with raises_saying(KeyError, "'loss' is not in this output, which has logits"):
        ImageClassifierOutput(logits=torch.ones(1))["loss"]


def test_gradients_reach_every_replica():
    """An output that was built again is still part of the graph."""
    model = build("classification", small())
    out = model(images(model.config), labels=torch.tensor([0, 1]))
    type(out)(dict(out)).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
