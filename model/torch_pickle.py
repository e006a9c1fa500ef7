"""What the pickle of a file of `torch.save` says: names, and where tensors lie; nothing is imported, called or read.

Torch is not needed. Of the objects that a state dict or the state of an optimizer holds, only tensors matter here; the
others stand there by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpmbee.model.pickle_machine import BadPickle, PickleMachine

# Storage classes by the dtype of their numbers, and the bytes of one.
_STORAGES = {
    "Float": ("float32", 4),
    "Half": ("float16", 2),
    "BFloat16": ("bfloat16", 2),
    "Double": ("float64", 8),
    "Long": ("int64", 8),
    "Int": ("int32", 4),
    "Short": ("int16", 2),
    "Char": ("int8", 1),
    "Byte": ("uint8", 1),
    "Bool": ("bool", 1),
    "ComplexFloat": ("complex64", 8),
    "ComplexDouble": ("complex128", 16),
    "Untyped": ("bytes", 1),
}
# What may stand beside tensors, and is not looked at.
_HARMLESS = frozenset(
    {
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "builtins.complex",
        "__builtin__.complex",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
    }
)
_MAX_DIMS = 16
_GLOBAL, _STACK_GLOBAL, _REDUCE, _PERSISTENT, _BUILD = ord("c"), 0x93, ord("R"), ord("Q"), ord("b")
_EMPTY_SET, _ADD_ITEMS = 0x8F, 0x90
_EMPTY_TUPLE, _TUPLE, _TUPLES = ord(")"), ord("t"), {0x85: 1, 0x86: 2, 0x87: 3}
_LONGEST_NAME = 200


class Global(NamedTuple):
    """Something that the pickle names by module and name."""

    name: str


class Other(NamedTuple):
    """An object that is no tensor and no plain data, by the name of its class."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file.

    Attributes:
        key: by which the file knows it.
        dtype: of the numbers.
        itemsize: bytes of one.
        count: how many.
    """

    key: str
    dtype: str
    itemsize: int
    count: int


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        storage: it is a part of; None where it was saved without data.
        dtype: of its numbers.
        offset: of its first number in the storage, counted in numbers.
        shape: of the tensor.
        strides: numbers from one entry to the next, for each dimension.
    """

    storage: Storage | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class ForbiddenObject(BadPickle):
    """An object that only running code could make."""


class TorchMachine(PickleMachine):
    """Understands tensors of any dtype, parameters and ordered dicts.

    An object of the pickle may become a dict, list, tuple, text, number, `TensorPlace`, `Global` or `Other`.

    Attributes:
        storages: that it refers to, by their keys.
    """

    def __init__(self, payload: bytes, position: int = 0) -> None:
        super().__init__(payload, position)
        self.storages: dict[str, Storage] = {}

    def _step(self, code: int) -> None:
        stack = self._stack
        if code == _EMPTY_TUPLE:
            stack.append(())
        elif code == _TUPLE:
            stack.append(tuple(self._above_mark()))
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif code == _EMPTY_SET:
            stack.append(Other("builtins.set"))
        elif code == _ADD_ITEMS:
            self._above_mark()
            self._top(Other)
        elif code == _GLOBAL:
            module, name = self._line(), self._line()
            stack.append(_allowed(f"{module}.{name}"))
        elif code == _STACK_GLOBAL:
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise TypeError
            stack.append(_allowed(f"{module}.{name}"))
        elif code == _REDUCE:
            arguments, function = stack.pop(), stack.pop()
            if type(function) is not Global or type(arguments) is not tuple:
                raise TypeError
            stack.append(_made(function.name, arguments))
        elif code == _PERSISTENT:
            stack.append(self._storage(stack.pop()))
        elif code == _BUILD:  # attributes of an ordered dict: versions of modules
            stack.pop()
            self._top(dict)
        else:
            super()._step(code)

    def _storage(self, identity: Any) -> Storage:
        storage = _storage(identity)
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            raise BadPickle(f"storage {storage.key} has two lengths or dtypes")
        return known

    def _line(self) -> str:
        end = self._payload.index(b"\n", self.position, self.position + _LONGEST_NAME)
        line = self._payload[self.position : end].decode("utf-8")
        self.position = end + 1
        return line


def _allowed(name: str) -> Global:
    """A name that is known not to need running code."""
    module, _, kind = name.rpartition(".")
    known = name in _HARMLESS or name in _MAKERS
    storage = module in ("torch", "torch.storage") and kind.removesuffix("Storage") in _STORAGES
    dtype = module == "torch" and kind.islower()
    if not (known or storage or dtype):
        raise ForbiddenObject(f"holds {name}")
    return Global(name)


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    if (maker := _MAKERS.get(name)) is not None:
        return maker(*arguments)
    if name not in _HARMLESS:
        raise ForbiddenObject(f"calls {name}")
    return Other(name)


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise TypeError
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorPlace:
    return _place(storage, storage.dtype if type(storage) is Storage else "", offset, shape, strides)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> TensorPlace:
    dtype = more[2]  # behind whether it has a gradient, and its hooks
    if type(dtype) is not Global:
        raise TypeError
    return _place(storage, dtype.name.removeprefix("torch."), offset, shape, strides)


def _meta_tensor(dtype: Any, shape: Any, strides: Any, *_: Any) -> TensorPlace:
    if type(dtype) is not Global:
        raise TypeError
    return TensorPlace(None, dtype.name.removeprefix("torch."), 0, _dims(shape), _dims(strides))


def _parameter(tensor: Any, *_: Any) -> TensorPlace:
    if type(tensor) is not TensorPlace:
        raise TypeError
    return tensor


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def _place(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorPlace:
    """A tensor, which lies within its storage."""
    if type(storage) is not Storage or type(offset) is not int or offset < 0:
        raise TypeError
    shape, strides = _dims(shape), _dims(strides)
    if len(shape) != len(strides):
        raise ValueError
    if 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= storage.count:
            raise BadPickle("has a tensor that reaches over the end of its storage")
    return TensorPlace(storage, dtype, offset, shape, strides)


def _dims(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in value):
        raise TypeError
    return value


def _storage(identity: Any) -> Storage:
    """The storage that a persistent id stands for: its class, key and length."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ForbiddenObject("refers to an object outside of the file")
    kind, key, _, count = identity[1:5]
    if identity[5:] not in ((), (None,)):
        raise BadPickle("has a storage that is a view of another, as torch before 0.4 wrote them; save it again")
    if type(kind) is not Global or type(key) is not str or type(count) is not int or count < 0:
        raise TypeError
    known = _STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage"))
    if known is None:
        raise TypeError
    return Storage(key, *known, count)
