"""ONNX's own operators in the graphs that exports write: what each may look like, and what comes out of it.

A rule knows only what an export needs of its operator. Whatever else the operator could do is refused, for it was
never tried whether a runtime survives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpmbee.cache_types import CacheType
from cpmbee.config import ModelConfig
from cpmbee.graph_proto import DTYPE_NAMES, FLOAT, FLOAT16, INT32, INT64, Node, Reference, Tensor
from cpmbee.graph_values import ONE, REST, Size, Value, broadcast, quotient, reshaped, shown, total

MAX_RANK = 4
SUBSCRIPTS, INDEX = ("input_subs", "ext_subs"), "logits_index"  # inputs of the graph whose numbers are computed with


class Call(NamedTuple):
    """A node whose inputs are known.

    Attributes:
        node: itself; it has the attributes, inputs and outputs that its operator asks for.
        inputs: what goes in.
        config: of the model.
        cache: how cache rows are stored.
    """

    node: Node
    inputs: tuple[Value, ...]
    config: ModelConfig
    cache: CacheType

    def integer(self, name: str) -> int:
        """An attribute that is an integer."""
        value = self.node.attributes.get(name)
        if type(value) is not int:
            raise ValueError(f"{name} is not an integer")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of integers."""
        value = self.node.attributes.get(name)
        if not isinstance(value, tuple) or isinstance(value, (Tensor, Reference)):
            raise ValueError(f"{name} is not a list of integers")
        return value


@dataclass(frozen=True)
class Operator:
    """An operator that a graph may use.

    Attributes:
        infer: gives what comes out of a node, None for an output that must not be asked for; raises ``ValueError``
            where the node is not as an export writes it.
        inputs: how many there are, or the numbers of them that there may be.
        outputs: likewise.
        attributes: their names and types; every node has all of them. None where ``infer`` looks at them itself.
        stored: inputs that must be tensors of the file; all others must not.
        either: inputs that may be such tensors or not.
        per_block: how many nodes there are at most for each attention and feed-forward block.
        beside: how many there may be beside those.
        keeps_rows: whether it writes caches, and reads a table that all such nodes share.
        variant: for an operator of which there are several bodies, which of them fits a node.
    """

    infer: Callable[[Call], Sequence[Value | None]]
    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...] = 1
    attributes: Mapping[str, type] | None = field(default_factory=dict)
    stored: tuple[int, ...] = ()
    either: tuple[int, ...] = ()
    per_block: int = 0
    beside: int = 2
    keeps_rows: bool = False
    variant: Callable[[Call], str] | None = None


def require(value: Value, dtype: int, *shape: Size) -> None:
    """Refuse a value of another dtype, or of another shape where one is given.

    Raises:
        ValueError: says what it is and what it should be.
    """
    if value.dtype != dtype or (shape and value.shape != shape):
        found, wanted = DTYPE_NAMES.get(value.dtype, "unknown"), DTYPE_NAMES[dtype]
        raise ValueError(
            f"an input is {found} {shown(value.shape)} and should be {wanted} {shown(shape) if shape else ''}".rstrip()
        )


def known(size: Size) -> int:
    """A size that does not depend on the call.

    Raises:
        ValueError: it does.
    """
    if size.symbols:
        raise ValueError(f"a size is {size} and should be known")
    return size.number


def last(value: Value) -> Size:
    """The size of a value's last axis.

    Raises:
        ValueError: it has no axes.
    """
    if not value.shape:
        raise ValueError("an input has no axes")
    return value.shape[-1]


def _gather(call: Call) -> list[Value]:
    table, ids = call.inputs
    if call.integer("axis") != 0 or len(table.shape) != 2 or table.dtype not in (FLOAT, FLOAT16):
        raise ValueError("it does not take rows of a matrix")
    require(ids, INT32)
    return [Value(table.dtype, (*ids.shape, table.shape[1]))]


def _cast(call: Call) -> list[Value]:
    (value,) = call.inputs
    to = call.integer("to")
    allowed = {(FLOAT16, FLOAT)}
    if not value.stored:
        allowed.add((FLOAT, FLOAT16))
    if value.source in SUBSCRIPTS:
        allowed.add((INT32, FLOAT))
    if value.source == INDEX:
        allowed.add((INT32, INT64))
    if (value.dtype, to) not in allowed:
        raise ValueError(f"it casts {DTYPE_NAMES.get(value.dtype, 'unknown')} to type {to}")
    return [value._replace(dtype=to)]


def _elementwise(call: Call) -> list[Value]:
    first, second = call.inputs
    require(first, FLOAT)
    require(second, FLOAT)
    if second.stored and len(second.shape) > 1:
        raise ValueError("its second input is a matrix")
    return [Value(FLOAT, broadcast(first.shape, second.shape))]


def _same(call: Call) -> list[Value]:
    require(call.inputs[0], FLOAT)
    return [Value(FLOAT, call.inputs[0].shape)]


