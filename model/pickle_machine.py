"""Reading pickles without running them: dicts, lists, strings, numbers, booleans, None.

Pickle is a program for a stack machine that may import and call whatever it likes. This is that machine with the few
instructions that build plain data; any other is refused by name. What a reader needs beside them, it adds in a
subclass.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

PROTOCOL_MARK = 0x80  # first byte of a pickle of protocol 2 or newer; never that of JSON
MAX_INSTRUCTIONS = 1 << 20  # an instruction of one byte may make an object of a hundred

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
_KEYS = (str, int, float, bool, type(None))  # what has a hash without recursion


class BadPickle(Exception):  # noqa: N818 - never leaves the readers, who say where it was
    """A pickle that is broken, too large, or does more than its reader allows."""


class PickleMachine:
    """The stack machine.

    Args:
        payload: its program, which may be followed by anything.
        position: where in ``payload`` it begins.

    Attributes:
        position: of the next instruction; behind the program when it has run.
    """

    def __init__(self, payload: bytes, position: int = 0) -> None:
        self._payload = payload
        self.position = position
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run to the end.

        Returns:
            The object of the pickle.

        Raises:
            BadPickle: it is no pickle of protocol 2 to 5, or it cannot be read; says why.
        """
        try:
            if self._number("<B") != PROTOCOL_MARK or not 2 <= self._number("<B") <= 5:
                raise BadPickle("not a pickle of protocol 2 to 5")
            for _ in range(MAX_INSTRUCTIONS):
                code = self._number("<B")
                if code == _STOP:
                    (result,) = self._stack
                    return result
                self._step(code)
        except (struct.error, StopIteration, LookupError, TypeError, ValueError):
            raise BadPickle(f"pickle is broken near byte {self.position}") from None
        raise BadPickle(f"pickle has more than {MAX_INSTRUCTIONS} instructions")

    def remembered(self, value: Any) -> Any:
        """What becomes of an object that is used again."""
        return value

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
            stack.append(self.remembered(self._memo[self._number(_GET[code])]))
        elif code == _FRAME:
            self._number("<Q")
        elif code in (_APPEND, _APPENDS):
            items = self._above_mark() if code == _APPENDS else [stack.pop()]
            self._top(list).extend(items)
        elif code in (_SETITEM, _SETITEMS):
            items = self._above_mark() if code == _SETITEMS else [stack.pop(-2), stack.pop()]
            keys = items[::2]
            if not all(isinstance(key, _KEYS) for key in keys):
                raise TypeError
            self._top(dict).update(zip(keys, items[1::2], strict=True))
        else:
            name = _NAMES.get(chr(code), f"0x{code:02x}")
            raise BadPickle(f"pickle does more than plain data needs ({name})")

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
