"""The engine on caches of every type: memory, answers, and folders that earlier versions wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path

import onnx
import pytest

import cpmbee
from cpmbee import native
from cpmbee.cache_types import CACHE_TYPES, CacheArrays, CacheType
from cpmbee.export.exporter import export
from cpmbee.folder import open_folder
from cpmbee.session import OrtBackend

REQUESTS = [{"input": "今天天气真好", "<ans>": ""}, {"document": "我们去公园", "question": "去哪", "<ans>": ""}]
NUMBER_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


@pytest.fixture(scope="module")
def folder_of(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[CacheType], Path]:
    """The small checkpoint with a cache of a type; each exported once."""

    @cached
    def exported(cache: CacheType) -> Path:
        out = tmp_path_factory.mktemp(cache) / "exported"
        export(small_checkpoint, out, cache=cache, verify=False)
        return out

    return exported


def edited_copy(folder: Path, tmp_path: Path, section: str, changes: dict[str, object]) -> Path:
    """A folder whose manifest says something else."""
    copy = Path(shutil.copytree(folder, tmp_path / "folder"))
    manifest = json.loads((copy / "engine.json").read_text())
    manifest[section] |= changes
    (copy / "engine.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_memory(folder_of: Callable[[CacheType], Path], cache: CacheType) -> None:
    backend = OrtBackend(open_folder(folder_of(cache)), num_threads=1, cache_tokens=99)
    config = backend.config
    head = config.dim_head * NUMBER_BYTES[cache] + (4 if cache == "int8" else 0)
    assert backend.cache_bytes == 100 * 2 * len(config.attention_layers) * config.num_attention_heads * head


@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("use_native", [False] if native.library_path() is None else [False, True])
def test_answers(folder_of: Callable[[CacheType], Path], cache: CacheType, use_native: bool) -> None:
    """Alone, together, with beams and after many others, which leave their numbers in the rows."""
    engine = cpmbee.Engine.from_pretrained(folder_of(cache), num_threads=1, cache_tokens=200, native=use_native)
    exact = cpmbee.Engine.from_pretrained(folder_of("fp32"), num_threads=1, native=use_native)
    expected = [exact.generate(request, max_new_tokens=6).answer for request in REQUESTS]
    for _ in range(3):
        assert [engine.generate(request, max_new_tokens=6).answer for request in REQUESTS] == expected
        assert [result.answer for result in engine.generate(REQUESTS, max_new_tokens=6)] == expected
        engine.generate(REQUESTS, beam_size=4, max_new_tokens=6)


def test_a_folder_of_an_earlier_version(folder_of: Callable[[CacheType], Path], tmp_path: Path) -> None:
    """Its cache is fp32, its ops are a part of today's."""
    copy = edited_copy(folder_of("fp32"), tmp_path, "ops", {"version": 1})
    assert open_folder(copy).cache == "fp32"
    assert cpmbee.Engine.from_pretrained(copy, num_threads=1).generate(REQUESTS[0], max_new_tokens=2).answer is not None


def test_a_cache_that_nobody_knows(folder_of: Callable[[CacheType], Path], tmp_path: Path) -> None:
    copy = edited_copy(folder_of("fp32"), tmp_path, "cache", {"dtype": "int4"})
    with pytest.raises(cpmbee.ModelFolderError, match=r"asks for .*float32 or float16 or int8"):
        open_folder(copy)


def test_a_graph_without_the_scales_that_its_manifest_promises(
    folder_of: Callable[[CacheType], Path], tmp_path: Path
) -> None:
    copy = edited_copy(folder_of("fp32"), tmp_path, "cache", {"dtype": "int8"})
    with pytest.raises(cpmbee.ModelFolderError, match=r"the graph has no input key_scales\.0"):
        OrtBackend(open_folder(copy), num_threads=1)


def test_a_graph_whose_cache_nothing_can_hold(folder_of: Callable[[CacheType], Path], tmp_path: Path) -> None:
    name = "model.onnx"
    model = onnx.load(folder_of("fp32") / name, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if "key_cache" in value.name:
            for size in value.type.tensor_type.shape.dim[1:]:
                size.dim_value = 1 << 40
    content = model.SerializeToString()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    copy = edited_copy(folder_of("fp32"), tmp_path, "files", {name: entry})
    (copy / name).write_bytes(content)
    with pytest.raises(cpmbee.ModelFolderError, match=r"input key_cache\.0 is declared as"):
        open_folder(copy)


def test_no_memory_for_the_cache(folder_of: Callable[[CacheType], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: CacheArrays, rows: int) -> None:
        raise MemoryError

    monkeypatch.setattr("cpmbee.cache_types.CacheArrays.zeros", no_memory)
    with pytest.raises(cpmbee.CacheFullError, match="no memory for a cache of 99 tokens"):
        OrtBackend(open_folder(folder_of("fp32")), num_threads=1, cache_tokens=99)
