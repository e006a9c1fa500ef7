"""cpmbee.native: which library, which kernels, and how each can be turned down."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from cpmbee import native
from cpmbee.errors import ConfigError
from tests.csrc.attention_model import requires_native

SAY_KERNELS = "import json; from cpmbee import native; print(json.dumps([native.kernels(), native.call_counts()]))"


def kernels_with(**environment: str) -> dict[str, str]:
    process = subprocess.run(
        [sys.executable, "-c", SAY_KERNELS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    kernels, counts = json.loads(process.stdout)
    assert counts == dict.fromkeys(native.OPS, 0)
    assert sorted(kernels) == sorted(native.OPS)
    return dict(kernels)


@requires_native
def test_environment_caps_the_instruction_set() -> None:
    best = kernels_with(CPMBEE_ISA="avx512")["BucketedAttention"]
    assert kernels_with(CPMBEE_ISA="scalar")["BucketedAttention"] == "scalar"
    assert kernels_with(CPMBEE_ISA="avx2")["BucketedAttention"] == ("avx2" if best == "avx512" else best)
    assert kernels_with(CPMBEE_ISA="neon")["BucketedAttention"] == ("neon" if best == "neon" else "scalar")


def test_environment_turns_the_library_off() -> None:
    assert set(kernels_with(CPMBEE_NATIVE="0").values()) == {"function"}


@requires_native
def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPMBEE_ISA", "sse9")
    with pytest.raises(ConfigError, match=r"CPMBEE_ISA must be one of scalar, neon, avx2, avx512, not 'sse9'"):
        native.register(ort.SessionOptions())
    with pytest.raises(ConfigError, match="not 'mmx'"):
        native.cap_isa("mmx")


def test_a_missing_library_is_said_once_and_harms_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.delenv("CPMBEE_NATIVE", raising=False)
    native.warn_not_built.cache_clear()
    with caplog.at_level(logging.WARNING, logger="cpmbee"):
        for _ in range(2):
            assert native.library_path() is None
            native.register(ort.SessionOptions())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not built" in caplog.text
    assert set(native.kernels().values()) == {"function"}
