"""Reading pickles of plain data without running them: dicts, lists, strings, numbers, booleans, None, and nothing else.

Pickle is a program for a stack machine that may import and call whatever it likes. This is that machine with the few
instructions that build plain data; any other is refused by name. A container may be used once and texts within limits,
so that a small record cannot unfold into a huge one.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

from cpmbee.errors import DataError

PROTOCOL_MARK = 0x80  # first byte of a pickle of protocol 2 or newer; never that of JSON
MAX_REPEATED = 64 << 20  # characters of texts that a pickle holds once and uses again

_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_MARK = object()
_PUSH_CONSTANT: dict[int, Callable[[], Any]] = {
    ord("}"): dict,
    ord("]"): list,
    ord("("): lambda: _MARK,
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
}
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
_TEXT = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}  # its length
_LONG = 0x8A
_MEMOIZE = 0x94
_PUT = {ord("q"): "<B", ord("r"): "<I"}
_GET = {ord("h"): "<B", ord("j"): "<I"}
_FRAME = 0x95
_APPEND, _APPENDS, _SETITEM, _SETITEMS, _STOP = b"aesu."


def load_plain(payload: bytes) -> Any:
    """The object in a pickle of protocol 2 to 5.

    Raises:
        DataError: it holds something other than plain data, or is cut off.
    """
    machine = _Machine(payload)
    try:
        return machine.run()
    except DataError:
        raise
    except (struct.error, StopIteration, LookupError, TypeError, ValueError):
        raise DataError(f"pickle is broken near byte {machine.position}") from None


class _Machine:
    """The stack machine.

    Args:
        payload: its program.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self.position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._repeated = 0  # characters

    def run(self) -> Any:
        """Run to the end; what is left on the stack."""
        if self._number("<B") != PROTOCOL_MARK or not 2 <= self._number("<B") <= 5:
            raise DataError("not a pickle of protocol 2 to 5")
        while (code := self._number("<B")) != _STOP:
            self._step(code)
        (result,) = self._stack
        return result

    def _step(self, code: int) -> None:
        stack = self._stack
        if code in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[code]())
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _TEXT:
            stack.append(self._bytes(self._number(_TEXT[code])).decode("utf-8", "surrogatepass"))
        elif code == _LONG:
            stack.append(int.from_bytes(self._bytes(self._number("<B")), "little", signed=True))
        elif code == _MEMOIZE:
            self._memo[len(self._memo)] = stack[-1]
        elif code in _PUT:
            self._memo[self._number(_PUT[code])] = stack[-1]
        elif code in _GET:
            value = self._memo[self._number(_GET[code])]
            if isinstance(value, (dict, list)):
                raise DataError("pickle uses one list or dict twice; only plain data is read")
            self._repeated += len(value) if isinstance(value, str) else 0
            if self._repeated > MAX_REPEATED:
                raise DataError(f"pickle repeats texts to more than {MAX_REPEATED} characters")
            stack.append(value)
        elif code == _FRAME:
            self._number("<Q")
        elif code in (_APPEND, _APPENDS):
            items = self._above_mark() if code == _APPENDS else [stack.pop()]
            self._top(list).extend(items)
        elif code in (_SETITEM, _SETITEMS):
            items = self._above_mark() if code == _SETITEMS else [stack.pop(-2), stack.pop()]
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        else:
            name = _NAMES.get(chr(code), f"0x{code:02x}")
            raise DataError(f"pickle does more than plain data needs ({name}); convert the data set to JSON")

    def _above_mark(self) -> list[Any]:
        stack = self._stack
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        items = stack[mark + 1 :]
        del stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        top = self._stack[-1]
        if type(top) is not kind:
            raise TypeError(kind)
        return top

    def _number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._payload, self.position)
        self.position += struct.calcsize(layout)
        return value

    def _bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._payload):
            raise IndexError(end)
        taken = self._payload[self.position : end]
        self.position = end
        return taken
