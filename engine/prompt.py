"""From a nested dict to the arrays that a model reads: compiled where a compiler was, else in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmbee.encoding import MAX_DEPTH, MAX_NESTING, MAX_SEGMENTS, AnswerSlot, EncodedData, Prompt

if TYPE_CHECKING:
    from cpmbee.plain.prompt import encode_data, encode_prompt
else:
    try:
        from cpmbee._prompt import encode_data, encode_prompt
    except ImportError:
        from cpmbee.plain import warn_not_built
        from cpmbee.plain.prompt import encode_data, encode_prompt

        warn_not_built()

__all__ = [
    "MAX_DEPTH",
    "MAX_NESTING",
    "MAX_SEGMENTS",
    "AnswerSlot",
    "EncodedData",
    "Prompt",
    "encode_data",
    "encode_prompt",
]
