"""Every error the package raises on purpose: one line that says what is wrong, where, and what to do about it.

Each class derives from `CpmBeeError` and from the built-in that a caller who does not know this package would expect.
"""

from __future__ import annotations


class CpmBeeError(Exception):
    """Base of all errors raised by cpmbee.

    Attributes:
        request: where one request of several is at fault, its index in the call.
    """

    request: int | None = None


class TokenizeError(CpmBeeError, ValueError):
    """Text that cannot be tokenized, such as a lone ``<``."""


class PromptError(CpmBeeError, ValueError):
    """A request that is not a nested dict of strings with a usable ``<ans>``; names the path (``$.options.<a>``)."""


class ConfigError(CpmBeeError, ValueError):
    """A model configuration or generation option that is unknown, missing or out of range."""


class VocabularyError(CpmBeeError, ValueError):
    """A vocabulary that is malformed or does not fit the model."""


class CheckpointError(CpmBeeError, ValueError):
    """A checkpoint with a missing, extra, misshapen or unreadable tensor; names it."""


class ModelFolderError(CpmBeeError, ValueError):
    """An ONNX model folder that is incomplete, altered or not safe to load; names the file."""


class CacheFullError(CpmBeeError, MemoryError):
    """A request that needs more cache rows than the engine has."""


class InferenceError(CpmBeeError, RuntimeError):
    """A model that could not be run, or that computed what no model should; says why."""


class ExportError(CpmBeeError, RuntimeError):
    """An export whose result does not hold up in verification."""


class DataError(CpmBeeError, ValueError):
    """A data set, record, mixture or transform that cannot be used; names the file and the place in it."""


class DependencyError(CpmBeeError, ImportError):
    """An optional dependency that this call needs is absent; says which extra brings it."""
