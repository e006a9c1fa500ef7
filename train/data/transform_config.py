"""The ``transforms`` of a mixture: from their JSON to the transforms they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import CodeType
from typing import Any

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.data.formats import PerturbFormat
from cpmbee.train.data.mapping import FieldMapping
from cpmbee.train.data.records import Record
from cpmbee.train.data.text_transforms import ContinueText, MaskSpans
from cpmbee.train.data.transform import ANSWER, Apply, Chain, Choice, Identity, Transform

READY: Mapping[str, type[MaskSpans] | type[ContinueText] | type[PerturbFormat]] = {
    "mask_spans": MaskSpans,
    "continue_text": ContinueText,
    "perturb_format": PerturbFormat,
}
_NUMBERS = {"int": int, "float": (int, float), "str": str}
_ENTRY = "transform"


class ScriptTransform:
    """A Python file with ``transform(data, num_samples, rng)``: the record as a dict, how many in-context examples the
    sample has, and a ``numpy.random.Generator`` that any chance must come from.

    The file is run with the rights of this process, like any program.

    Args:
        path: of the file, for messages.
        source: what is in it.

    Raises:
        DataError: it cannot be compiled or run, or has no such function.
    """  # noqa: D205

    def __init__(self, path: str, source: str) -> None:
        try:
            code: CodeType = compile(source, path, "exec")
            namespace: dict[str, Any] = {"__name__": "cpmbee_transform", "__file__": path}
            exec(code, namespace)  # noqa: S102  (what the user names is what the user runs)
        except Exception as error:
            raise DataError(f"{path}: cannot be run ({type(error).__name__}: {error})") from error
        function = namespace.get(_ENTRY)
        if not callable(function):
            raise DataError(f"{path}: has no function {_ENTRY}(data, num_samples, rng)")
        try:
            inspect.signature(function).bind({}, 0, None)
        except TypeError:
            raise DataError(f"{path}: {_ENTRY} must take (data, num_samples, rng)") from None
        self._function: Callable[[Record, int, np.random.Generator], Record] = function

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `cpmbee.train.data.transform.Transform.plan`."""
        return self._function


def parse_transforms(raw: Any, scripts: Mapping[str, str]) -> Transform:
    """The transforms of one data set of a mixture.

    Args:
        raw: the path of a Python file; or a list of which one item is drawn for each sample: a mapping, a ready
            transform (``{"name": "mask_spans", ...}``), or a list of these that are applied in turn. None takes records
            as they are.
        scripts: what is in the Python files that the mixture names.

    Raises:
        DataError: it cannot be understood; says where.
    """
    if raw is None:
        return Identity()
    if isinstance(raw, str):
        return ScriptTransform(raw, scripts[raw])
    if not isinstance(raw, list) or not raw:
        raise DataError("expected a list of transforms that is not empty, or the path of a Python file")
    options: list[Transform] = []
    for number, item in enumerate(raw):
        try:
            options.append(Chain([_parse_item(step) for step in item]) if isinstance(item, list) else _parse_item(item))
        except DataError as error:
            raise DataError(f"item {number}: {error}") from None
    return Choice(options)


def _parse_item(item: Any) -> Transform:
    if not isinstance(item, dict):
        raise DataError(f"expected a mapping or a ready transform, not {type(item).__name__}")
    name = item.get("name")
    answers = any(key == "*" or key == ANSWER or key.startswith(f"{ANSWER}.") for key in item)
    if answers or not isinstance(name, str):
        return FieldMapping(item)
    if name not in READY:
        raise DataError(f"no ready transform is called {name!r}; there are {', '.join(READY)}")
    kind = READY[name]
    known = {field.name: str(field.type) for field in fields(kind) if field.default is not MISSING}
    given = {key: value for key, value in item.items() if key != "name"}
    for key, value in given.items():
        if key not in known:
            raise DataError(f"{name} has no option {key!r}; it has {', '.join(known)}")
        if not isinstance(value, _NUMBERS[known[key]]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise DataError(f"{name}: {key} must be of type {known[key]}, not {value!r}")
    try:
        return kind(**given)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
