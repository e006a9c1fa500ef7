"""The pool of token rows that holds keys and values: who was promised how many, and which are free.

A sequence is a list of rows, so beams and requests share rows without copying anything. Row 0 is scratch: padding
reads and writes there, and nobody owns it. A request reserves the most it can come to need before it runs; taking
single rows inside a reservation cannot fail.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from cpmbee.errors import CacheFullError

Rows = npt.NDArray[np.int32]
PATIENCE = 1.0  # seconds of waiting for rows before it is worth looking for garbage
KEPT = 0  # the owner of rows that are kept for later requests and can be given up


class CachePool:
    """Book-keeping of cache rows; the buffers themselves belong to the backend.

    Safe to use from several threads.

    Attributes:
        capacity: rows that can be handed out (row 0 is not one of them).
        lock: held while reservations change; re-entrant.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._free = list(range(capacity, 0, -1))  # low rows first, so that untouched memory stays untouched
        self._reserved: Counter[int] = Counter()  # owner -> rows; an owner is a thread, or KEPT
        self._waiting: dict[int, int] = {}  # owner -> rows that it waits for
        self._evict: Callable[[int], None] | None = None

    @property
    def used(self) -> int:
        """Rows that somebody holds."""
        return self.capacity - len(self._free)

    @property
    def reserved(self) -> int:
        """Rows that are promised, in use or not."""
        return self._reserved.total()

    def on_pressure(self, evict: Callable[[int], None]) -> None:
        """Set the function that gives up to n kept rows back when a reservation does not fit."""
        self._evict = evict

    def check(self, rows: int) -> None:
        """Raise `CacheFullError` if a request of ``rows`` would not fit even in an empty pool."""
        if rows > self.capacity:
            raise CacheFullError(
                f"the request needs {rows} cache rows (prompt, and answer budget of every beam) and there are "
                f"{self.capacity}; shorten it, lower max_new_tokens, or load the engine with cache_tokens={rows}"
            )

    def reserve(self, rows: int) -> int | None:
        """Promise rows to the calling thread, giving up kept rows if it takes that.

        Returns:
            The owner to name in `unreserve`, or None when there is no room now.

        Raises:
            CacheFullError: there never will be.
        """
        self.check(rows)
        owner = threading.get_ident()
        with self.lock:
            missing = self.reserved + rows - self.capacity
            if missing > 0 and self._evict is not None:
                self._evict(missing)
            if self.reserved + rows > self.capacity:
                return None
            self._reserved[owner] += rows
        return owner

    def wait(self, rows: int) -> None:
        """Block until promises are taken back; for a caller who has held `lock` since ``rows`` found no room.

        Raises:
            CacheFullError: waiting would be for ever, because whoever holds rows waits for some, too.
        """
        owner = threading.get_ident()
        self._waiting[owner] = rows
        try:
            room = self.capacity - self.reserved
            holders = [holder for holder, held in self._reserved.items() if held and holder != KEPT]
            if all(self._waiting.get(holder, 0) > room for holder in holders):
                raise CacheFullError(
                    f"the request needs {rows} cache rows and {room} of {self.capacity} are free; "
                    "finish or close the streams that hold the others"
                )
            if not self._changed.wait(PATIENCE):
                gc.collect()  # rows may belong to a stream that nobody can reach, but that a reference cycle keeps
        finally:
            del self._waiting[owner]

    def keep(self, owner: int, rows: int) -> None:
        """Turn a part of a reservation into rows that are kept for later requests."""
        with self.lock:
            self._reserved[owner] -= rows
            self._reserved[KEPT] += rows

    def unreserve(self, owner: int, rows: int) -> None:
        """Take back a promise."""
        with self._changed:
            self._reserved[owner] -= rows
            if not self._reserved[owner]:
                del self._reserved[owner]
            self._changed.notify_all()

    def settle(self, kept: Sequence[Rows]) -> None:
        """Make the books right at a moment when nobody holds rows but those that are kept.

        They are wrong after an interrupt between two lines of book-keeping: rows that were taken and belong to nobody,
        promises that nobody takes back.
        """
        with self._changed:
            count = sum(map(len, kept))
            if self.used == count == self.reserved:
                return
            held = {row for rows in kept for row in rows.tolist()}
            self._free = [row for row in range(self.capacity, 0, -1) if row not in held]
            self._reserved = Counter({KEPT: count})
            self._changed.notify_all()

    def take(self) -> int:
        """One row of the caller's reservation."""
        return self._free.pop()  # atomic, and a reservation guarantees that there is one

    def take_many(self, count: int) -> Rows:
        """``count`` rows of the caller's reservation."""
        return np.array([self._free.pop() for _ in range(count)], np.int32)

    def release(self, rows: Iterable[int]) -> None:
        """Give rows back; each must be held."""
        self._free.extend(rows)
