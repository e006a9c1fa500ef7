"""The rows of the cache: who holds which, derived anew from those who are alive whenever somebody asks for more.

A sequence is a list of rows, so beams and requests share rows without copying anything. Row 0 is scratch: padding
reads and writes there, and nobody owns it. A request leases the most rows it can come to need before it runs; taking
single rows of a lease cannot fail.

No count of free rows is kept. What is free is what no valid lease holds, and a lease is valid as long as it is open
and the task that it belongs to is alive, so that nothing can be lost or given to two by an interrupt between two lines
of book-keeping: there are none. ``docs/interrupts.md`` has the protocol.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpmbee.errors import CacheFullError, InferenceError
from cpmbee.forks import fork_count

Rows = npt.NDArray[np.int32]
NO_ROWS: Rows = np.empty(0, np.int32)


class Owner(Protocol):
    """Whom a lease belongs to; see `cpmbee.task.Task`."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody will use its rows any more; once true, true for ever."""

    @property
    def driven(self) -> bool:
        """Whether a thread is at work on it."""

    @property
    def driver(self) -> int:
        """Which one."""

    def help(self) -> None:
        """Carry it on by a step, so that its rows come back."""


class Lease:
    """Cache rows of one request, or of one example, until it is closed or its owner is gone.

    Attributes:
        rows: (size,) all of them, ascending.
        shared: leases of examples whose rows the request uses, too.
    """

    __slots__ = ("__weakref__", "_free", "owner", "rows", "shared")

    def __init__(self, rows: Rows, owner: weakref.ref[Owner], shared: Sequence[Lease]) -> None:
        self.rows = rows
        self.shared = shared
        self.owner: weakref.ref[Owner] | None = owner
        self._free: list[int] = rows[::-1].tolist()  # low rows first, so that untouched memory stays untouched

    @property
    def valid(self) -> bool:
        """Whether the rows are held; once false, false for ever."""
        if not len(self.rows):
            return False
        if self.owner is None:
            return True
        owner = self.owner()
        return owner is not None and not owner.abandoned

    @property
    def used(self) -> int:
        """Rows that have been taken."""
        return len(self.rows) - len(self._free)

    def take(self) -> int:
        """One of the rows."""
        return self._free.pop()

    def take_many(self, count: int) -> Rows:
        """``count`` of the rows."""
        return np.array([self._free.pop() for _ in range(count)], np.int32)

    def give_back(self, rows: Iterable[int]) -> None:
        """Make rows free to be taken from this lease once more; each must have been taken."""
        self._free.extend(rows)

    def keep(self) -> None:
        """Belong to nobody: valid until it is closed or nobody refers to it."""
        self.owner = None

    def close(self) -> None:
        """Let go of all rows."""
        self.rows = NO_ROWS

    def check(self) -> None:
        """Raise `InferenceError` if the rows that can be taken are not rows of this lease, once each."""
        free = set(self._free)
        if len(self.rows) and (len(free) != len(self._free) or not free.issubset(self.rows.tolist())):
            raise InferenceError("the cache is damaged: a row can be taken twice")


