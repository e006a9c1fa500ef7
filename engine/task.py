"""Work that holds cache rows: who carries it on, what happens when nobody does, how it is ended.

A call of `Engine.generate` or `Engine.score` is one task, carried on by its caller from begin to end; a stream is one
that is carried on a step at a time, by whichever thread reads it. Rows belong to tasks, never to threads.
``docs/interrupts.md`` has the protocol.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from cpmbee.cache import CachePool
from cpmbee.errors import CpmBeeError, InferenceError
from cpmbee.row_keeper import RowHolder, RowKeeper
from cpmbee.runner import Backend, Runner, RunStopped
from cpmbee.waiting import Waiting

OnStep = Callable[[int], "bool | None"]
_T = TypeVar("_T")


class NoRoom(Exception):  # noqa: N818 - a reason to wait, no error; never leaves the engine
    """The first request of a task that has none at work does not find rows now."""


class Task(ABC):
    """Requests that are carried out together.

    An interrupt (Ctrl-C, a signal handler that raises) may come between any two lines. ``with`` on a plain lock is
    safe then; everything else follows from attributes that are each written in one go: a step that has begun and not
    ended while nobody holds the lock was interrupted, so the task is over, and its rows are nobody's.

    The blocks that hold the lock begin and end by saying which thread they are in, without a call in between, where
    an interrupt could come: a handler that it runs can tell whether it is in the midst of one.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper) -> None:
        self._backend = backend
        self._pool = pool
        self._keeper = keeper
        self._lock = threading.Lock()  # whoever holds it carries the task on, or looks at what has been written
        self._driver = 0
        self._begun = 0  # steps
        self._ended = 0
        self._closed = False
        self._failure: tuple[type[CpmBeeError], str] | None = None  # no exception: its frames refer to the task
        self._borrowed: tuple[AbstractContextManager[Runner], Runner, Callable[[], None]] | None = None

    @property
    @abstractmethod
    def holders(self) -> list[RowHolder]:
        """Its requests."""

    @abstractmethod
    def _step(self) -> bool:
        """Make one step, or return False if there is none left; raises `NoRoom`."""

    def _tidy(self) -> None:  # noqa: B027 - there may be nothing to do
        """Let go of what is done after a step, although nobody may ask for the next one."""

    @property
    def driver(self) -> int:
        """The thread that carries it on, or 0."""
        return self._driver

    @property
    def driven(self) -> bool:
        """Whether somebody carries it on at this moment."""
        return self._lock.locked()

    @property
    def abandoned(self) -> bool:
        """Whether it is over, be it that an interrupt ended it."""
        if self._closed:
            return True
        begun = self._begun
        if self._lock.locked():
            return False
        # In this order: if no step has begun since the lock was seen free, the last one will not end any more.
        ended = self._ended
        return ended != begun and self._begun == begun

    def advance(self) -> bool:
        """Make one step; returns False if there was none left.

        Raises:
            CpmBeeError: the step failed, whoever made it, or this thread is in the middle of one.
        """
        more, waiting = None, Waiting()
        while more is None:
            self.check_free()
            me = threading.get_ident()
            with self._lock:
                self._driver = me
                try:
                    more = self._advance()
                finally:
                    self._driver = 0
            if self._failure is not None:
                kind, message = self._failure
                raise kind(message)
            if more is None:
                waiting.look(self._pool, self)  # without the lock, so that others can close it
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
        me = threading.get_ident()
        with self._lock:
            self._driver = me
            try:
                self._complete(on_step)
            finally:
                self._driver = 0

    def help(self) -> None:
        """Make one step for somebody else, who gets its error if it has one."""
        me = threading.get_ident()
        with self._lock:
            self._driver = me
            try:
                self._advance()
            except CpmBeeError:
                pass  # kept for whoever it belongs to
            except BaseException:
                if self._closed or self._begun != self._ended:
                    self._failure = InferenceError, "a step was interrupted in a thread that waited for its rows"
                raise
            finally:
                self._driver = 0

    def inspect(self, look: Callable[[], _T]) -> _T:
        """Call a function while nobody makes a step.

        Raises:
            InferenceError: this thread is in the middle of one.
        """
        self.check_free()
        me = threading.get_ident()
        with self._lock:
            self._driver = me
            try:
                return look()
            finally:
                self._driver = 0

    def cancel(self) -> bool:
        """End it: at once where nobody carries it on, else as soon as whoever does notices.

        Returns:
            Whether it is over; it is not where this thread is in the middle of a step.
        """
        self._pool.check_process()
        for holder in self.holders:
            holder.cancelled = True
        borrowed = self._borrowed
        if borrowed is not None:
            borrowed[2]()
        self._pool.ring()
        me = threading.get_ident()
        if self._driver == me:
            return False
        with self._lock:
            self._driver = me
            try:
                self._close()
            finally:
                self._driver = 0
        return True

    def check_free(self) -> None:
        """Raise `InferenceError` where waiting for the lock could last for ever: in a child, in a step of its own."""
        self._pool.check_process()
        if self._driver == threading.get_ident():
            raise InferenceError("a stream cannot be read by a function that interrupts its own reading")

    def _advance(self) -> bool | None:
        """Make a step; None if there is no room for it now."""
        if self._closed or self._begun != self._ended:
            self._close()
            return False
        self._begun += 1
        try:
            more = self._step()
            self._tidy()
        except NoRoom:
            self._ended = self._begun
            return None
        except RunStopped:
            more = False
        except CpmBeeError as error:
            self._failure = type(error), str(error)
            self._close()
            raise
        except BaseException:
            self._close()
            raise
        if not more:
            self._close()
        self._ended = self._begun
        return more

    def _complete(self, on_step: OnStep | None) -> None:
        step, waiting = 0, Waiting()
        self._begun += 1
        try:
            while not self._closed:
                try:
                    more = self._step()
                except NoRoom:
                    waiting.look(self._pool, self)
                    continue
                if not more:
                    break
                step += 1
                if on_step is not None:
                    if on_step(step) is False:
                        self.cancel()
                    self._pool.check_process()
        except RunStopped:
            if not self._stopped():
                raise InferenceError("a run was ended that nobody has cancelled") from None
        finally:
            self._close()
        self._ended = self._begun

    def _borrow_runner(self) -> Runner:
        if self._borrowed is None:
            loan = self._backend.runner()
            runner = loan.__enter__()
            self._borrowed = (loan, runner, runner.stopper())
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

    def _reserve(self, holder: RowHolder, *, alone: bool) -> bool:
        """Lease rows for one of the requests; False if there are none now.

        Raises:
            CacheFullError: there never will be room.
            NoRoom: there are none now, and none of the task is at work (``alone``), so that it has to wait.
        """
        if self._keeper.reserve(holder, self):
            return True
        if alone:
            raise NoRoom
        return False
