"""Work that holds cache rows: who carries it on, what happens when nobody does, how it is ended.

A call of `Engine.generate` or `Engine.score` is one task, carried on by its caller from begin to end; a stream is one
that is carried on a step at a time, by whichever thread reads it. Rows belong to tasks, never to threads.

Somebody who waits for rows gets them in one of two ways: the tasks that hold them are at work and will end, or nobody
carries them on at the moment (streams between two pieces) and whoever waits does it for them. So waiting ends, unless
all who hold rows wait themselves further up in the same thread: that is an error.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from cpmbee.cache import CachePool
from cpmbee.errors import CacheFullError, CpmBeeError, InferenceError
from cpmbee.row_keeper import RowHolder, RowKeeper
from cpmbee.runner import Backend, Runner, RunStopped

OnStep = Callable[[int], "bool | None"]

PATIENCE = 0.05  # seconds between two looks at whether rows have come back


class Task(ABC):
    """Requests that are carried out together.

    An interrupt (Ctrl-C, a signal handler that raises) may come between any two lines. ``with`` on a plain lock is
    safe then; everything else follows from three attributes, each written in one go: a step that has begun and not
    ended while nobody holds the lock was interrupted, so the task is over, and its rows are nobody's.

    Attributes:
        lock: whoever holds it carries the task on, or looks at what has been written; not re-entrant.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper) -> None:
        self._backend = backend
        self._pool = pool
        self._keeper = keeper
        self.lock = threading.Lock()
        self._driver = 0  # the thread that did so last
        self._begun = 0  # steps
        self._ended = 0
        self._closed = False
        self._error: CpmBeeError | None = None  # of a step that somebody else made; for the caller
        self._borrowed: tuple[AbstractContextManager[Runner], Runner] | None = None

    @property
    @abstractmethod
    def holders(self) -> list[RowHolder]:
        """Its requests."""

    @abstractmethod
    def _step(self) -> bool:
        """Make one step, or return False if there is none left."""

    @property
    def driver(self) -> int:
        """The thread that carries it on, or 0."""
        return self._driver

    @property
    def driven(self) -> bool:
        """Whether somebody carries it on at this moment."""
        return self.lock.locked()

    @property
    def _mine(self) -> bool:
        """Whether this thread is in the middle of a step: a callback, a signal handler or a finalizer calls."""
        return self.driven and self._driver == threading.get_ident()

    @property
    def abandoned(self) -> bool:
        """Whether it is over, be it that an interrupt ended it."""
        if self._closed:
            return True
        begun = self._begun
        if self.lock.locked():
            return False
        # In this order: if no step has begun since the lock was seen free, the last one will not end any more.
        ended = self._ended
        return ended != begun and self._begun == begun

    def advance(self) -> bool:
        """Make one step; returns False if there was none left.

        Raises:
            CpmBeeError: the step failed, or this thread is in the middle of one.
        """
        self.check_free()
        with self.lock:
            more = self._advance()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return more

    def complete(self, on_step: OnStep | None = None) -> None:
        """Carry it on to its end.

        Args:
            on_step: called after every step with the number of steps so far; returning False ends it.

        Raises:
            CacheFullError: whoever holds what a request needs waits for this call.
            InferenceError: the model cannot be run, or computes logits that are not finite.
        """
        self.check_free()
        with self.lock:
            if not self._begin():
                return
            step = 0
            try:
                while self._step():
                    step += 1
                    if on_step is not None and on_step(step) is False:
                        self.cancel()
            except RunStopped:
                pass
            finally:
                self._close()
            self._end()

    def check_free(self) -> None:
        """Raise `InferenceError` where waiting for the lock could last for ever: in a child, in a step of its own."""
        self._pool.check_process()
        if self._mine:
            raise InferenceError("a stream cannot be read by a function that interrupts its own reading")

    def cancel(self) -> None:
        """End it: at once where nobody carries it on, else as soon as whoever does notices."""
        self._pool.check_process()
        for holder in self.holders:
            holder.cancelled = True
        borrowed = self._borrowed
        if borrowed is not None:
            borrowed[1].stop()
        self._pool.ring()
        if self._mine:
            return
        with self.lock:
            self._close()

    def help(self) -> None:
        """Make one step for somebody else, who gets its error if it has one."""
        with self.lock:
            try:
                self._advance()
            except CpmBeeError as error:
                self._error = error
            except BaseException:
                self._error = InferenceError("a step was interrupted in a thread that waited for the rows it held")
                raise

    def _advance(self) -> bool:
        """`advance`, for whoever holds the lock."""
        if not self._begin():
            return False
        try:
            more = self._step()
        except RunStopped:
            more = False
        except BaseException:
            self._close()
            raise
        if not more:
            self._close()
        self._end()
        return more

    def _begin(self) -> bool:
        """Write down that a step begins, unless the task is over."""
        if self._closed or self._begun != self._ended:
            self._close()
            return False
        self._driver = threading.get_ident()
        self._begun += 1
        return True

    def _end(self) -> None:
        self._driver = 0
        self._ended = self._begun

    def _borrow_runner(self) -> Runner:
        if self._borrowed is None:
            loan = self._backend.runner()
            self._borrowed = (loan, loan.__enter__())
        return self._borrowed[1]

    def _close(self) -> None:
        """Let go of everything; all rows come back with the first line."""
        self._closed = True
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None:
            borrowed[0].__exit__(None, None, None)
        self._pool.ring()

    def _stopped(self) -> bool:
        """Whether no request is wanted any more."""
        return all(holder.cancelled for holder in self.holders)

    def _reserve(self, holder: RowHolder, *, wait: bool) -> bool:
        """Lease rows for one of the requests.

        Returns:
            False when there is no room now and ``wait`` is not set, or when the request was cancelled meanwhile.

        Raises:
            CacheFullError: there never will be room.
        """
        patient = True  # whoever reads a stream may be about to go on
        while not self._keeper.reserve(holder, self):
            if not wait or holder.cancelled:
                return False
            others = [owner for owner in self._pool.owners() if owner is not self]
            idle = [owner for owner in others if not owner.driven]
            if idle and not patient:
                idle[0].help()
            elif others and all(self._pool.waits(owner.driver) for owner in others):
                raise CacheFullError(
                    f"the request needs {holder.own_tokens + holder.answer_rows} cache rows, and whoever holds them "
                    "waits for it to end; load the engine with more cache_tokens, or generate after the generation "
                    "whose callback this is"
                )
            else:
                self._pool.pause(PATIENCE)
                patient = False
        return True
