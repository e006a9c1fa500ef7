"""Opening checkpoints: every dialect and format, and every way in which one can be wrong."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.model import CpmBee, load_model, open_checkpoint
from tests.model.factory import random_model, tensors_of, tiny_config, write_checkpoint

FIRST = "encoder.layers.0.self_att.layernorm_before_attention.weight"
EMBEDDING = "input_embedding.weight"
QUERY = "encoder.layers.1.self_att.self_attention.project_q.weight"

State = dict[str, torch.Tensor]


def state_of(model: CpmBee | None = None, prefix: str = "") -> State:
    return {prefix + name: tensor.clone() for name, tensor in (model or random_model()).state_dict().items()}


def write_state(folder: Path, state: Any, file: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file, **options)
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict("original")), encoding="utf-8")
    return folder


def write_sharded(folder: Path, state: State, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards; ``weight_map`` replaces entries of the index."""
    names = list(state)
    shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for shard, members in shards.items():
        write_state(folder, {name: state[name] for name in members}, shard)
    index = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**index, **(weight_map or {})}}), encoding="utf-8"
    )
    return folder


def assert_opens_as(path: Path, model: CpmBee) -> None:
    checkpoint = open_checkpoint(path)
    expected = tensors_of(model)
    assert set(checkpoint.names()) == set(expected)
    for name in checkpoint.names():
        array = checkpoint.read(name)
        assert array.shape == checkpoint.shape(name)
        assert array.dtype == checkpoint.dtype(name)
        np.testing.assert_array_equal(array.astype(np.float32), expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "cpmbee."])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "finetuned.pt"])
