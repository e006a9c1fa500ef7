"""Tokenizer, prompt encoder and relation builder in plain Python.

The readable specification of the compiled modules, their oracle in tests, and what runs where no compiler was.
"""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_not_compiled() -> None:
    """Say, once, that text is encoded in plain Python."""
    logging.getLogger("cpmbee").warning(
        "the compiled tokenizer is not built; text is encoded in plain Python, about fifty times slower"
    )
