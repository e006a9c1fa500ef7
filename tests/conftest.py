"""Models that several test files share, made once a session."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cpmbee.onnxruntime_import import switch_off_telemetry
from tests.golden import DATA, GOLDEN

switch_off_telemetry()  # before a test file imports ONNX Runtime


# Shells start what runs in the background with interrupts ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint over a vocabulary of some fifty tokens."""
    from tests.model.factory import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint")


@pytest.fixture(scope="session")
def small_folder(small_checkpoint: Path) -> Path:
    """The small checkpoint, exported."""
    from cpmbee.export.exporter import export

    out = small_checkpoint.with_name("exported")
    export(small_checkpoint, out, verify=False)
    return out


@pytest.fixture(scope="session")
def exported_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a recorded checkpoint, with a LoRA delta if its file is named; each once."""
    from cpmbee.export.exporter import export

    @cache
    def exported(name: str, lora: str | None = None) -> Path:
        out = tmp_path_factory.mktemp(name) / "exported"
        delta = None if lora is None else GOLDEN / name / lora
        export(GOLDEN / name, out, vocab=DATA / "bee_vocab.txt", lora=delta, lora_alpha=delta and 16.0, verify=False)
        return out

    return exported
