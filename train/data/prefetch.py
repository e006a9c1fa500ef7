"""Making batches beside the training step, in a thread that stays a few batches ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_SECONDS = 0.1


class Prefetcher(Generic[Item]):
    """Calls a function again and again in a thread and keeps what it returns until somebody asks.

    Args:
        make: makes the next item; called from one thread only.
        depth: how many items may wait.
    """

    def __init__(self, make: Callable[[], Item], depth: int) -> None:
        self._make = make
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpmbee-batches", daemon=True)
        self._thread.start()

    def get(self) -> Item:
        """The next item; waits for it.

        Raises:
            Exception: what ``make`` raised instead of it.
        """
        item, error = self._ready.get()
        if error is not None:
            self._thread.join()
            self._ready.put((None, error))  # whoever asks again is told again
            raise error
        return item  # type: ignore[return-value]  # there is an item where there is no error

    def close(self) -> None:
        """Stop the thread; items that wait are lost."""
        self._stop.set()
        with suppress(queue.Empty):
            self._ready.get_nowait()  # the thread may wait for room
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._put((self._make(), None))
            except BaseException as error:
                self._put((None, error))
                return

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return
