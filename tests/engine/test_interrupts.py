"""Ctrl-C wherever it may come: nothing hangs, no row is lost or given to two, and the next answers are right."""

from __future__ import annotations

import gc

import pytest

from tests.engine.interrupts import Calls, interrupted

STRIDE = 83  # of the places that are interrupted, one after the other; `python -m tests.engine.interrupts` tries all
NAMES = list(Calls().all)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_at_any_place(name: str) -> None:
    calls, place = Calls(), 1
    gc.disable()
    try:
        while interrupted(calls.all[name], place):
            assert calls.check() == "", f"place {place}"
            place += STRIDE
    finally:
        gc.enable()
    assert place > 5 * STRIDE


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_although_somebody_keeps_the_exception(name: str) -> None:
    calls, kept = Calls(), []
    for place in range(11, 100000, 7 * STRIDE):
        try:
            calls_it_through = not raised(calls, name, place)
        except KeyboardInterrupt as error:
            kept.append(error)  # and with it every frame that it came through
            calls_it_through = False
        if calls_it_through:
            break
        answers = calls.answers()
        assert answers == calls.expected
    assert kept


def raised(calls: Calls, name: str, place: int) -> bool:
    """Like `interrupted`, but the exception leaves."""
    failure: list[BaseException] = []

    def call() -> None:
        try:
            calls.all[name]()
        except KeyboardInterrupt as error:
            failure.append(error)
            raise

    done = interrupted(call, place)
    if failure:
        raise failure[0]
    return done
