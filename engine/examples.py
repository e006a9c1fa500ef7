"""Rows of in-context examples: computed once, shared by every request whose encoded example is the same.

An example sees only itself, so its keys and values depend on its own arrays and on nothing else. Subscripts continue
from the request's, which is why the arrays, not the text, are the key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpmbee.cache import CachePool, Lease
from cpmbee.encoding import Prompt


@dataclass(frozen=True)
class Example:
    """One in-context example of an encoded request.

    Attributes:
        key: its arrays, as bytes.
        indices: where its tokens are in the prompt.
    """

    key: bytes
    indices: npt.NDArray[np.int64]


class ExampleRows:
    """Finished examples, the least recently used first; those that nobody uses give way when rows are short."""

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        self._leases: OrderedDict[bytes, Lease] = OrderedDict()
        pool.on_pressure(self.give_up)

    @property
    def kept(self) -> int:
        """Rows held for examples that no request uses at the moment."""
        with self._pool.lock:
            used = self._used()
            return sum(len(lease.rows) for lease in self._leases.values() if lease.valid and lease not in used)

    def get(self, key: bytes) -> Lease | None:
        """The rows of an example, for a request that reserves its own before `lock` is released; None if unknown."""
        with self._pool.lock:
            lease = self._leases.get(key)
            if lease is None:
                return None
            if not lease.valid:  # an interrupt came before it was kept, or before it was forgotten
                del self._leases[key]
                return None
            self._leases.move_to_end(key)
            return lease

    def add(self, key: bytes, lease: Lease) -> Lease:
        """Keep a computed example.

        Returns:
            The rows to use: those of ``lease``, or of another thread that computed the same in the meantime.
        """
        with self._pool.lock:
            known = self.get(key)
            if known is not None:
                return known
            self._leases[key] = lease
            lease.keep()
            return lease

    def give_up(self, rows: int, needed: Sequence[Lease]) -> None:
        """Free at least ``rows`` rows, or all that nobody uses or needs."""
        with self._pool.lock:
            used = self._used().union(needed)
            for key, lease in list(self._leases.items()):
                if rows <= 0:
                    break
                if lease not in used:
                    rows -= len(lease.rows)
                    lease.close()  # first: one that is in no list any more must not be valid
                    del self._leases[key]

    def _used(self) -> set[Lease]:
        return {shared for lease in self._pool.leases() for shared in lease.shared}


def examples_of(prompt: Prompt) -> list[Example]:
    """The examples of a prompt, in order."""
    found = []
    for sample in range(1, prompt.num_samples):
        (indices,) = np.nonzero(prompt.sample_ids == sample)
        first = indices[0]
        size = int(prompt.num_segments[first]) ** 2
        offset = int(prompt.rel_offset[first])
        arrays = (
            prompt.input_ids[indices],
            prompt.input_subs[indices],
            prompt.segment_ids[indices],
            prompt.segment_rel[offset : offset + size],
        )
        key = len(indices).to_bytes(4, "little") + b"".join(array.tobytes() for array in arrays)
        found.append(Example(key, indices))
    return found
