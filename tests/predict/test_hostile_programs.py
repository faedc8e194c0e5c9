"""Nothing in a stranger's `.pt2` file runs but the operations of a network."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from support import hostile
from support.checks import raises_saying
from support.exports import KINDS, model_of, pixels_for
from support.models import build, random_config, saved, trained_folder

from deit.config import ACTIVATIONS
from deit.export.engines import load_engine
from deit.export.program import Program
from deit.export.write import export
from deit.files import CheckpointError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    return export(trained_folder(root / "model"), "torch", root / "torch").folder


@pytest.fixture
def attacked(exported, tmp_path):
    """A copy of an export, to change, and the folder that appears if code runs."""
    return shutil.copytree(exported, tmp_path / "attacked"), tmp_path / "ran"


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_answers_as_pytorch_runs_it(kind, tmp_path):
    """Bit for bit, for one image and for many."""
    model = model_of(kind)
    folder = export(saved(model, tmp_path / "m"), "torch", tmp_path / "out").folder
    program, reference = Program(folder / "model.pt2"), torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        for count in (1, 5):
            found, expected = program(pixels_for(model, count)), reference(pixels_for(model, count))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("seed", range(len(ACTIVATIONS)))
def test_programs_of_all_architectures_are_read(seed, tmp_path):
    config = random_config(
        seed,
        hidden_act=ACTIVATIONS[seed],
        num_channels=3,
        num_labels=3,
        layer_scale_init_value=(None, 0.1)[seed % 2],
        position_on_class_token=seed % 2 == 0,
    )
    model = build(("classification", "with_teacher")[seed % 2], config)
    engine = load_engine(export(saved(model, tmp_path / "m"), "torch", tmp_path / "out").folder)
    pixels = pixels_for(model, 3)
    with torch.no_grad():
        expected = model(pixels).logits
    torch.testing.assert_close(torch.from_numpy(engine(pixels.numpy())["logits"]), expected, rtol=1e-5, atol=1e-5)


def part(parts, ending):
    [name] = [name for name in parts if name.endswith(ending)]
    return name


def edited(parts, ending, change):
    """Changes one JSON part of the archive in place."""
    name = part(parts, ending)
    content = json.loads(parts[name])
    change(content)
    parts[name] = json.dumps(content).encode()


def pickle_a_weight(parts, trace):
    def change(config):
        entry = next(iter(config["config"].values()))
        entry["use_pickle"] = True
        parts[part(parts, f"weights/{entry['path_name']}")] = hostile.pickled(trace)

    edited(parts, "weights_config.json", change)


def pickle_all_weights(parts, trace):
    root = part(parts, "weights_config.json").rpartition("/")[0]
    parts[f"{root}/model.pt"] = hostile.pickled(trace)


def pickle_a_constant(parts, trace, prefix="opaque_obj_"):
    def change(config):
        root = part(parts, "constants_config.json").rpartition("/")[0]
        parts[f"{root}/{prefix}0"] = hostile.plainly_pickled(trace)
        config["config"]["c"] = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    edited(parts, "constants_config.json", change)


def pickle_a_script_object(parts, trace):
    pickle_a_constant(parts, trace, "custom_obj_")


def call(target):
    def change(parts, trace):
        def first(content):
            node = content["graph_module"]["graph"]["nodes"][0]
            node["target"] = target
            node["inputs"] = [{"name": "x", "arg": {"as_string": str(trace)}, "kind": 1}]

        edited(parts, "models/model.json", first)

    return change


REFUSED = {
    "a pickled weight": (pickle_a_weight, "as a pickled object"),
    "pickled weights": (pickle_all_weights, "holds a pickled object"),
    "a pickled constant": (pickle_a_constant, "as a pickled object"),
    "a script object": (pickle_a_script_object, "as a pickled object"),
    "a function of the system": (call("os.mkdir"), "calls 'os.mkdir'"),
    "a function of torch": (call("torch.ops.aten.from_file.default"), "calls 'torch.ops.aten.from_file.default'"),
    "another path to it": (call("torch.ops.aten.__class__"), "calls 'torch.ops.aten.__class__'"),
    "a library": (call("torch.ops.load_library"), "calls 'torch.ops.load_library'"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_no_command_runs_what_a_program_holds(attack, attacked, tmp_path, capsys):
    folder, trace = attacked
    change, why = REFUSED[attack]
    hostile.rewritten(folder, lambda parts: change(parts, trace))
    data = hostile.images(tmp_path / "data")
    (tmp_path / "out").mkdir()
    for verb, command in hostile.commands(folder, data, tmp_path / "out").items():
        said = hostile.refused(command, capsys)
        if verb in ("predict", "calibrate", "serve"):
            assert why in said
            assert "nothing of it was run; export the model" in said
        assert not trace.exists(), verb


@pytest.mark.filterwarnings("ignore")
def test_the_attacks_would_work_on_pytorch_itself(attacked):
    """Otherwise the test above proves nothing."""
    folder, trace = attacked
    hostile.rewritten(folder, lambda parts: pickle_a_weight(parts, trace))
    with pytest.raises(Exception, match=r".*"):
        torch.export.load(folder / "model.pt2")
    assert trace.exists()


def inputs(parts, trace):
    parts[part(parts, "sample_inputs/model.pt")] = hostile.pickled(trace)


def expression(parts, trace):
    def change(content):
        code = f"__import__('os').mkdir({str(trace)!r})"
        graph = content["graph_module"]["graph"]
        for value in graph["sym_int_values"].values():
            value["as_expr"]["expr_str"] = code
        content["range_constraints"] = {code: {"min_val": 1, "max_val": None}}

    edited(parts, "models/model.json", change)


def guard(parts, trace):
    code = f"__import__('os').mkdir({str(trace)!r}) is None"
    edited(parts, "models/model.json", lambda content: content.update(guards_code=[code]))


def specification(parts, trace):
    def change(content):
        (trace.parent / "stranger.py").write_text(f"import os; os.mkdir({str(trace)!r})")
        node = {"type": "collections.defaultdict", "children_spec": []}
        node["context"] = json.dumps(
            {"default_factory_module": "stranger", "default_factory_name": "x", "dict_context": []}
        )
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = json.dumps([1, node])

    edited(parts, "models/model.json", change)


@pytest.mark.parametrize("change", [inputs, expression, guard, specification])
def test_what_a_network_does_not_need_is_not_read(change, attacked, exported, monkeypatch):
    folder, trace = attacked
    monkeypatch.syspath_prepend(trace.parent)
    hostile.rewritten(folder, lambda parts: change(parts, trace))
    pixels = torch.rand(3, 3, 16, 16).numpy()
    assert (load_engine(folder)(pixels)["logits"] == load_engine(exported)(pixels)["logits"]).all()
    assert not trace.exists()


@pytest.mark.parametrize("pickles", ["weights", "the weights as well"])
def test_the_layouts_of_former_versions_are_read_without_pickles(pickles, attacked, exported, tmp_path):
    """Those of torch 2.6 to 2.8 keep the weights in one file of `torch.save`."""
    folder, trace = attacked
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        names = archive.namelist()
        graph = archive.read(part(names, "models/model.json"))
    state, buffer = dict(Program(exported / "model.pt2")._held), io.BytesIO()
    specs = json.loads(graph)["graph_module"]["signature"]["input_specs"]
    of = {
        spec["parameter"]["arg"]["name"]: spec["parameter"]["parameter_name"] for spec in specs if "parameter" in spec
    }
    torch.save({of[name]: tensor for name, tensor in state.items()}, buffer)
    content = buffer.getvalue() if pickles == "weights" else hostile.pickled(trace)
    empty = io.BytesIO()
    torch.save({}, empty)
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", graph)
        archive.writestr("serialized_state_dict.pt", content)
        archive.writestr("serialized_constants.pt", empty.getvalue())
        archive.writestr("serialized_example_inputs.pt", hostile.pickled(trace))
    hostile.described(folder)
    if pickles == "weights":
        pixels = torch.rand(3, 3, 16, 16).numpy()
        assert (load_engine(folder)(pixels)["logits"] == load_engine(exported)(pixels)["logits"]).all()
    else:
        with raises_saying(CheckpointError, "holds a pickled object", "nothing of it was run"):
            load_engine(folder)
    assert not trace.exists()


def larger(parts, trace):
    def change(config):
        entry = next(iter(config["config"].values()))
        entry["tensor_meta"]["sizes"] = [{"as_int": 10**12}]
        entry["tensor_meta"]["strides"] = [{"as_int": 1}]

    edited(parts, "weights_config.json", change)


def nameless(parts, trace):
    edited(parts, "models/model.json", lambda content: content["graph_module"].pop("signature"))


def listed(parts, trace):
    parts[part(parts, "models/model.json")] = b"[]"


def deep(parts, trace):
    parts[part(parts, "models/model.json")] = b"[" * 100_000


@pytest.mark.parametrize("change", [larger, nameless, listed, deep])
def test_damaged_programs_are_refused_in_one_sentence(change, attacked):
    folder, trace = attacked
    hostile.rewritten(folder, lambda parts: change(parts, trace))
    with raises_saying(CheckpointError, folder / "model.pt2", "export it again"):
        load_engine(folder)


def test_compressed_programs_are_refused(attacked):
    """They could unpack to any size."""
    folder, _ = attacked
    with zipfile.ZipFile(folder / "model.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/models/model.json", b" " * 10**8)
    hostile.described(folder)
    with raises_saying(CheckpointError, "holds compressed parts"):
        load_engine(folder)
