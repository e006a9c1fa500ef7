"""What a training command shows on a terminal and elsewhere."""

import io
import logging

import pytest

from cpmbee.train.metrics import StepMetrics
from cpmbee.train.progress import training_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 1.25, {}, 1e-3, 100 * step, 2000.0, 0.05, 1.0, float(step))


def train(stream: io.StringIO) -> str:
    log = logging.getLogger("cpmbee.train.trainer")
    with training_progress(stream) as on_step:
        on_step(metrics(4), 10)  # of a resumed run
        log.info("saved a checkpoint")
        on_step(metrics(5), 10)
    log.info("said after it")
    return stream.getvalue()


def test_a_terminal_shows_a_bar_and_whole_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = train(Terminal())
    assert " 40% step 4 of 10, loss 1.2500, 2,000 tokens/s, padding 5%" in shown
    assert "0:00:00 left" in shown
    before, line, _ = shown.partition("saved a checkpoint\n")
    assert line
    assert before.rpartition("\r\x1b[K")[2].strip().count(":") == 2  # nothing but the time stands before it
    assert shown.endswith("\r\x1b[K")


def test_a_file_gets_log_lines_only() -> None:
    shown = train(io.StringIO())
    assert shown.count("\n") == 1
    assert shown.endswith(" saved a checkpoint\n")
