"""Where recorded cases and development data lie; both stay outside the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("CPMBEE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
GOLDEN = SHARED / "golden"
DATA = SHARED / "data"

requires_golden = pytest.mark.skipif(
    not (GOLDEN.is_dir() and DATA.is_dir()),
    reason=f"needs the recorded cases in {SHARED} (CPMBEE_SHARED names another folder)",
)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One dict a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
