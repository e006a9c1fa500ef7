"""How many threads a run takes where nobody says, and how long they wait for work.

The threads of a run meet after every operator, hundreds of times for each token. A large model always gains by more of
them; one that fits the processor's cache may lose, and on cores that others use, too, it loses most: all wait for the
one that was put aside. So small models are tried with 1 thread, 2, 4, ... as long as each doubling pays, which takes
some ten milliseconds, and large ones take all cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cpmbee.onnxruntime_import import release
from cpmbee.runner import Runner

SMALL_MODEL_BYTES = 32 << 20  # of weights; a step of a larger model takes longer than its threads need to meet
WORTH = 1.25  # how many times as fast twice the threads have to be; less is lost again once the machine is busy
SPIN_MICROSECONDS = 1000  # that a thread looks out for work before it sleeps; operators are closer together
_PROMPT, _STEPS = 32, 8  # tokens of a request that is tried
_TRIAL_SECONDS = 0.008  # that requests are repeated for, so that others' turns on the cores show
_SPIN_DURATION = (1, 26)  # the first ONNX Runtime that can be told how long


def choose(most: int, seconds: Callable[[int], float]) -> int:
    """The number of threads that pays, found twice: on a busy machine one trial may be lucky.

    Args:
        most: that may be taken.
        seconds: how long a request takes with so many.
    """
    best, shortest = 1, seconds(1)
    while best < most:
        count = min(2 * best, most)
        taken = seconds(count)
        if taken * WORTH > shortest or seconds(count) * WORTH > seconds(best):
            break
        best, shortest = count, taken
    return best


def request_seconds(runner: Runner, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a short request takes, its prompt and its steps: the mean of several; writes to cache row 0 only."""
    for shape in ((1, _PROMPT, _PROMPT, 0), (1, 1, _PROMPT, 0)):  # memory is taken in the first run of a shape
        _run(runner, shape, 1)
    requests, start = 0, clock()
    while requests == 0 or clock() - start < _TRIAL_SECONDS:
        _run(runner, (1, _PROMPT, _PROMPT, 0), 1)
        _run(runner, (1, 1, _PROMPT, 0), _STEPS)
        requests += 1
    return (clock() - start) / requests


def bound_spinning(options: Any, version: str) -> None:
    """Let the threads of a session sleep soon after there is no work; by default they keep cores busy for up to 0.5 s.

    Args:
        options: ``SessionOptions``.
        version: ONNX Runtime's.
    """
    if release(version) >= _SPIN_DURATION:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")  # at the end of each run


def _run(runner: Runner, shape: tuple[int, int, int, int], times: int) -> None:
    runner.reshape(*shape)
    runner.relation[:] = 0
    for _ in range(times):
        runner.run()
