"""Where the tensors of a graph are: in files beside it, whole pages of their own.

ONNX Runtime opens whatever file a tensor names and reads wherever it says, so that is looked at before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from cpmbee.graph_proto import ITEM_SIZES, Tensor

ALIGNMENT = 4096  # where tensors begin in the files that exports write
_LARGEST = 1 << 62


class Place(NamedTuple):
    """Where the data of a tensor is.

    Attributes:
        location: a file name.
        begin: its first byte.
        end: the byte behind its last.
    """

    location: str
    begin: int
    end: int


def places(tensors: Iterable[Tensor]) -> list[Place]:
    """Where external tensors are, in order.

    Raises:
        ValueError: one does not say it as exports do, is not as long as its shape, begins between two pages, or lies
            over another.
    """
    found = sorted(_place(tensor) for tensor in tensors if tensor.external)
    for first, second in pairwise(found):
        if first.location == second.location and second.begin < first.end:
            raise ValueError(f"two tensors lie at {second.begin} in {second.location[:80]}")
    return found


def _place(tensor: Tensor) -> Place:
    entries = dict(tensor.external)
    if len(entries) != len(tensor.external) or entries.keys() != {"location", "offset", "length"}:
        raise ValueError(f"tensor {tensor.name[:80]} has external data with {', '.join(sorted(entries))[:80]}")
    begin, length = _number(tensor, entries["offset"]), _number(tensor, entries["length"])
    needed = math.prod(tensor.dims) * ITEM_SIZES.get(tensor.dtype, 0)
    if length != needed:
        raise ValueError(f"tensor {tensor.name[:80]} has {length} bytes, and its shape needs {needed}")
    if begin % ALIGNMENT:
        raise ValueError(f"tensor {tensor.name[:80]} begins at {begin}, which is no multiple of {ALIGNMENT}")
    return Place(entries["location"], begin, begin + length)


def _number(tensor: Tensor, text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else _LARGEST
    if number >= _LARGEST:
        raise ValueError(f"tensor {tensor.name[:80]} has external data at {text[:80]!r}")
    return number
