"""Every error the package raises on purpose: one line that says what is wrong, where, and what to do about it.

Each class derives from `CpmBeeError` and from the built-in that a caller who does not know this package would expect.
"""

from __future__ import annotations

MAX_MESSAGE = 500  # characters
_HEAD = 250  # of a longer one: what is wrong and where; what to do is at its end


class CpmBeeError(Exception):
    """Base of all errors raised by cpmbee.

    Whatever a name, a file or another library's message holds, ``str(error)`` is one line of at most `MAX_MESSAGE`
    characters that a terminal can show.

    Attributes:
        request: where one request of several is at fault, its index in the call.
    """

    request: int | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text as one line of at most `MAX_MESSAGE` characters: others than printable ones escaped, the middle cut out.

    Doing it twice changes nothing.
    """
    text = text.strip()
    if len(text) > 2 * MAX_MESSAGE:  # what is cut out below need not be escaped
        text = f"{text[:MAX_MESSAGE]}{text[-MAX_MESSAGE:]}"
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[:_HEAD]}...{text[_HEAD + 3 - MAX_MESSAGE :]}"


class TokenizeError(CpmBeeError, ValueError):
    """Text that cannot be tokenized, such as a lone ``<``."""


class PromptError(CpmBeeError, ValueError):
    """A request that is not a nested dict of strings with a usable ``<ans>``; names the path (``$.options.<a>``)."""


class ConfigError(CpmBeeError, ValueError):
    """A model configuration, an option or an argument that is unknown, missing or out of range."""


class VocabularyError(CpmBeeError, ValueError):
    """A vocabulary that is malformed or does not fit the model."""


class CheckpointError(CpmBeeError, ValueError):
    """A checkpoint with a missing, extra, misshapen or unreadable tensor; names it."""


class ModelFolderError(CpmBeeError, ValueError):
    """An ONNX model folder that is incomplete, altered or not safe to load; names the file."""


class CacheFullError(CpmBeeError, MemoryError):
    """A request that needs more cache rows than the engine has."""


class InferenceError(CpmBeeError, RuntimeError):
    """A model that could not be run or has not finished, or that computed what no model should; says why."""


class ExportError(CpmBeeError, RuntimeError):
    """An export whose result does not hold up in verification."""


class DataError(CpmBeeError, ValueError):
    """A data set, record, mixture or transform that cannot be used; names the file and the place in it."""


class DependencyError(CpmBeeError, ImportError):
    """An optional dependency that this call needs is absent; says which extra brings it."""
