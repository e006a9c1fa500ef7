"""Reading pickles of plain data without running them: dicts, lists, strings, numbers, booleans, None, and nothing else.

A container may be used once and texts within limits, so that a small record cannot unfold into a huge one.
"""

from __future__ import annotations

from typing import Any

from cpmbee.errors import DataError
from cpmbee.model.pickle_machine import BadPickle, PickleMachine

MAX_REPEATED = 64 << 20  # characters of texts that a pickle holds once and uses again


def load_plain(payload: bytes) -> Any:
    """The object in a pickle of protocol 2 to 5.

    Raises:
        DataError: it holds something other than plain data, or is cut off.
    """
    try:
        return _PlainMachine(payload).run()
    except BadPickle as error:
        raise DataError(f"{error}; convert the data set to JSON") from None


class _PlainMachine(PickleMachine):
    _repeated = 0  # characters

    def remembered(self, value: Any) -> Any:
        if isinstance(value, (dict, list)):
            raise BadPickle("pickle uses one list or dict twice; only plain data is read")
        self._repeated += len(value) if isinstance(value, str) else 0
        if self._repeated > MAX_REPEATED:
            raise BadPickle(f"pickle repeats texts to more than {MAX_REPEATED} characters")
        return value
