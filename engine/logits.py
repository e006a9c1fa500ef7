"""From a row of logits to candidates: compiled where a compiler was, else in plain NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpmbee.plain.logits import select
else:
    try:
        from cpmbee._logits import select
    except ImportError:
        from cpmbee.plain import warn_not_built
        from cpmbee.plain.logits import select

        warn_not_built()

__all__ = ["select"]
