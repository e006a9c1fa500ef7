"""Random checkpoints in the shapes of the published models, for measuring at real sizes.

``python -m cpmbee.bench.synthetic 2b OUT`` writes a checkpoint folder that ``cpmbee export`` reads. Weights are
normally distributed, as the model expects them (its linear layers divide by the square root of their width), so
activations neither vanish nor overflow; nothing else about them is like a trained model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.model.tensor_names import expected_tensors
from cpmbee.vocabulary import NEWLINE, REQUIRED, SPACE

Float16 = NDArray[np.float16]

LAYERS = 48
KEPT = "BFBF-F--BB-FF-B-BAF-BA--B-B--B-B-B-F---B-B--B-BB"  # B both blocks, A attention only, F feed-forward only
SIZES = {"1b": (1024, 40, KEPT), "2b": (5120, 64, KEPT), "10b": (10240, 128, "B" * LAYERS)}  # dim_ff, dim_head, blocks
HIDDEN_SIZE, NUM_HEADS, VOCAB_SIZE = 4096, 32, 86_583

BLOCK = 33_554_393  # numbers in the random block, 64 MB of fp16; the largest prime below 2^25
STRIDE = 7_368_787  # from one tensor's place in the block to the next one's
SHARD_BYTES = 5 << 30
SPECIALS = (*REQUIRED, "<sep>", NEWLINE, SPACE)
# Characters that become tokens: ASCII, then Chinese and Korean blocks until the vocabulary is full.
CHARACTERS = (
    *((0x21, 0x7E), (0x4E00, 0x9FA5), (0x3400, 0x4DB5), (0xAC00, 0xD7A3)),
    *((0x20000, 0x2A6D6), (0x2A700, 0x2B734), (0x2B820, 0x2CEA1)),
)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--layers", type=int, default=LAYERS, help="only the first ones")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    config = published_config(arguments.size, arguments.layers)
    size = write_checkpoint(config, arguments.out, arguments.seed)
    seconds = time.perf_counter() - start
    print(f"{size / 2:,.0f} parameters, {size / 1e9:.2f} GB to {arguments.out} in {seconds:.1f} s")


def published_config(size: str, layers: int = LAYERS) -> ModelConfig:
    """The configuration of a published model, or of its first ``layers`` layers."""
    dim_ff, dim_head, kept = SIZES[size]
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        dim_head=dim_head,
        dim_ff=dim_ff,
        num_hidden_layers=layers,
        half=True,
        mask_modules=None if kept == "B" * LAYERS else tuple((c not in "BA", c not in "BF") for c in kept[:layers]),
    )


def write_checkpoint(config: ModelConfig, folder: Path, seed: int = 0) -> int:
    """Write ``config.json``, ``vocab.txt`` and fp16 safetensors shards; returns the bytes of all tensors.

    Raises:
        FileExistsError: there is something called ``folder``.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict("original"), indent=2) + "\n", encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(vocabulary(config.vocab_size)) + "\n", encoding="utf-8")
    shapes = expected_tensors(config)
    shards = _shards(shapes)
    block = random_block(seed)
    weight_map: dict[str, str] = {}
    place = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        place = _write_shard(folder / file, {name: shapes[name] for name in names}, block, place)
        weight_map |= dict.fromkeys(names, file)
    total: int = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def vocabulary(size: int) -> list[str]:
    """A valid vocabulary in which one character of text is one token."""
    characters = map(chr, chain.from_iterable(range(first, last + 1) for first, last in CHARACTERS))
    tokens = [*SPECIALS, *(token for token, _ in zip(characters, range(size - len(SPECIALS)), strict=False))]
    if len(tokens) != size:
        raise ValueError(f"at most {len(tokens)} tokens can be made, not {size}")
    return tokens


def random_block(seed: int) -> Float16:
    """`BLOCK` normally distributed numbers, fp16."""
    return np.random.default_rng(seed).standard_normal(BLOCK, np.float32).astype(np.float16)


def pieces(shape: tuple[int, ...], block: Float16, place: int) -> Iterator[Float16]:
    """A tensor in flat pieces, cut out of the block from ``place`` on, round and round; ones for a norm's weight."""
    missing = math.prod(shape)
    if len(shape) == 1:
        yield np.ones(missing, np.float16)
        return
    while missing:
        piece = block[place : place + missing]
        yield piece
        missing -= len(piece)
        place = 0


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in order, in groups of at most `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    return shards


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: Float16, place: int) -> int:
    """Write one safetensors file; returns the next free place in the block."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            for piece in pieces(shape, block, place):
                file.write(piece.data)
            place = (place + STRIDE) % BLOCK
    return place


if __name__ == "__main__":
    main()
