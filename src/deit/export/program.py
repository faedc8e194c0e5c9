"""Runs the program in a `.pt2` file as data, so that nothing else in the file can run.

`torch.export.load` unpickles parts of such a file, evaluates expressions and imports names that it gives. Here the
tensors are bytes, the graph is JSON, and each of its nodes has to call one of `OPERATIONS`. Nothing else is read.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit import files

OPERATIONS = frozenset(
    {
        "add.Tensor",
        "alias.default",
        "batch_norm.default",
        "cat.default",
        "clone.default",
        "contiguous.default",
        "conv2d.default",
        "div.Tensor",
        "dropout.default",
        "expand.default",
        "flatten.using_ints",
        "gelu.default",
        "layer_norm.default",
        "linear.default",
        "matmul.default",
        "max_pool2d.default",
        "mean.dim",
        "mul.Tensor",
        "pad.default",
        "permute.default",
        "relu.default",
        "reshape.default",
        "scaled_dot_product_attention.default",
        "select.int",
        "sigmoid.default",
        "silu.default",
        "slice.Tensor",
        "softmax.int",
        "squeeze.dim",
        "sub.Tensor",
        "sym_size.int",
        "tanh.default",
        "to.dtype",
        "transpose.int",
        "unbind.int",
        "unflatten.int",
        "unsqueeze.default",
        "view.default",
    }
)
"""The operations of `torch.ops.aten` that exported classifiers need. None of them touches a file or a name."""
_PREFIX = "torch.ops.aten."
_ASSERTION = "torch.ops.aten._assert_tensor_metadata.default"
"""States a type that `Engine` has checked already."""

# The numbers are those of torch._export.serde.schema, which stay the same in all its versions.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}

_Values = dict[str, Any]
_Given = Callable[[_Values], Any]


@dataclass(frozen=True)
class _Step:
    """One call of the graph."""

    operation: Callable[..., Any]
    positional: Sequence[_Given]
    named: Mapping[str, _Given]
    results: Sequence[Any]
    """The name of each result, or a list of names for a result that is a list."""
    last_used: Sequence[str]
    """Values that no later step needs."""


class Program:
    """A classifier's graph and its tensors, from pixels (B, C, H, W) to the outputs by name. Threads may share it.

    Raises `CheckpointError` if the file holds pickled parts or asks for an operation outside `OPERATIONS`, and nearly
    any other exception if it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            graph_module, state, constants = self._parts(archive)
        graph, signature = graph_module["graph"], graph_module["signature"]
        self._held: _Values = {}
        self.input = ""
        for spec in signature["input_specs"]:
            [(kind, value)] = spec.items()
            if kind == "user_input" and not self.input:
                self.input = value["arg"]["as_tensor"]["name"]
            elif kind in ("parameter", "buffer", "tensor_constant"):
                name = value[f"{kind}_name"]
                self._held[value["arg"]["name"]] = state[name] if name in state else constants[name]
            else:
                raise self._refused(f"has an input of the kind {kind!r}")
        if other := {kind for spec in signature["output_specs"] for kind in spec} - {"user_output"}:
            raise self._refused(f"has an output of the kind {other.pop()!r}")
        _, out_spec = json.loads(graph_module["module_call_graph"][0]["signature"]["out_spec"])
        self.outputs = tuple(map(str, json.loads(out_spec["context"])))
        self._results = [output["as_tensor"]["name"] for output in graph["outputs"]]
        if len(self.outputs) != len(self._results):
            raise self._refused(f"names {len(self.outputs)} outputs and computes {len(self._results)}")
        self._steps = self._plan([node for node in graph["nodes"] if node["target"] != _ASSERTION])

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        values = {**self._held, self.input: pixels}
        for step in self._steps:
            found = step.operation(
                *(given(values) for given in step.positional),
                **{name: given(values) for name, given in step.named.items()},
            )
            for name, value in zip(step.results, [found] if len(step.results) == 1 else found, strict=True):
                if isinstance(name, list):
                    values.update(zip(name, value, strict=True))
                else:
                    values[name] = value
            for name in step.last_used:
                values.pop(name, None)
        return {name: values[result] for name, result in zip(self.outputs, self._results, strict=True)}

    def _refused(self, what: str) -> files.CheckpointError:
        return files.CheckpointError(
            f"{self.path} {what}, which no export of this package does, so nothing of it was run; export the model "
            "again, or ask for another format"
        )

    # ------------------------------------------------------------------------------------------------------ the archive

    def _parts(self, archive: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """The graph, the weights and the constants."""
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise self._refused("holds two parts of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # they could unpack to any size
            raise self._refused("holds compressed parts")
        held = {entry.filename: entry for entry in entries}
        if "serialized_exported_program.json" in held:  # torch 2.6 and 2.7
            graph = "serialized_exported_program.json"
            state, constants = (
                self._unpickled(archive.read(f"serialized_{part}.pt")) for part in ("state_dict", "constants")
            )
        else:
            root = entries[0].filename.partition("/")[0]
            graphs = [name for name in held if name.startswith(f"{root}/models/")]
            if len(graphs) != 1:
                raise self._refused(f"holds {len(graphs)} programs")
            graph = graphs[0]
            name = Path(graph).stem
            state, constants = (
                self._tensors(archive, f"{root}/data/{part}/", name, part) for part in ("weights", "constants")
            )
        return json.loads(archive.read(graph))["graph_module"], state, constants

    def _tensors(self, archive: zipfile.ZipFile, folder: str, model: str, part: str) -> dict[str, Tensor]:
        if f"{folder}{model}.pt" in archive.namelist():  # torch 2.8
            return self._unpickled(archive.read(f"{folder}{model}.pt"))
        tensors: dict[str, Tensor] = {}
        for name, entry in json.loads(archive.read(f"{folder}{model}_{part}_config.json"))["config"].items():
            if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                raise self._refused(f"holds {name} as a pickled object")
            content, meta = archive.read(folder + entry["path_name"]), entry["tensor_meta"]
            flat = torch.frombuffer(bytearray(content), dtype=_DTYPES[meta["dtype"]]) if content else torch.empty(0)
            sizes, strides = ([_number(one) for one in meta[key]] for key in ("sizes", "strides"))
            tensors[name] = torch.as_strided(flat, sizes, strides, _number(meta["storage_offset"]))
        return tensors

    def _unpickled(self, content: bytes) -> dict[str, Tensor]:
        """A dictionary of tensors, by PyTorch's restricted unpickler."""
        try:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise self._refused(f"holds a pickled object ({' '.join(str(error).split())[:80]})") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise self._refused("holds more than tensors in its weights")
        return found

    # -------------------------------------------------------------------------------------------------------- the graph

    def _plan(self, nodes: Sequence[Mapping[str, Any]]) -> list[_Step]:
        wanted = set(self._results)
        steps = []
        for node in reversed(nodes):
            target = str(node["target"])
            if target.removeprefix(_PREFIX) not in OPERATIONS or not target.startswith(_PREFIX):
                raise self._refused(f"calls {target!r:.100}")
            packet, overload = target.removeprefix(_PREFIX).split(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload)
            order = [argument.name for argument in operation._schema.arguments if not argument.kwarg_only]
            used: set[str] = set()
            arguments = {one["name"]: self._given(one["arg"], used) for one in node["inputs"]}
            positional = [name for name, given in zip(order, arguments, strict=False) if name == given]
            results = [_name(one) for one in node["outputs"]]
            flat = {name for result in results for name in (result if isinstance(result, list) else [result])}
            steps.append(
                _Step(
                    operation,
                    [arguments[name] for name in positional],
                    {name: given for name, given in arguments.items() if name not in positional},
                    results,
                    sorted((used | flat) - wanted),
                )
            )
            wanted |= used
        return steps[::-1]

    def _given(self, argument: Mapping[str, Any], used: set[str]) -> _Given:
        """What computes an argument from the values so far; adds the names that it needs to `used`."""
        [(kind, value)] = argument.items()
        if kind == "as_none":
            return lambda values: None
        if kind in _PLAIN:
            constant = _PLAIN[kind](value)
            return lambda values: constant
        if kind in ("as_tensor", "as_sym_int", "as_optional_tensor"):
            if "as_tensor" in value:
                value = value["as_tensor"]
            name = value.get("name", value.get("as_name"))
            if name is None:
                number = value.get("as_int")
                return lambda values: number
            used.add(str(name))
            return lambda values: values[name]
        if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
            each = [self._given({kind.removesuffix("s"): one}, used) for one in value]
            return lambda values: [given(values) for given in each]
        raise self._refused(f"has an argument of the kind {kind!r}")


def _number(value: Mapping[str, Any]) -> int:
    return int(value["as_int"])


def _name(result: Mapping[str, Any]) -> Any:
    """The name of a result, or the list of names for a list."""
    [(kind, value)] = result.items()
    if kind == "as_tensors":
        return [str(one["name"]) for one in value]
    return str(value["name"] if "name" in value else value["as_name"])


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "as_bool": bool,
    "as_bools": lambda values: [bool(value) for value in values],
    "as_device": lambda value: torch.device("cpu"),
    "as_float": float,
    "as_floats": lambda values: [float(value) for value in values],
    "as_int": int,
    "as_ints": lambda values: [int(value) for value in values],
    "as_layout": lambda value: torch.strided,
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
    "as_scalar_type": _DTYPES.__getitem__,
    "as_string": str,
}
"""Kinds of arguments that are values by themselves."""
