"""Prefill must not build a (heads, queries, keys) tensor: measured, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.csrc.attention_model import Shape, attention_model, open_session, requires_native

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4096
SHAPE = Shape(batch=1, queries=TOKENS, keys=TOKENS, heads=4, dim_head=16, buckets=8, rows=TOKENS + 1)


def measure_growth() -> int:
    """Bytes by which memory peaks during one prefill of TOKENS tokens."""
    rows = np.arange(1, TOKENS + 1, dtype=np.int32)[None]
    cache = np.zeros((SHAPE.rows, SHAPE.heads, SHAPE.dim_head), np.float32)
    inputs = {
        "qkv": np.ones((1, TOKENS, 3 * SHAPE.heads * SHAPE.dim_head), np.float32),
        "relation": np.zeros((1, TOKENS, TOKENS), np.int16),
        "table": np.zeros((SHAPE.buckets, SHAPE.heads), np.float32),
        "slots": rows,
        "new_slots": rows,
        "key_cache": cache,
        "value_cache": cache,
    }
    session = open_session(attention_model(SHAPE), use_native=True, threads=2)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = resident("VmRSS")
    session.run(None, inputs)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024


@requires_native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_prefill_builds_no_tensor_of_all_scores() -> None:
    code = "from tests.csrc.test_attention_memory import measure_growth; print(measure_growth())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    all_scores = SHAPE.heads * TOKENS * TOKENS * 4
    assert int(process.stdout) < all_scores / 16
