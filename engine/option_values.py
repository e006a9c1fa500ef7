"""Values that callers give as options: NumPy's numbers made plain, and any value shown in a message."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np


def plain_number(value: Any) -> Any:
    """A NumPy integer or float as Python's; anything else as it is."""
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if isinstance(value, np.floating) else value


def shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    return _SHOWN.repr(value)


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        return repr(value) if value.bit_length() <= 256 else f"<integer of {value.bit_length()} bits>"


_SHOWN = _Shown()
