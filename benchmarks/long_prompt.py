"""Memory of a long prompt: native attention never builds heads x tokens x tokens, function bodies do.

Run ``python -m cpmbee.bench.long_prompt``. Each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpmbee import Engine
from cpmbee.bench.environment import write_result
from cpmbee.bench.models import exported_random_model, small_config

TOKENS = 4096
HEADS = 32


def main() -> None:
    """Measure both ways, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, way = arguments.measure
        print(json.dumps(measure(folder, way, arguments.tokens)))
        return
    config = small_config(num_attention_heads=HEADS, dim_head=8, hidden_size=256, num_hidden_layers=2)
    ways = {}
    with exported_random_model(config) as model:
        for way in ("native", "function"):
            command = [sys.executable, "-m", "cpmbee.bench.long_prompt", "--measure", str(model), way]
            command += ["--tokens", str(arguments.tokens)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            ways[way] = json.loads(run.stdout)
            print(way, ways[way])
    tensor = HEADS * arguments.tokens**2 * 4 / 2**20
    print(f"one float32 tensor of heads x tokens x tokens: {tensor:.0f} MiB")
    if not arguments.no_write:
        payload = {"heads": HEADS, "layers": config.num_hidden_layers, "heads_tokens_tokens_mib": round(tensor)}
        write_result("long_prompt", {**payload, **ways})


def measure(folder: str, way: str, tokens: int) -> dict[str, Any]:
    """Prefill once; what it took beyond the loaded engine."""
    engine = Engine.from_pretrained(folder, native=way == "native", cache_tokens=tokens + 64)
    prompt = {"input": "", "<ans>": ""}
    prompt["input"] = "，。" * ((tokens - len(engine.encode(prompt))) // 2)
    engine.generate({"input": "你好", "<ans>": ""}, max_new_tokens=2)
    before = status("VmRSS")
    start = time.perf_counter()
    result = engine.generate(prompt, max_new_tokens=2)
    return {
        "prompt_tokens": result.usage.prompt_tokens,
        "kernel": engine.native_ops["BucketedAttention"],
        "seconds": round(time.perf_counter() - start, 2),
        "peak_over_loaded_mib": round((status("VmHWM") - before) / 1024, 1),
        "kept_afterwards_mib": round((status("VmRSS") - before) / 1024, 1),
    }


def status(field: str) -> int:
    """A memory field of ``/proc/self/status`` in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


if __name__ == "__main__":
    main()
