"""How the rows of a cache are stored, and the arrays that a graph wants for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.errors import ModelFolderError

if TYPE_CHECKING:
    import onnxruntime as ort

CacheType = Literal["fp32", "fp16", "int8"]
CACHE_TYPES: tuple[CacheType, ...] = ("fp32", "fp16", "int8")
CACHE_DTYPES: dict[CacheType, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}  # NumPy's names
_PRESENT = "present_"
_ELEMENTS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
}
HUGE_PAGE = 2 << 20  # bytes


def layer_tensors(cache: CacheType) -> tuple[str, ...]:
    """What keeps the keys and values of one layer; in int8 a row and head has a scale."""
    rows = ("key_cache", "value_cache")
    return (*rows, "key_scales", "value_scales") if cache == "int8" else rows


def cache_names(config: ModelConfig, cache: CacheType) -> list[str]:
    """The inputs of a model's graph that are its cache; the outputs are called ``present_`` and so on."""
    return [f"{tensor}.{n}" for n in range(len(config.attention_layers)) for tensor in layer_tensors(cache)]


class CacheArrays:
    """The cache inputs of a session, as its graph declares them.

    Args:
        session: of an exported model.

    Raises:
        ModelFolderError: the graph declares one that nobody can make.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        outputs = {value.name for value in session.get_outputs()}
        self._inputs = [value for value in session.get_inputs() if f"{_PRESENT}{value.name}" in outputs]
        for value in self._inputs:
            if value.type not in _ELEMENTS or not all(type(size) is int for size in value.shape[1:]):
                raise ModelFolderError(f"model.onnx: the cache {value.name} is {value.type} {value.shape}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(math.prod(value.shape[1:]) * _ELEMENTS[value.type].itemsize for value in self._inputs)

    def zeros(self, rows: int) -> dict[str, NDArray[Any]]:
        """An empty cache: an array (rows, ...) for each input."""
        return {value.name: _huge_zeros((rows, *value.shape[1:]), _ELEMENTS[value.type]) for value in self._inputs}


def _huge_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that begin where a huge page can.

    NumPy asks for huge pages, but those before the first such address would be small: a step that is the first to write
    a row would wait for one small page after the other, and reading a row would look up each of its pages.
    """
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + HUGE_PAGE, np.uint8)
    start = -room.ctypes.data % HUGE_PAGE
    return room[start : start + size].view(dtype).reshape(shape)
