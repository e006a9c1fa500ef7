"""Numbers on command lines, checked where they are read."""

from __future__ import annotations

import argparse
import contextlib
import math


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(1, text)


def not_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(0, text)


def above_zero(text: str) -> float:
    """A finite number larger than 0."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def _whole(least: int, text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= least:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
