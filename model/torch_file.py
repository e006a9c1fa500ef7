"""A state dict written by `torch.save`, read by its pickle's word and the file's own size: no code of it is run.

Files of the zip format (torch 1.6 and later) hold a pickle and one record of raw numbers for each storage; older ones a
few pickles and then the storages end to end. In both the numbers are mapped when a tensor is read.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cpmbee.errors import CheckpointError
from cpmbee.model.arrays import Array, map_bytes, numpy_dtype, unsupported_dtype
from cpmbee.model.pickle_machine import BadPickle
from cpmbee.model.torch_pickle import ForbiddenObject, Global, Other, TensorPlace, TorchMachine
from cpmbee.model.zip_directory import ZIP_MAGIC, read_at, read_directory
from cpmbee.regular_file import open_regular

MAX_PICKLE_BYTES = 16 << 20
_WRAPPERS = ("state_dict", "model")  # below which training scripts save a state dict beside other things
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = ("float32", "float16", "bfloat16")
_MOST_SHARED = 2  # bytes of all tensors for each byte of the file: an output head may share the embedding's


class TorchFile:
    """A `cpmbee.model.tensor_files.TensorFile` of a state dict, or of a dict that has one under a usual name.

    Raises:
        CheckpointError: the file is damaged, is not by ``torch.save``, or holds something else; says what.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path, "a torch file", CheckpointError) as file:
            try:
                size = file.seek(0, 2)
                file.seek(0)
                zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
                saved, begins = _read_zipped(file, size) if zipped else _read_legacy(file, size)
            except ForbiddenObject as error:
                raise CheckpointError(
                    f"{path}: {error}; objects other than tensors and plain data are refused because loading them can "
                    "run code"
                ) from None
            except (BadPickle, OSError, struct.error) as error:
                raise CheckpointError(f"{path}: damaged or not a torch file ({error})") from None
        self._begins = begins
        self._tensors = _tensors(path, saved, size)

    def names(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """``float32``, ``float16`` or ``bfloat16``."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Array:
        """One tensor: a copy-on-write map of the file, where its numbers lie there in order."""
        place, dtype = self._tensors[name], numpy_dtype(self.dtype(name))
        if place.storage is None or 0 in place.shape:
            return np.empty(place.shape, dtype)
        span = 1 + sum((n - 1) * stride for n, stride in zip(place.shape, place.strides, strict=True))
        begin = self._begins[place.storage.key] + place.offset * dtype.itemsize
        numbers = map_bytes(self.path, name, begin, span * dtype.itemsize).view(dtype)
        strides = [stride * dtype.itemsize for stride in place.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, place.shape, strides))


def _read_zipped(file: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """The saved object, and where each storage begins."""
    records = read_directory(file, size)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise BadPickle("its archive has no data.pkl, or several")
    folder = pickles[0].removesuffix("data.pkl")
    begin, length = records[pickles[0]]
    if length > MAX_PICKLE_BYTES:
        raise BadPickle(f"its data.pkl has {length} bytes, a state dict's at most {MAX_PICKLE_BYTES}")
    order = records.get(f"{folder}byteorder")
    if order is not None and read_at(file, order.begin, min(order.size, 9)) != b"little":
        raise BadPickle("its numbers are not little-endian")
    machine = TorchMachine(read_at(file, begin, length))
    saved = machine.run()
    begins = {}
    for storage in machine.storages.values():
        begin, length = records.get(f"{folder}data/{storage.key}", (0, -1))
        needed = storage.count * storage.itemsize
        if length < needed:
            raise BadPickle(f"storage {storage.key} has {max(length, 0)} bytes instead of {needed}")
        begins[storage.key] = begin
    return saved, begins


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """The saved object, and where each storage begins."""
    head = read_at(file, 0, min(size, MAX_PICKLE_BYTES))
    position = 0
    machines, parts = [], []
    for _ in range(5):  # magic number, protocol, the machine that wrote it, the object, keys of its storages
        machines.append(TorchMachine(head, position))
        parts.append(machines[-1].run())
        position = machines[-1].position
        if parts[0] != _LEGACY_MAGIC:
            raise BadPickle("it does not begin like one")
    machine = machines[3]
    _, protocol, system, saved, keys = parts
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadPickle("it is of an unknown protocol, or its numbers are big-endian")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(machine.storages):
        raise BadPickle("its storages are not those of its tensors")
    begins = {}
    for key in map(str, keys):
        storage = machine.storages[key]
        (count,) = struct.unpack("<q", read_at(file, position, 8))
        begins[key] = position + 8
        position += 8 + count * storage.itemsize
        if count != storage.count or position > size:
            raise BadPickle(f"storage {key} is cut off, or its length is not the one announced")
    return saved, begins


def _tensors(path: Path, saved: Any, size: int) -> dict[str, TensorPlace]:
    """The state dict of a saved object, checked."""
    state = _state_dict(path, saved)
    for name, value in state.items():
        if type(name) is not str or type(value) is not TensorPlace:
            raise CheckpointError(f"{path}: {name!r} is a {_kind(value)}; expected a flat dict of named tensors")
        if value.storage is None:
            raise CheckpointError(f"{path}: {name} was saved without its data (on the meta device)")
        if value.dtype not in _DTYPES:
            raise unsupported_dtype(path, name, value.dtype)
        if math.prod(value.shape) > value.storage.count:  # one number, repeated: reading it would spread it out
            raise CheckpointError(f"{path}: {name} holds fewer numbers than its shape {value.shape} has")
    if sum(math.prod(place.shape) * place.storage.itemsize for place in state.values()) > _MOST_SHARED * size:
        raise CheckpointError(f"{path}: its tensors share their numbers; save each of them with its own")
    return state


def _state_dict(path: Path, saved: Any) -> dict[Any, Any]:
    if type(saved) is not dict:
        raise CheckpointError(f"{path}: holds a {_kind(saved)}, expected a dict of tensors")
    wrapped = [name for name in _WRAPPERS if type(saved.get(name)) is dict]
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{path}: has a dict in each of {', '.join(wrapped)}; save the one with the weights alone"
        )
    state: dict[Any, Any] = saved[wrapped[0]] if wrapped else saved
    return state


def _kind(value: Any) -> str:
    if isinstance(value, (Global, Other)):
        return value.name
    return "tensor" if isinstance(value, TensorPlace) else type(value).__name__