def test_dialects_formats_and_dtypes(tmp_path: Path, file: str, prefix: str, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    folder = write_state(tmp_path, state_of(model, prefix), file)
    assert_opens_as(folder, model)
    assert_opens_as(folder / file, model)
    loaded = load_model(folder, dtype)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert parameter.requires_grad
    assert not loaded.training
    assert load_model(folder).input_embedding.weight.dtype == torch.float32


def test_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    model = random_model()
    for file in ("pytorch_model.bin", "model.safetensors"):
        path = write_state(tmp_path / file, state_of(model), file) / file
        loaded = load_model(path)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert torch.equal(loaded.input_embedding.weight, model.input_embedding.weight)


def test_torch_files_of_the_old_format_and_views(tmp_path: Path) -> None:
    model = random_model()
    state = state_of(model)
    state[QUERY] = state[QUERY].T.contiguous().T  # as a transposed view
    assert_opens_as(write_state(tmp_path, state, _use_new_zipfile_serialization=False), model)


def test_sharded(tmp_path: Path) -> None:
    model = random_model()
    folder = write_sharded(tmp_path, state_of(model, "cpmbee."))
    assert_opens_as(folder, model)
    assert_opens_as(folder / "model.safetensors.index.json", model)
    assert [file.name for file in open_checkpoint(folder).files] == ["a.safetensors", "b.safetensors"]


def test_vocabulary_beside_the_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    assert open_checkpoint(folder).vocab_file == folder / "vocab.txt"
    (folder / "vocab.txt").unlink()
    assert open_checkpoint(folder).vocab_file is None


def test_configuration_given_instead_of_read(tmp_path: Path) -> None:
    folder = write_state(tmp_path, state_of())
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: cannot read"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, tiny_config()).config == tiny_config()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_tied_head(tmp_path: Path, file: str) -> None:
    model = random_model()
    state = state_of(model, "cpmbee.")
    state["lm_head.weight"] = state["cpmbee." + EMBEDDING].clone()
    assert_opens_as(write_state(tmp_path, state, file), model)
    for wrong in (state["lm_head.weight"] + 1, state["lm_head.weight"][1:].clone(), state["lm_head.weight"].half()):
        state["lm_head.weight"] = wrong
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from input_embedding\.weight"):
            open_checkpoint(write_state(tmp_path, state, file))


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("prefix", [*PREFIXES, "module.cpmbee."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str, file: str) -> None:
    model = random_model()
    state = state_of(model, prefix)
    assert_opens_as(write_state(tmp_path, state, file), model)
    state[prefix.removesuffix("cpmbee.") + "lm_head.weight"] = state[prefix + EMBEDDING].clone()
    assert_opens_as(write_state(tmp_path, state, file), model)
    state[QUERY] = state.pop(prefix + QUERY)  # a name without it: which is right, nobody knows
    with pytest.raises(CheckpointError, match=r"missing .*unexpected|missing .* more"):
        open_checkpoint(write_state(tmp_path, state, file))


def test_prefixes_over_several_files(tmp_path: Path) -> None:
    model = random_model()
    assert_opens_as(write_sharded(tmp_path, state_of(model, "module.")), model)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_state_dicts_below_a_usual_name(tmp_path: Path, wrapper: str, zipped: bool, protocol: int) -> None:
    model = random_model(dtype=torch.float16)
    optimizer = torch.optim.AdamW(random_model().parameters(), lr=1e-3)
    optimizer.zero_grad()
    others = {
        "epoch": 3,
        "best": (0.5, None, True, -7, 1 << 80),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "shape": torch.Size([3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "seen": {1, 2},
    }
    saved = {wrapper: model.state_dict(), **others}
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    assert_opens_as(write_state(tmp_path, saved, **options), model)


def test_parameters_and_models_own_state_dicts(tmp_path: Path) -> None:
    model = random_model()
    assert_opens_as(write_state(tmp_path, dict(model.named_parameters())), model)
    assert_opens_as(write_state(tmp_path, model.state_dict()), model)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("rows", [1, 27, 64])
def test_rows_of_the_embedding_behind_the_vocabulary_are_left_out(
    tmp_path: Path, rows: int, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model()
    state = state_of(model)
    padding = torch.full((rows, state[EMBEDDING].shape[1]), 9.0)
    state[EMBEDDING] = torch.cat([state[EMBEDDING], padding])
    assert_opens_as(write_state(tmp_path, state, file), model)
    assert f"left out the embedding's last {rows} rows" in caplog.text
    assert torch.equal(load_model(tmp_path).input_embedding.weight, model.input_embedding.weight)
    state["lm_head.weight"] = torch.cat([state[EMBEDDING][:-rows], padding + 1])
    assert_opens_as(write_state(tmp_path, state, file), model)
    state["lm_head.weight"][0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_checkpoint(write_state(tmp_path, state, file))
    del state["lm_head.weight"]
    for wrong in (state[EMBEDDING][: -rows - 1], state[EMBEDDING][:, 1:], state[EMBEDDING].T):
        with pytest.raises(CheckpointError, match=r"input_embedding\.weight has shape"):
            open_checkpoint(write_state(tmp_path, {**state, EMBEDDING: wrong.contiguous()}, file))


def test_an_exported_model_is_called_that(tmp_path: Path) -> None:
    for name in ("engine.json", "model.onnx", "config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    for path in (tmp_path, tmp_path / "model.onnx", tmp_path / "engine.json"):
        with pytest.raises(CheckpointError, match="a model that cpmbee export wrote, not a checkpoint"):
            open_checkpoint(path)


def test_what_cannot_be_opened_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 5000), tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value).isprintable()


def change(state: State, what: str) -> None:
    if what == "missing":
        del state[QUERY]
    elif what == "unexpected":
        state["encoder.layers.9.ffn.ffn.w_out.weight"] = torch.zeros(2, 2)
    elif what == "has shape":
        state[QUERY] = state[QUERY].T.contiguous()
    elif what == "dtype":
        state[QUERY] = state[QUERY].to(torch.int8)
    elif what == "there twice":
        state["cpmbee." + QUERY] = state[QUERY].clone()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("what", ["missing", "unexpected", "has shape", "dtype", "there twice"])
def test_tensors_that_do_not_fit(tmp_path: Path, what: str, file: str) -> None:
    state = state_of()
    change(state, what)
    name = r"encoder\.layers\.9" if what == "unexpected" else r"encoder\.layers\.1\S*project_q\.weight"
    with pytest.raises(CheckpointError, match=f"(?s)(?=.*{what}).*{name}") as caught:
        open_checkpoint(write_state(tmp_path, state, file))
    assert "\n" not in str(caught.value)


def test_all_problems_are_counted(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in state_of().items() if "layers.0" not in name}
    with pytest.raises(CheckpointError, match=r"missing .*layers\.0.*; and 4 more"):
        open_checkpoint(write_state(tmp_path, state))


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("pytorch_model.bin", {}),
        ("pytorch_model.bin", {"_use_new_zipfile_serialization": False}),
        ("model.safetensors", {}),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, options: dict[str, Any]) -> None:
    path = write_state(tmp_path, state_of(), file, **options) / file
    whole = path.read_bytes()
    damaged = [whole[:-1000], whole[: len(whole) // 2], whole[:100], whole[:3], b"", b"\0" * 4000, b"PK\x03\x04" * 99]
    if file.endswith(".safetensors"):
        damaged += [whole + b"\0", (1 << 62).to_bytes(8, "little") + whole[8:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=file) as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)


def test_header_that_promises_more_than_the_file_has(tmp_path: Path) -> None:
    for entry in (
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
    ):
        header = json.dumps({EMBEDDING: entry}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
            open_checkpoint(tmp_path, tiny_config())


class RunsCode:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path, {**state_of(), "extra": RunsCode()})
    with pytest.raises(CheckpointError, match="refused because loading them can run code"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(), 2))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"optimizer": {"a": torch.zeros(1)}}, "'optimizer' is a dict"),
        ({"model": {"state_dict": {"a": torch.zeros(1)}}}, "'state_dict' is a dict"),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {}}, "has a dict in each of state_dict, model"),
        ({3: torch.zeros(1)}, "3 is a"),
        ({"a": torch.zeros(1, device="meta")}, "a was saved without its data"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "a holds fewer numbers than its shape"),
    ],
)
def test_torch_files_of_other_content(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_state(tmp_path, content))


