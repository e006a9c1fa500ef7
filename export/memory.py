"""Whether a model fits into this machine's memory."""

from __future__ import annotations

import math
from pathlib import Path

from cpmbee.config import ModelConfig
from cpmbee.machine import physical_memory
from cpmbee.model.tensor_names import expected_tensors

_MEMINFO = Path("/proc/meminfo")


def fp32_bytes(config: ModelConfig) -> int:
    """Memory of the model's parameters in fp32."""
    return 4 * sum(math.prod(shape) for shape in expected_tensors(config).values())


def available_memory() -> int:
    """Bytes that this process can take without swapping; a guess where the system does not say."""
    limit = physical_memory()
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(limit, int(line.split()[1]) * 1024)
    return limit // 2
