"""ONNX and OpenVINO files of a stranger load no library and read no file outside their folder."""

import re
import shutil

import pytest
from support import hostile
from support.checks import raises_saying

from deit.export.engines import load_engine
from deit.files import CheckpointError


@pytest.fixture
def attacked(exported, tmp_path):
    def copy(to):
        return shutil.copytree(exported("plain", to).folder, tmp_path / "attacked")

    return copy


@pytest.mark.parametrize("location", ["../secret", "{folder}/../secret", "a/../../secret", "link"])
def test_onnx_weights_outside_the_folder_are_not_read(location, attacked, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    folder = attacked("onnx")
    (tmp_path / "secret").write_bytes(bytes(10**6))
    (folder / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(folder / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == 1)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location.format(folder=folder))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    hostile.described(folder)
    data = hostile.images(tmp_path / "data")
    (tmp_path / "out").mkdir()
    commands = hostile.commands(folder, data, tmp_path / "out")
    for verb in ("predict", "calibrate", "serve"):
        assert "model.onnx can't be read by onnxruntime" in hostile.refused(commands[verb], capsys)


def test_onnx_operators_of_a_library_are_not_known(attacked):
    onnx = pytest.importorskip("onnx")
    folder = attacked("onnx")
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].domain, model.graph.node[0].op_type = "stranger", "Run"
    model.opset_import.add(domain="stranger", version=1)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    hostile.described(folder)
    with raises_saying(CheckpointError, "model.onnx can't be read by onnxruntime", "stranger"):
        load_engine(folder)


def test_openvino_layers_of_a_library_are_not_known(attacked):
    folder = attacked("openvino")
    path = folder / "model.xml"
    library = folder / "libstranger.so"
    library.write_bytes(b"\x7fELF")
    text = re.sub(r'type="MatMul" version="opset1"', f'type="Run" version="{library}"', path.read_text(), count=1)
    path.write_text(text)
    hostile.described(folder)
    with raises_saying(CheckpointError, "model.xml can't be read by openvino"):
        load_engine(folder)


@pytest.mark.parametrize(("name", "value"), [("offset", 10**12), ("size", 10**12), ("offset", -64)])
def test_openvino_weights_outside_the_file_are_not_read(name, value, attacked):
    folder = attacked("openvino")
    path = folder / "model.xml"
    path.write_text(re.sub(rf'{name}="\d+"', f'{name}="{value}"', path.read_text()))
    hostile.described(folder)
    with raises_saying(CheckpointError, "model.xml can't be read by openvino"):
        load_engine(folder)
