"""Threads of a run: how many by default, and that it is said."""

from __future__ import annotations

import logging
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmbee import Engine, session, threads
from cpmbee.folder import open_folder
from cpmbee.runner import Runner
from cpmbee.session import OrtBackend

REQUEST = {"input": "今天天气真好", "<ans>": ""}


@pytest.mark.parametrize(
    ("most", "seconds", "chosen", "tried"),
    [
        pytest.param(1, {1: 1.0}, 1, [1], id="one core"),
        pytest.param(8, {1: 1.0, 2: 1.2}, 1, [1, 2], id="two are slower"),
        pytest.param(8, {1: 1.0, 2: 0.9}, 1, [1, 2], id="two are hardly faster"),
        pytest.param(8, {1: 1.0, 2: 0.6, 4: 0.55}, 2, [1, 2, 2, 1, 4], id="two are worth it"),
        pytest.param(8, {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3}, 8, [1, 2, 2, 1, 4, 4, 2, 8, 8, 4], id="all are worth it"),
        pytest.param(6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.3}, 6, [1, 2, 2, 1, 4, 4, 2, 6, 6, 4], id="no power of two"),
    ],
)
def test_threads_are_added_as_long_as_they_pay(
    most: int, seconds: dict[int, float], chosen: int, tried: list[int]
) -> None:
    asked: list[int] = []

    def measure(number: int) -> float:
        asked.append(number)
        return seconds[number]

    assert threads.choose(most, measure) == chosen
    assert asked == tried


@pytest.mark.parametrize("again", [[0.9, 1.0], [0.4, 0.4]], ids=["two were lucky", "one was unlucky"])
def test_one_lucky_trial_is_not_enough(again: list[float]) -> None:
    trials = iter([1.0, 0.4, *again])
    assert threads.choose(2, lambda _: next(trials)) == 1


class CountingRunner(Runner):
    """Knows what was run, and never reads or writes a row that may be somebody's."""

    def __init__(self) -> None:
        super().__init__(10)
        self.runs: list[int] = []

    def run(self) -> None:
        assert not np.any(self.slots) and not np.any(self.new_slots)  # noqa: PT018
        assert not np.any(self.relation)
        self.runs.append(self.input_ids.shape[1])


def test_a_request_is_a_prompt_and_its_steps() -> None:
    runner = CountingRunner()
    ticks = count()
    assert threads.request_seconds(runner, clock=lambda: float(next(ticks))) > 0
    assert runner.runs[:2] == [32, 1]  # to begin with, not timed
    assert runner.runs[2:] == [32, *[1] * 8]


def test_threads_that_have_no_work_are_put_to_sleep_soon() -> None:
    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    entries: dict[str, Any] = {}
    for version in ("1.18.1", "1.25.1", "1.26.0", "1.32.0"):
        options = Options()
        threads.bound_spinning(options, version)
        entries[version] = options.entries
    assert entries["1.18.1"] == entries["1.25.1"] == {"session.force_spinning_stop": "1"}
    assert entries["1.26.0"] == entries["1.32.0"] == {"session.intra_op.spin_duration_us": "1000"}


@pytest.mark.parametrize(("faster", "expected"), [(2.0, 4), (0.5, 1)])
def test_a_small_model_takes_the_threads_that_pay(
    small_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    faster: float,
    expected: int,
) -> None:
    opened: list[int] = []
    plain = OrtBackend._open

    def open_session(self: OrtBackend, folder: Any, number: int) -> Any:
        opened.append(number)
        return plain(self, folder, number)

    monkeypatch.setattr(session, "physical_cores", lambda: 4)
    monkeypatch.setattr(OrtBackend, "_open", open_session)
    seconds = {1: 1.0, 2: 1 / faster, 4: 1 / faster**2}

    def request_seconds(runner: Any) -> float:
        return seconds[runner._session.get_session_options().intra_op_num_threads]

    monkeypatch.setattr(threads, "request_seconds", request_seconds)
    with caplog.at_level(logging.INFO, "cpmbee"):
        engine = Engine.from_pretrained(small_folder)
    assert engine.num_threads == expected
    assert opened == ([1, 2, 4] if expected == 4 else [1, 2])
    assert f": {expected} threads by default, " in caplog.text
    one = Engine.from_pretrained(small_folder, num_threads=1)
    assert one.num_threads == 1
    assert engine.generate(REQUEST, max_new_tokens=6).answer == one.generate(REQUEST, max_new_tokens=6).answer


def test_others_take_all_cores_and_are_not_tried(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "physical_cores", lambda: 3)
    monkeypatch.setattr(threads, "request_seconds", lambda _: pytest.fail("tried"))
    assert OrtBackend(open_folder(small_folder), num_threads=2).num_threads == 2
    monkeypatch.setattr(threads, "SMALL_MODEL_BYTES", 0)
    assert OrtBackend(open_folder(small_folder)).num_threads == 3
    monkeypatch.setattr(threads, "SMALL_MODEL_BYTES", 1 << 30)
    monkeypatch.setattr(session, "physical_cores", lambda: 1)
    assert OrtBackend(open_folder(small_folder)).num_threads == 1


def test_a_small_model_is_tried_for_real(small_folder: Path) -> None:
    engine = Engine.from_pretrained(small_folder)
    assert 1 <= engine.num_threads <= session.physical_cores()
    assert engine.generate(REQUEST, max_new_tokens=3).usage.completion_tokens > 0