class CachePool:
    """Leases of cache rows; the buffers themselves belong to the backend. Safe to use from several threads.

    Attributes:
        capacity: rows that can be handed out (row 0 is not one of them).
        lock: held while leases are made; re-entrant.
        changes: how often rows were leased or came back, about.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.RLock()
        self._leases: list[weakref.ref[Lease]] = []
        self._bells: dict[int, SimpleQueue[None]] = {}  # of threads that wait
        self.changes = 0
        self._evict: Callable[[int, Sequence[Lease]], None] | None = None
        self._forks = fork_count()

    @property
    def forked(self) -> bool:
        """Whether this process was forked after the model was loaded.

        Threads of the parent, ONNX Runtime's among them, do not exist there, and locks may be held for ever.
        """
        return self._forks != fork_count()

    def check_process(self) -> None:
        """Raise `InferenceError` where the process was forked."""
        if self.forked:
            raise InferenceError(
                "the model was loaded before this process was forked; load it in the child, or start processes with "
                "the method 'spawn'"
            )

    def leases(self) -> list[Lease]:
        """Those that are valid."""
        with self.lock:
            valid = [lease for ref in self._leases if (lease := ref()) is not None and lease.valid]
            self._leases = [weakref.ref(lease) for lease in valid]
        return valid

    def on_pressure(self, evict: Callable[[int, Sequence[Lease]], None]) -> None:
        """Set the function that gives up n kept rows, but none of the given leases, when a reservation does not fit."""
        self._evict = evict

    @property
    def used(self) -> int:
        """Rows that have been taken, those that are kept among them."""
        return sum(lease.used for lease in self.leases())

    def check(self, rows: int) -> None:
        """Raise `CacheFullError` if a request of ``rows`` would not fit even in an empty pool."""
        if rows > self.capacity:
            raise CacheFullError(
                f"the request needs {rows} cache rows (prompt, and answer budget of every beam) and there are "
                f"{self.capacity}; shorten it, lower max_new_tokens, or load the engine with cache_tokens={rows}"
            )

    def reserve(self, sizes: Sequence[int], owner: Owner, shared: Sequence[Lease] = ()) -> list[Lease] | None:
        """Lease rows, all or none, giving up kept rows if it takes that.

        Args:
            sizes: rows of each lease.
            owner: whom they belong to.
            shared: leases of examples that the first of them uses; they are not given up.

        Returns:
            A lease for each size, or None when there is no room now.

        Raises:
            CacheFullError: there never will be.
        """
        wanted = sum(sizes)
        self.check(wanted)
        with self.lock:
            free = self._free_rows()
            if len(free) < wanted and self._evict is not None:
                self._evict(wanted - len(free), shared)
                free = self._free_rows()
            if len(free) < wanted:
                return None
            reference = weakref.ref(owner)
            ends = np.cumsum(sizes).tolist()
            parts = [free[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            made = [Lease(rows, reference, () if i else shared) for i, rows in enumerate(parts)]
            self._leases += map(weakref.ref, made)
            self.changes += 1
        return made

    def _free_rows(self) -> Rows:
        free = np.ones(self.capacity + 1, bool)
        free[0] = False
        for lease in self.leases():
            free[lease.rows] = False
        return np.flatnonzero(free).astype(np.int32)

    def owners(self) -> list[Owner]:
        """Those who hold rows, each once, the first to have leased some first."""
        owners: dict[int, Owner] = {}
        for lease in self.leases():
            owner = None if lease.owner is None else lease.owner()
            if owner is not None:
                owners.setdefault(id(owner), owner)
        return list(owners.values())

    def pause(self, seconds: float) -> None:
        """Wait until rows may have come back, but no longer than ``seconds``."""
        thread = threading.get_ident()
        # Not a condition or an event, whose functions are Python and leave locks held when they are interrupted.
        bell: SimpleQueue[None] = SimpleQueue()
        try:
            self._bells[thread] = bell
            bell.get(timeout=seconds)
        except Empty:
            pass
        finally:
            self._bells.pop(thread, None)

    def waits(self, thread: int) -> bool:
        """Whether a thread is in `pause`, or is the one that asks."""
        return thread == threading.get_ident() or thread in self._bells

    def ring(self) -> None:
        """Tell those who wait that rows may have come back."""
        self.changes += 1
        for bell in list(self._bells.values()):
            bell.put(None)

    def audit(self) -> None:
        """Raise `InferenceError` unless every row is free, or held by exactly one lease."""
        with self.lock:
            held = np.zeros(self.capacity + 1, np.int64)
            for lease in self.leases():
                lease.check()
                held[lease.rows] += 1
        if held[0] or held.max(initial=0) > 1:
            raise InferenceError("the cache is damaged: a row belongs to two requests")