def test_names_of_several_lines_are_shown_in_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected a\\nb$"):
        open_checkpoint(write_state(tmp_path, {**state_of(), "a\nb": torch.zeros(1)}))


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/abs/a.safetensors",
        "x/../a.safetensors",
        "..",
        "",
        "a\\b.bin",
        "c:a.bin",
        "a.txt",
        3,
        None,
        "天" * 100 + ".bin",
    ],
)
def test_shards_stay_in_their_folder(tmp_path: Path, shard: Any) -> None:
    write_sharded(tmp_path, state_of(), {QUERY: shard})
    with pytest.raises(CheckpointError, match=r"project_q\.weight is not a weight file's name in this folder"):
        open_checkpoint(tmp_path)


def test_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, state_of(), {FIRST: "b.safetensors", "nowhere": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"nowhere is not in b\.safetensors") as caught:
        open_checkpoint(tmp_path)
    assert f"{FIRST} is not in b.safetensors" in str(caught.value)
    assert f"a.safetensors holds {FIRST}, which the index does not name" in str(caught.value)
    write_sharded(tmp_path, state_of(), {QUERY: "absent.safetensors"})
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        open_checkpoint(tmp_path)
    for content in ("{", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(tmp_path)


def test_an_index_of_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    write_sharded(tmp_path, state_of(), {f"w{i}": f"{i}.safetensors" for i in range(1 << 16)})
    with pytest.raises(CheckpointError, match=r"names 655\d\d tensors; a checkpoint has at most 65536"):
        open_checkpoint(tmp_path)


def test_a_shard_that_git_lfs_has_not_fetched_is_called_that(tmp_path: Path) -> None:
    write_sharded(tmp_path, state_of())
    (tmp_path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: a git-lfs pointer, not a .*git lfs pull"):
        open_checkpoint(tmp_path)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)
    write_state(tmp_path, state_of(), "one.pt")
    write_state(tmp_path, state_of(), "two.pt")
    with pytest.raises(CheckpointError, match=r"several weight files \(one\.pt; two\.pt\)"):
        open_checkpoint(tmp_path)


def test_checkpoints_are_read_without_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "safe", random_model(dtype=torch.bfloat16))
    write_checkpoint(tmp_path / "torch", file_format="bin")
    code = """
import sys
sys.modules["torch"] = None
import cpmbee.model
from cpmbee.errors import DependencyError
from cpmbee.model import load_model, open_checkpoint
for path in sys.argv[1:]:
    checkpoint = open_checkpoint(path)
    assert sum(checkpoint.read(name).astype("f4").size for name in checkpoint.names()) > 0
for call in (load_model, lambda _: cpmbee.model.CpmBee):
    try:
        call(sys.argv[2])
    except DependencyError as error:
        assert "needs torch: pip install" in str(error), error
    else:
        raise AssertionError(call)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "safe"), str(tmp_path / "torch")]
    subprocess.run(command, check=True, timeout=60)
