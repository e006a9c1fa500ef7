"""What a call is given: one request or several, and which of them an error is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cpmbee.encoding import Data
from cpmbee.errors import CacheFullError, PromptError, TokenizeError


def items_of(data: Data | Sequence[Data]) -> tuple[Sequence[Data], bool]:
    """Requests as a list, and whether the caller gave a single one."""
    if isinstance(data, dict):
        return [data], True
    if not isinstance(data, (list, tuple)):
        raise PromptError(f"a request is a dict, and several are a list of them, not {type(data).__name__}")
    return data, False


@contextmanager
def locating(index: int, single: bool) -> Iterator[None]:
    """Say in errors which request of several is at fault."""
    try:
        yield
    except (CacheFullError, PromptError, TokenizeError) as error:
        if single:
            raise
        located = type(error)(f"request {index}: {error}")
        located.request = index
        raise located from None
