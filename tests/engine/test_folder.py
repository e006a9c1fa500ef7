"""Model folders that are incomplete, altered or unsafe: one clear line each, naming the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import cpmbee
from cpmbee.folder import open_folder
from cpmbee.graph_proto import read_model


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def edit_manifest(folder: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    manifest = json.loads((folder / "engine.json").read_text())
    edit(manifest)
    (folder / "engine.json").write_text(json.dumps(manifest))


def relist(folder: Path, name: str) -> None:
    """Bring the manifest's entry of a file up to date, as somebody with bad intentions would."""
    content = (folder / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_a_good_folder(folder: Path) -> None:
    model = open_folder(folder, verify_hashes=True)
    assert model.config.num_hidden_layers == 3
    assert model.precision["embedding"] == "fp32"
    assert cpmbee.Engine.from_pretrained(str(folder)).generate({"input": "a", "<ans>": ""}).answer is not None


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(cpmbee.ModelFolderError, match="no such folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"engine\.json: cannot read"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "vocab.txt", "model.onnx", "model.onnx.data", "generation_config.json"]
)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(cpmbee.ModelFolderError, match=rf"{name}: missing"):
        open_folder(folder)


def test_truncated_weights(folder: Path) -> None:
    data = folder / "model.onnx.data"
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(cpmbee.ModelFolderError, match=rf"model\.onnx\.data: {size - 100} bytes instead of {size}"):
        open_folder(folder)
    relist(folder, "model.onnx.data")
    with pytest.raises(cpmbee.ModelFolderError, match="but tensors go up to"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.onnx", "model.onnx.data"])
def test_a_wrong_hash(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(cpmbee.ModelFolderError, match=rf"{name}: altered"):
        open_folder(folder)


def test_large_files_are_hashed_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpmbee.folder.HASHED_SIZE", 10_000)
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    open_folder(folder)
    with pytest.raises(cpmbee.ModelFolderError, match="altered"):
        open_folder(folder, verify_hashes=True)


def test_a_manifest_that_is_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpmbee.json_file.MAX_FILE_BYTES", (folder / "engine.json").stat().st_size - 1)
    with pytest.raises(cpmbee.ModelFolderError, match=r"engine\.json: larger than"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", "", "c:evil", "a\\b", "a\0b"])
def test_a_manifest_that_leaves_the_folder(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(cpmbee.ModelFolderError, match="not inside the folder"):
        open_folder(folder)


def test_a_link_that_leaves_the_folder(folder: Path) -> None:
    outside = folder.with_name("outside.data")
    (folder / "model.onnx.data").rename(outside)
    (folder / "model.onnx.data").symlink_to(outside)
    with pytest.raises(cpmbee.ModelFolderError, match="leads out of the folder"):
        open_folder(folder)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname", "other.data"])
def test_a_tensor_that_lies_elsewhere(folder: Path, location: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (folder / "other.data").write_bytes(bytes(4))
    model.graph.initializer.append(external_tensor("evil", location))
    onnx.save(model, folder / "model.onnx")
    relist(folder, "model.onnx")
    with pytest.raises(cpmbee.ModelFolderError, match=r"not inside the folder|not listed"):
        open_folder(folder)


@pytest.mark.parametrize("place", ["attribute", "subgraph", "function", "sparse"])
def test_tensors_are_nowhere_but_among_the_initializers(folder: Path, place: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = external_tensor("evil", "model.onnx.data")
    constant = helper.make_node("Constant", [], ["evil"], value=tensor)
    if place == "attribute":
        model.graph.node.append(constant)
    elif place == "subgraph":
        graph = helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph))
    elif place == "function":
        model.functions[0].node.append(constant)
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    onnx.save(model, folder / "model.onnx")
    relist(folder, "model.onnx")
    with pytest.raises(
        cpmbee.ModelFolderError, match=r"model\.onnx: not an? (ONNX model|graph) that cpmbee export writes"
    ):
        open_folder(folder)


def external_tensor(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_a_field_number_that_protobuf_would_cut(folder: Path) -> None:
    tensor = external_tensor("evil", "../outside")
    plain = bytes([13 << 3 | 2])
    longer = bytes([plain[0] | 0x80, 0x80, 0x80, 0x80, 0x10])  # 2^32 more: the same field to protobuf in C++
    serialized = tensor.SerializeToString().replace(plain, longer)
    graph = bytes([5 << 3 | 2, len(serialized)]) + serialized
    with (folder / "model.onnx").open("ab") as file:
        file.write(bytes([7 << 3 | 2, len(graph)]) + graph)
    relist(folder, "model.onnx")
    with pytest.raises(cpmbee.ModelFolderError, match="Tensor has a field 536870925"):
        open_folder(folder)


def test_links_in_a_circle(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(cpmbee.ModelFolderError, match=r"vocab\.txt"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["engine.json", "config.json", "generation_config.json"])
def test_json_that_is_nested_too_deep_to_read(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 200_000)
    if name != "engine.json":
        relist(folder, name)
    with pytest.raises(cpmbee.CpmBeeError, match=rf"{name}: not JSON"):
        open_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 40, b"\x3a\xff\xff\xff\x7f" + b"a" * 10, b"not a model"])
def test_a_graph_that_is_no_onnx(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    relist(folder, "model.onnx")
    with pytest.raises(cpmbee.ModelFolderError, match=r"model\.onnx: "):
        cpmbee.Engine.from_pretrained(folder)


def test_a_graph_that_is_cut_off(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    relist(folder, "model.onnx")
    with pytest.raises(
        cpmbee.ModelFolderError, match=r"model\.onnx: not an ONNX model that cpmbee export writes, or a damaged one"
    ):
        open_folder(folder)


def test_every_prefix_of_a_graph_is_read_or_refused(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    for end in range(0, len(content), 37):
        try:
            read_model(content[:end])
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (
            lambda m: m["ops"].update(version=99),
            "version 99 of the custom ops, but this version of cpmbee knows 1 to 3",
        ),
        (lambda m: m.pop("ops"), "version None of the custom ops"),
        (lambda m: m.update(format="other"), "not the manifest"),
        (lambda m: m.update(files=[]), "files must map"),
        (lambda m: m["files"].update({"vocab.txt": {"size": "1"}}), "files must map"),
        (lambda m: m["files"].pop("model.onnx"), r"does not list model\.onnx"),
        (lambda m: m["files"].pop("model.onnx.data"), r"model\.onnx\.data is not listed"),
        (lambda m: m["cache"].update(num_heads=99), "cache is"),
        (lambda m: m.update(precision=["fp32"]), "precision must map"),
        (lambda m: m.update(source=[]), "source must have a sha256, str, not None"),
        (lambda m: m.update(quantization={"block_size": "64"}), "quantization must have a block_size, int, not '64'"),
        (lambda m: m["files"].update({"x" * 5000: m["files"]["vocab.txt"]}), "cannot be opened"),
    ],
)
def test_a_broken_manifest(folder: Path, edit: Callable[[dict], object], message: str) -> None:  # type: ignore[type-arg]
    edit_manifest(folder, edit)
    with pytest.raises(cpmbee.ModelFolderError, match=message):
        open_folder(folder)


def test_a_vocabulary_that_does_not_fit(folder: Path) -> None:
    with (folder / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("one more\n")
    relist(folder, "vocab.txt")
    with pytest.raises(cpmbee.VocabularyError, match=r"vocab\.txt: \d+ tokens, but the model has"):
        cpmbee.Engine.from_pretrained(folder)


def test_unknown_generation_defaults(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"beams": 3}')
    relist(folder, "generation_config.json")
    with pytest.raises(cpmbee.ConfigError, match=r"generation_config\.json: unknown generation option 'beams'"):
        open_folder(folder)


def test_defaults_of_the_folder_hold(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": 2}')
    relist(folder, "generation_config.json")
    engine = cpmbee.Engine.from_pretrained(folder)
    assert engine.generate({"input": "a", "<ans>": ""}).usage.completion_tokens <= 2
