"""Types and shapes of the values in a graph, with sizes that are known and sizes that a call brings.

Symbols of sizes: B sequences, Q new tokens, K keys, R positions that get logits, E extension tokens, P cache rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Size(NamedTuple):
    """A number times symbols, as in ``4096 * B * R``; the number -1 alone in a shape to be is "whatever is left"."""

    number: int
    symbols: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "*".join([*([str(self.number)] if self.number != 1 or not self.symbols else []), *self.symbols])


ONE, REST = Size(1), Size(-1)


class Value(NamedTuple):
    """What is known of a value before anything runs.

    Attributes:
        dtype: number of its ``DataType``.
        shape: its sizes.
        content: the numbers themselves, where it is a small vector of them that shapes are made of.
        stored: whether it is in the file, or is such a value in another dtype.
        source: what it was before it was cast: the name of an input of the graph or of a tensor in the file.
    """

    dtype: int
    shape: tuple[Size, ...]
    content: tuple[Size, ...] | None = None
    stored: bool = False
    source: str = ""


def product(sizes: Iterable[Size]) -> Size:
    """All of them multiplied."""
    number = 1
    symbols: list[str] = []
    for size in sizes:
        number *= size.number
        symbols += size.symbols
    return Size(number, tuple(sorted(symbols)))


def quotient(whole: Size, part: Size) -> Size:
    """``whole / part``.

    Raises:
        ValueError: that is not a whole number for every value of the symbols.
    """
    left = Counter(whole.symbols)
    left.subtract(part.symbols)
    if part.number < 1 or whole.number % part.number or min(left.values(), default=0) < 0:
        raise ValueError(f"{whole} values do not make rows of {part}")
    return Size(whole.number // part.number, tuple(sorted(left.elements())))


def total(first: Size, second: Size) -> Size:
    """The sum of two sizes, of which the first is known.

    Raises:
        ValueError: it is not, or the second is no plain symbol.
    """
    if first.symbols or (second.symbols and (second.number != 1 or len(second.symbols) > 1)):
        raise ValueError(f"sizes {first} and {second} are not added")
    if second.symbols:
        return Size(1, (f"{first.number}+{second.symbols[0]}",))
    return Size(first.number + second.number)


def broadcast(first: tuple[Size, ...], second: tuple[Size, ...]) -> tuple[Size, ...]:
    """The shape of a sum or product.

    Raises:
        ValueError: the two do not go together.
    """
    if len(first) < len(second):
        first, second = second, first
    second = (ONE,) * (len(first) - len(second)) + second
    sizes = []
    for one, other in zip(first, second, strict=True):
        if one != other and ONE not in (one, other):
            raise ValueError(f"shapes {shown(first)} and {shown(second)} do not go together")
        sizes.append(other if one == ONE else one)
    return tuple(sizes)


def reshaped(shape: tuple[Size, ...], wanted: tuple[Size, ...]) -> tuple[Size, ...]:
    """A shape of as many values, in which one size may be `REST`.

    Raises:
        ValueError: it has not as many values.
    """
    rest = quotient(product(shape), product(size for size in wanted if size != REST))
    if wanted.count(REST) > 1 or (REST not in wanted and rest != ONE):
        raise ValueError(f"shape {shown(shape)} does not become {shown(wanted)}")
    return tuple(rest if size == REST else size for size in wanted)


def shown(shape: Iterable[Size]) -> str:
    """A shape for a message."""
    return f"({', '.join(map(str, shape))})"
