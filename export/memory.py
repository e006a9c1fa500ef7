"""Whether a model fits into this machine's memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

from cpmbee.config import ModelConfig
from cpmbee.model.tensor_names import expected_tensors

_MEMINFO = Path("/proc/meminfo")


def fp32_bytes(config: ModelConfig) -> int:
    """Memory of the model's parameters in fp32."""
    return 4 * sum(math.prod(shape) for shape in expected_tensors(config).values())


def available_memory() -> int:
    """Bytes that programs can take without swapping."""
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
