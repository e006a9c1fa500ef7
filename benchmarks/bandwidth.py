"""How fast memory can be read: the limit of decoding, whose every step reads all weights once.

Each thread takes the maximum of its own part of one array, far larger than any cache. NumPy's maximum of integers is a
loop of vector loads and compares that one core runs faster than memory delivers, so the time is that of the reads; that
a second reduction (bitwise or) reaches about the same says that neither is limited by arithmetic. Ordinary memory
pages; pages of a mapped file in the page cache read equally fast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.machine import physical_cores

ARRAY_BYTES = 512 << 20
REPEATS = 9
REDUCTIONS: dict[str, Callable[[NDArray[np.int32]], Any]] = {"maximum": np.max, "bitwise or": np.bitwise_or.reduce}


def main() -> None:
    """Print the read bandwidth with one thread and with one for each core."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| threads | reduction | GB/s (median) | GB/s (fastest) |\n|---:|---|---:|---:|")
    for threads in sorted({1, physical_cores()}):
        for name, seconds in run_seconds(threads).items():
            median, fastest = ARRAY_BYTES / statistics.median(seconds), ARRAY_BYTES / min(seconds)
            print(f"| {threads} | {name} | {median / 1e9:.1f} | {fastest / 1e9:.1f} |")


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads read together: the median run of the better reduction."""
    return max(ARRAY_BYTES / statistics.median(seconds) for seconds in run_seconds(threads).values())


def run_seconds(threads: int) -> dict[str, list[float]]:
    """Seconds of every run of every reduction; runs of the reductions take turns."""
    array = np.ones(ARRAY_BYTES // 4, np.int32)
    parts = np.array_split(array, threads)
    seconds: dict[str, list[float]] = {name: [] for name in REDUCTIONS}
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))  # starts the threads
        for _ in range(REPEATS):
            for name, reduce in REDUCTIONS.items():
                start = time.perf_counter()
                list(pool.map(reduce, parts))
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
