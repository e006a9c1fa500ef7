"""Rows of in-context examples: computed once, shared by every request whose encoded example is the same.

An example sees only itself, so its keys and values depend on its own arrays and on nothing else. Subscripts continue
from the request's, which is why the arrays, not the text, are the key.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpmbee.cache import KEPT, CachePool, Rows
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


@dataclass
class _Entry:
    rows: Rows
    users: int


class ExampleRows:
    """Finished examples, the least recently used first; those that nobody uses give way when rows are short."""

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        pool.on_pressure(self.give_up)

    @property
    def kept(self) -> int:
        """Rows held for examples that no request uses at the moment."""
        with self._pool.lock:
            return sum(len(entry.rows) for entry in self._entries.values() if not entry.users)

    def borrow(self, key: bytes) -> Rows | None:
        """The rows of an example, kept until `give_back`; None if it has to be computed."""
        with self._pool.lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.users += 1
            self._entries.move_to_end(key)
            return entry.rows

    def add(self, key: bytes, rows: Rows, owner: int) -> Rows:
        """Keep a computed example, borrowed by the caller, whose reservation pays for it.

        Returns:
            The rows to use: ``rows``, or those of another thread that computed the same in the meantime.
        """
        with self._pool.lock:
            known = self.borrow(key)
            if known is not None:
                self._pool.release(rows.tolist())
                self._pool.unreserve(owner, len(rows))
                return known
            self._entries[key] = _Entry(rows, 1)
            self._pool.keep(owner, len(rows))
            return rows

    def give_back(self, key: bytes) -> None:
        """End one `borrow` or `add`."""
        with self._pool.lock:
            self._entries[key].users -= 1

    def settle(self) -> None:
        """Make the books of the pool right at a moment when no request holds rows (`CachePool.settle`)."""
        with self._pool.lock:
            for entry in self._entries.values():
                entry.users = 0
            self._pool.settle([entry.rows for entry in self._entries.values()])

    def give_up(self, rows: int) -> None:
        """Free at least ``rows`` rows, or all that nobody uses."""
        with self._pool.lock:
            for key, entry in list(self._entries.items()):
                if rows <= 0:
                    break
                if not entry.users:
                    del self._entries[key]
                    self._pool.release(entry.rows.tolist())
                    self._pool.unreserve(KEPT, len(entry.rows))
                    rows -= len(entry.rows)


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