def _unsqueeze(call: Call) -> list[Value]:
    value, axes = call.inputs
    if axes.content != (REST,):  # -1
        raise ValueError("its axis is not the last one")
    return [Value(value.dtype, (*value.shape, ONE))]


def _split(call: Call) -> list[Value]:
    (value,) = call.inputs
    require(value, FLOAT)
    if call.integer("axis") != -1 or call.integer("num_outputs") != 2:
        raise ValueError("it does not halve the last axis")
    known(last(value))
    return [Value(FLOAT, (*value.shape[:-1], quotient(last(value), Size(2))))] * 2


def _concat(call: Call) -> list[Value]:
    first, second = call.inputs
    rank, axis = len(first.shape), call.integer("axis")
    if not rank or len(second.shape) != rank or not -rank <= axis < rank:
        raise ValueError(f"its axis is {axis}, its inputs have {rank} and {len(second.shape)} axes")
    if first.content is not None and second.content is not None and rank == 1:
        content = first.content + second.content
        if len(content) > MAX_RANK:
            raise ValueError(f"it makes a shape of {len(content)} axes")
        return [Value(INT64, (Size(len(content)),), content)]
    require(first, FLOAT)
    require(second, FLOAT)
    if first.stored or second.stored:
        raise ValueError("it joins stored tensors")
    axis %= rank
    if (*first.shape[:axis], *first.shape[axis + 1 :]) != (*second.shape[:axis], *second.shape[axis + 1 :]):
        raise ValueError(f"shapes {shown(first.shape)} and {shown(second.shape)} do not go together")
    joined = total(first.shape[axis], second.shape[axis])
    return [Value(FLOAT, (*first.shape[:axis], joined, *first.shape[axis + 1 :]))]


def _transpose(call: Call) -> list[Value]:
    (value,), perm = call.inputs, call.integers("perm")
    require(value, FLOAT)
    if sorted(perm) != list(range(len(value.shape))):
        raise ValueError(f"perm is {perm}, and its input has {len(value.shape)} axes")
    return [Value(FLOAT, tuple(value.shape[axis] for axis in perm))]


def _reshape(call: Call) -> list[Value]:
    value, shape = call.inputs
    require(value, FLOAT)
    if shape.content is None:
        raise ValueError("its shape is not known")
    return [Value(FLOAT, reshaped(value.shape, shape.content))]


def _shape(call: Call) -> list[Value]:
    shape = call.inputs[0].shape
    return [Value(INT64, (Size(len(shape)),), shape)]


def _matmul(call: Call) -> list[Value]:
    left, right = call.inputs
    require(left, FLOAT)
    require(right, FLOAT)
    if left.stored and right.stored:
        raise ValueError("it multiplies two stored matrices")
    if len(left.shape) not in (2, 3) or len(right.shape) != 2 or last(left) != right.shape[0]:
        raise ValueError(f"shapes {shown(left.shape)} and {shown(right.shape)} do not go together")
    known(right.shape[0])
    return [Value(FLOAT, (*left.shape[:-1], right.shape[1]))]


def _gather_nd(call: Call) -> list[Value]:
    value, index = call.inputs
    require(value, FLOAT)
    require(index, INT64)
    if call.integer("batch_dims") != 1:
        raise ValueError(f"batch_dims is {call.integer('batch_dims')} and should be 1")
    if len(value.shape) != 3 or len(index.shape) != 3 or index.shape[::2] != (value.shape[0], ONE):
        raise ValueError(f"shapes {shown(value.shape)} and {shown(index.shape)} do not go together")
    return [Value(FLOAT, (*index.shape[:2], value.shape[2]))]


# As many of each as a model has in which norms, gates and rotations are written in these operators, weights in fp16.
STANDARD: dict[tuple[str, str], Operator] = {
    ("", "Add"): Operator(_elementwise, 2),
    ("", "Cast"): Operator(_cast, 1, attributes={"to": int}, either=(0,), per_block=2, beside=14),
    ("", "Concat"): Operator(_concat, 2, attributes={"axis": int}, either=(0, 1), beside=4),
    ("", "Cos"): Operator(_same, 1),
    ("", "Gather"): Operator(_gather, 2, attributes={"axis": int}, stored=(0,)),
    ("", "GatherND"): Operator(_gather_nd, 2, attributes={"batch_dims": int}),
    ("", "MatMul"): Operator(_matmul, 2, either=(0, 1), per_block=2),
    ("", "Mul"): Operator(_elementwise, 2, either=(1,), per_block=2, beside=10),
    ("", "Reshape"): Operator(_reshape, 2, either=(1,)),
    ("", "Shape"): Operator(_shape, 1),
    ("", "Sin"): Operator(_same, 1),
    ("", "Split"): Operator(_split, 1, 2, attributes={"axis": int, "num_outputs": int}, per_block=1),
    ("", "Transpose"): Operator(_transpose, 1, attributes={"perm": tuple}),
    ("", "Unsqueeze"): Operator(_unsqueeze, 2, stored=(1,), beside=3),
}
