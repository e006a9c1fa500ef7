"""``cpmbee merge``: a checkpoint and a LoRA delta in, a checkpoint out."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "cpmbee merge", description="Add a LoRA delta to the weights of a checkpoint and write the sum as a new one."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder, weight file or shard index of the base model")
    add("delta", type=Path, metavar="DELTA", help="delta file, or the folder of an OpenDelta delta or PEFT adapter")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--lora-alpha", type=float, metavar="ALPHA", help="the delta's alpha, if no configuration beside it says so")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the tensors (those of the checkpoint)")
    add("--dialect", choices=("huggingface", "original"), default="huggingface", help="of names (huggingface)")
    add("--format", choices=("safetensors", "bin"), default="safetensors", help="of weight files (safetensors)")
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    arguments = parser.parse_args(argv)
    import torch

    from cpmbee.model import open_checkpoint, read_lora
    from cpmbee.model.merging import merge_checkpoint

    changed = merge_checkpoint(
        open_checkpoint(arguments.checkpoint),
        read_lora(arguments.delta, arguments.lora_alpha),
        arguments.out,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        dialect=arguments.dialect,
        file_format=arguments.format,
        overwrite=arguments.overwrite,
    )
    print(f"merged the deltas of {changed} matrices into {arguments.out}")
    return 0
