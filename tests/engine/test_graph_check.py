"""A graph is data, too: only what exports write is opened, whatever the hashes say."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import cpmbee
from cpmbee.cache_types import CACHE_TYPES
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.export.weights import PRECISIONS, Precision
from cpmbee.folder import OPS_VERSION, open_folder
from cpmbee.graph_check import check_graph
from cpmbee.graph_operators import Call, Operator
from cpmbee.graph_proto import FLOAT, read_model
from cpmbee.graph_rules import RULES
from cpmbee.graph_values import Value
from tests.engine.graph_fuzz import fuzz, put_graph
from tests.export.cases import CONFIGS, make_checkpoint
from tests.model.factory import tiny_config

OLD_GRAPHS = Path(__file__).with_name("old_graphs")

Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def quantized(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "model"
    export(small_checkpoint, out, "int4", block_size=32, verify=False)
    return out


def changed(folder: Path, out: Path, edit: Edit) -> Path:
    """A copy of a folder with another graph and the right hash of it."""
    copy = Path(shutil.copytree(folder, out))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    edit(model)
    put_graph(copy, model.SerializeToString())
    return copy


def test_fuzzed_graphs_are_refused_in_a_line_or_run(tmp_path: Path) -> None:
    outcomes, bad = fuzz(150, 0, tmp_path)
    assert bad == []
    assert min(outcomes["refused"], outcomes["ran"]) >= 10


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_export_is_opened(config: str, precision: Precision, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIGS[config])
    for cache in CACHE_TYPES:
        export(checkpoint, tmp_path / cache, precision, cache=cache, block_size=32, verify=False)
        assert open_folder(tmp_path / cache).cache == cache


@pytest.mark.parametrize(("name", "half"), [("ops1-fp16", True), ("ops1-int4", True), ("ops2-int8", False)])
def test_graphs_of_earlier_versions(name: str, half: bool) -> None:
    """Written by exports of `tiny_config` when the ops had versions 1 and 2; all caches were fp32."""
    content = lzma.decompress((OLD_GRAPHS / f"{name}.onnx.xz").read_bytes())
    config = tiny_config(half=half, distance_scale=8 if half else 16)
    check_graph(read_model(content), config, "fp32", OPS_VERSION, RULES[1])
    with pytest.raises(ValueError, match="nothing of this model"):
        check_graph(
            read_model(content), replace(config, vocab_size=config.vocab_size + 1), "fp32", OPS_VERSION, RULES[1]
        )


def first(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def attribute(op: str, name: str, value: int | float | list[int]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = first(model, op)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def before_logits(*nodes: onnx.NodeProto) -> Edit:
    """Nodes that make the logits of ``inner``, what they were."""

    def edit(model: onnx.ModelProto) -> None:
        first_of = next(node for node in model.graph.node if "logits" in node.output)
        first_of.output[list(first_of.output).index("logits")] = "inner"
        model.graph.node.extend(nodes)

    return edit


def placed(name: str, key: str, value: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return edit


def functions_that_double(model: onnx.ModelProto) -> None:
    for i in range(40):
        call = f"F{i - 1}"
        nodes = [
            helper.make_node(call, ["x"], ["t"], domain="evil"),
            helper.make_node(call, ["t"], ["y"], domain="evil"),
        ]
        model.functions.append(helper.make_function("evil", f"F{i}", ["x"], ["y"], nodes, model.opset_import))


def values_that_double(model: onnx.ModelProto) -> None:
    name = "layers.0.ffn/gated"
    for i in range(40):
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"double.{i}"], axis=-1))
        name = f"double.{i}"


def shapes_that_double(model: onnx.ModelProto) -> None:
    name = "head/logits_shape"
    for i in range(60):
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"double.{i}"], axis=0))
        name = f"double.{i}"


def logits_of_every_token(model: onnx.ModelProto) -> None:
    first(model, "Transpose").input[0] = "embed/rotated"


def too_many_nodes(model: onnx.ModelProto) -> None:
    for i in range(1000):
        model.graph.node.append(helper.make_node("Shape", ["logits_index"], [f"shape.{i}"]))


def a_body_of_ours_changed(model: onnx.ModelProto) -> None:
    function = next(function for function in model.functions if function.name == "RMSNorm")
    function.node[-1].op_type = "Add"


def a_loop(model: onnx.ModelProto) -> None:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["x"], ["y"])]
    inputs = [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("x", TensorProto.FLOAT, None)]
    outputs = [info("d", TensorProto.BOOL, []), info("y", TensorProto.FLOAT, None)]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 << 62), "rounds"))
    before_logits(helper.make_node("Loop", ["rounds", "", "inner"], ["logits"], body=body))(model)


def inline(name: str, array: np.ndarray) -> Edit:  # type: ignore[type-arg]
    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(array, name))

    return edit


def twice_the_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def last_node_first(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[-1], *nodes[:-1]])


def another_name_of_a_size(model: onnx.ModelProto) -> None:
    model.graph.input[3].type.tensor_type.shape.dim[1].dim_param = "Q"


def cache_written_by_two(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "BucketedAttention"]
    nodes[1].input[5:] = nodes[0].input[5:]


def caches_without_attention(model: onnx.ModelProto) -> None:
    attention = first(model, "BucketedAttention")
    for place in (1, 2):
        name = attention.output[place]
        attention.output[place] = f"{name}.other"
        model.graph.node.append(helper.make_node("Mul", [attention.input[place + 4]] * 2, [name]))


def a_name_of_a_cache(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Sin", ["key_cache.0"], ["present_more"]))


def a_matrix_read_once_more(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.output[0] == "head/ext").input[0] = "embedding"


EDITS: dict[str, tuple[Edit, str]] = {
    "negative batch_dims": (attribute("GatherND", "batch_dims", -2), "node GatherND .*batch_dims is -2"),
    "an axis beyond the last": (attribute("Concat", "axis", 9), "node Concat .*its axis is 9"),
    "an attribute nobody wrote": (attribute("Reshape", "allowzero", 1), "node Reshape .*the attributes allowzero"),
    "an attribute of another type": (attribute("Gather", "axis", 0.5), "node Gather .*axis is of another type"),
    "a permutation that is none": (attribute("Transpose", "perm", [0, 0, 1]), "node Transpose .*perm is"),
    "not a number": (attribute("RMSNorm", "epsilon", float("nan")), "node RMSNorm .*not a finite number"),
    "other heads": (attribute("BucketedAttention", "num_heads", 2), "num_heads is 2, and the model has 3"),
    "a loop": (a_loop, "Attribute has a field 6"),
    "an unknown operator": (
        before_logits(helper.make_node("Expand", ["inner", "head/logits_shape"], ["logits"])),
        "node Expand .*no export writes this operator",
    ),
    "functions that double": (functions_that_double, "function F0 is not one"),
    "a changed body": (a_body_of_ours_changed, "function RMSNorm is not one"),
    "a body twice": (lambda model: model.functions.append(model.functions[0]), "function BucketedPositionBias is not"),
    "no body": (lambda model: model.functions.pop(), "node GatedGelu .*no body for it"),
    "values that double": (values_that_double, "node Concat .*nothing of this model|sizes"),
    "shapes that double": (shapes_that_double, "node Concat .*a shape of 6 axes"),
    "too many nodes": (too_many_nodes, "node Shape .*3 of them are too many for 6 blocks"),
    "an odd offset": (placed("position_bias", "offset", "4097"), "begins at 4097, which is no multiple of 4096"),
    "a negative offset": (placed("position_bias", "offset", "-4096"), "external data at '-4096'"),
    "too short a length": (placed("position_bias", "length", "4"), "has 4 bytes, and its shape needs 1152"),
    "a tensor over another": (placed("layers.0.attention/norm_weight", "offset", "0"), "two tensors lie at 0"),
    "a large constant": (inline("large", np.zeros(21, np.float32)), "tensor large has type 1"),
    "a constant of text": (inline("text", np.array(["x"])), "Tensor has a field 6"),
    "a name twice": (inline("position_bias", np.zeros(2, np.float32)), "two values are called position_bias"),
    "a name that a runtime makes up": (inline("_inlfunc_x", np.zeros(2, np.float32)), "a value is called '_inlfunc_x'"),
    "an input twice": (twice_the_input, "an input too many, one twice"),
    "a node before its inputs": (last_node_first, "is not there yet"),
    "another name of a size": (another_name_of_a_size, "input slots is declared as"),
    "a cache written by two": (cache_written_by_two, "it writes the caches to"),
    "caches without attention": (caches_without_attention, "it writes the caches to"),
    "a name of a cache": (a_name_of_a_cache, r"node Sin .*it computes \(P, 3, 8\), which is nothing of this model"),
    "a matrix read once more": (a_matrix_read_once_more, "node MatMul .*embedding is read by too many nodes"),
    "another operator set": (lambda model: model.opset_import.add(domain="evil", version=1), "operator sets"),
    "an older operator set": (lambda model: setattr(model.opset_import[0], "version", 7), "operator sets"),
    "metadata": (lambda model: model.metadata_props.add(key="a", value="b"), "Model has a field 14"),
    "training": (lambda model: model.training_info.add(), "Model has a field 20"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_graph_that_no_export_writes(edit: str, small_folder: Path, tmp_path: Path) -> None:
    change, message = EDITS[edit]
    with pytest.raises(cpmbee.ModelFolderError, match=message) as caught:
        open_folder(changed(small_folder, tmp_path / "model", change))
    assert "\n" not in str(caught.value)


def test_logits_of_every_token(tmp_path: Path) -> None:
    """A vocabulary for each token of a long prompt would take all memory; a model computes it where it is wanted."""
    export(demo_checkpoint(), tmp_path / "demo", verify=False)
    with pytest.raises(cpmbee.ModelFolderError, match=r"node MatMul .*nothing of this model"):
        open_folder(changed(tmp_path / "demo", tmp_path / "model", logits_of_every_token))


def test_weights_are_copied_once(small_checkpoint: Path, tmp_path: Path) -> None:
    def cast_again(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Cast", ["embedding"], ["copy"], to=TensorProto.FLOAT))

    export(small_checkpoint, tmp_path / "fp16", "fp16", verify=False)
    with pytest.raises(cpmbee.ModelFolderError, match=r"node Cast \(copy\): embedding is read by too many nodes"):
        open_folder(changed(tmp_path / "fp16", tmp_path / "model", cast_again))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bits", 8, "should be uint8"),
        ("block_size", 0, "no matrix has 4 bits in blocks of 0"),
        ("in_features", -1, "no matrix has"),
        ("out_features", 1 << 62, "should be uint8"),
    ],
)
def test_quantized_matrices_are_as_their_attributes_say(
    name: str, value: int, message: str, quantized: Path, tmp_path: Path
) -> None:
    with pytest.raises(cpmbee.ModelFolderError, match=message):
        open_folder(changed(quantized, tmp_path / "model", attribute("QuantizedLinear", name, value)))


def test_a_body_of_another_variant(tmp_path: Path, quantized: Path, small_checkpoint: Path) -> None:
    """The embedding of 8 bits with the body that reads 4, both ours."""
    export(small_checkpoint, tmp_path / "other", "int8", head_bits=4, block_size=32, verify=False)
    other = onnx.load(tmp_path / "other" / "model.onnx", load_external_data=False)

    def exchange(model: onnx.ModelProto) -> None:
        model.functions.pop()
        model.functions.append(other.functions[-1])

    assert other.functions[-1].name == "QuantizedEmbedding"
    with pytest.raises(cpmbee.ModelFolderError, match="no body for it that is made for 8"):
        open_folder(changed(quantized, tmp_path / "model", exchange))


def test_bytes_that_protobuf_reads_in_two_ways(small_folder: Path, tmp_path: Path) -> None:
    content = (small_folder / "model.onnx").read_bytes()
    copy = Path(shutil.copytree(small_folder, tmp_path / "model"))
    for more, message in (
        (b"\x3a\x00", "Model has two values for graph"),
        (b"\x88\x00\x09", "longer than it need be"),
        (b"\x0b", "wire type 3"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "too long"),
    ):
        put_graph(copy, content + more)
        with pytest.raises(cpmbee.ModelFolderError, match=message):
            open_folder(copy)


def test_more_messages_than_a_graph_has(small_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_folder, tmp_path / "model"))
    put_graph(copy, b"\x42\x00" * (1 << 18))
    with pytest.raises(cpmbee.ModelFolderError, match="more than 262144 messages"):
        open_folder(copy)


def test_code_extends_the_rules(small_folder: Path, tmp_path: Path) -> None:
    """As another architecture does, and a folder cannot."""

    def infer(call: Call) -> list[Value]:
        return [Value(FLOAT, call.inputs[0].shape)]

    copy = changed(small_folder, tmp_path / "model", before_logits(helper.make_node("Tanh", ["inner"], ["logits"])))
    with pytest.raises(cpmbee.ModelFolderError, match="node Tanh"):
        open_folder(copy)
    rules = {1: RULES[1].extended(operators={("", "Tanh"): Operator(infer, 1)})}
    assert open_folder(copy, rules=rules).precision["head"] == "fp32"
    with pytest.raises(cpmbee.ModelFolderError, match="node Tanh"):
        open_folder(copy)
