"""The tokenizer: compiled where a compiler was, else in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpmbee.plain.tokenizer import Tokenizer
else:
    try:
        from cpmbee._tokenizer import Tokenizer
    except ImportError:
        from cpmbee.plain import warn_not_built
        from cpmbee.plain.tokenizer import Tokenizer

        warn_not_built()

__all__ = ["Tokenizer"]
