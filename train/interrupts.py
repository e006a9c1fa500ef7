"""Ctrl-C and polite kills while a model is trained: they wait for the end of the step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from cpmbee.train.processes import Processes

logger = logging.getLogger("cpmbee.train")

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_Handler = Callable[[int, FrameType | None], Any]


class Interrupts:
    """Keeps signals from ending a step half-way: parameters would be changed in part, and no checkpoint could be kept.

    Within the context the first signal of each kind is only taken note of. A second one does at once what it would
    have done without us, as do signals that no handler in Python deals with. Signals reach a process's main thread; in
    another one this does nothing.

    Args:
        said: whether this process says when a signal waits; of several, one does.
    """

    def __init__(self, said: bool = True) -> None:
        self._said = said
        self._handlers: dict[int, _Handler] = {}
        self._waiting: set[int] = set()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None and self._waiting:
            self.deliver(min(self._waiting))

    def agreed(self, processes: Processes, device: torch.device) -> int | None:
        """The signal that some process has received, if any: the same on all of them, which all must ask."""
        received = np.array([number in self._waiting for number in SIGNALS])
        if processes.world_size > 1:
            received = processes.sum(received, device) > 0
        return next((number for number, here in zip(SIGNALS, received, strict=True) if here), None)

    def deliver(self, number: int) -> None:
        """Do now what a signal would have done when it came, such as raising `KeyboardInterrupt`."""
        self._waiting.discard(number)
        if number in self._handlers:
            self._handlers[number](number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in self._waiting:
            self._handlers[number](number, frame)
            return
        self._waiting.add(number)
        with suppress(RuntimeError):  # what it interrupts may be writing there
            if self._said:
                logger.warning("interrupted: the run ends with this step and a checkpoint; once more ends it at once")
