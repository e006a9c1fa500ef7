"""How fast memory can be read: the limit of decoding, whose every step reads all weights once.

Each thread takes the maximum of its own part of one array, far larger than any cache. NumPy's maximum of integers is a
loop of vector loads and compares that one core runs faster than memory delivers, so the time is that of the reads; that
a second reduction (bitwise or) reaches about the same says that neither is limited by arithmetic.

The array lies in ordinary memory, which NumPy asks the system to keep in huge pages. Weights lie in a mapped file, and
its pages are read some percent slower: with a file, that is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.machine import physical_cores

ARRAY_BYTES = 256 << 20
REPEATS = 25  # of each reduction; together a quarter of a second, more or less
REDUCTIONS: dict[str, Callable[[NDArray[np.int32]], Any]] = {"maximum": np.max, "bitwise or": np.bitwise_or.reduce}


def main() -> None:
    """Print, as JSON, bytes per second for each number of threads on the command line; of a file, if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("threads", type=int, nargs="*", help="that read at a time; one, and one for each core")
    parser.add_argument("--file", type=Path, help="read the beginning of this file instead of ordinary memory")
    arguments = parser.parse_args()
    array = mapped_file(arguments.file) if arguments.file else ordinary_memory()
    threads = arguments.threads or sorted({1, physical_cores()})
    print(json.dumps({count: read_bandwidth(count, array) for count in threads}))


def read_bandwidth(threads: int, array: NDArray[np.int32] | None = None) -> float:
    """Bytes per second that ``threads`` threads read together: the median run of the better reduction.

    Args:
        threads: that read at a time.
        array: what they read; ordinary memory unless given.
    """
    array = ordinary_memory() if array is None else array
    return max(array.nbytes / statistics.median(seconds) for seconds in _run_seconds(array, threads).values())


def ordinary_memory() -> NDArray[np.int32]:
    """An array that is in memory, all of it."""
    return np.ones(ARRAY_BYTES // 4, np.int32)


def mapped_file(path: Path) -> NDArray[np.int32]:
    """The beginning of a file, mapped."""
    count = min(ARRAY_BYTES, path.stat().st_size) // 4
    return np.asarray(np.memmap(path, np.int32, "r", shape=(count,)))


def _run_seconds(array: NDArray[np.int32], threads: int) -> dict[str, list[float]]:
    """Seconds of every run of every reduction; runs of the reductions take turns."""
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
