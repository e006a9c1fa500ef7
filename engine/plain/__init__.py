"""Tokenizer, prompt encoder and relation builder in plain Python.

The readable specification of the compiled modules, their oracle in tests, and what runs where no compiler was.
"""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_not_built() -> None:
    """Say, once for all of them, that compiled parts are missing and what stands in for them."""
    logging.getLogger("cpmbee").warning(
        "native code is not built (no C++ compiler at install time): plain Python and the ONNX functions of the model "
        "run instead, many times slower"
    )
