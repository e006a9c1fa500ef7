"""ONNX Runtime, imported when it is first needed, with its reports on usage switched off."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from cpmbee.errors import DependencyError

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_NUMPY_2 = (1, 19)  # the first ONNX Runtime that was built for NumPy 2


def import_onnxruntime() -> Any:
    """ONNX Runtime, which is not a plain dependency because its CPU and GPU builds exclude each other.

    From 1.29 on it reports its use over the network and keeps an identifier and a database of events in the home
    folder, decided at its import. That is switched off here unless the environment sets ``ORT_DISABLE_TELEMETRY``
    itself, so nothing in this project imports ONNX Runtime in another way.

    Raises:
        DependencyError: it is missing, cannot be imported, or both builds are installed.
    """
    installed = {name: version for name in ("onnxruntime", "onnxruntime-gpu") if (version := _version(name))}
    if len(installed) > 1:
        raise DependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, "
            'then pip install "cpmbee[cpu]" or "cpmbee[gpu]"'
        )
    switch_off_telemetry()
    before = sys.exc_info()[1]  # that a caller is handling; no cause of what happens here
    try:
        import onnxruntime
    except Exception as error:
        causes = list(_causes(error, before))
        for cause in causes:
            if isinstance(cause, KeyboardInterrupt):  # extension modules that are interrupted report an ImportError
                raise cause from None
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise DependencyError('ONNX Runtime is missing; pip install "cpmbee[cpu]" brings it') from None
        reason = ", because of ".join(map(_described, causes))
        raise DependencyError(f"ONNX Runtime cannot be imported: {reason}{_about_versions(installed)}") from error
    return onnxruntime


def switch_off_telemetry() -> None:
    """Tell ONNX Runtime, and what is built on it, not to report its use, unless the user has said what it should do."""
    os.environ.setdefault(NO_TELEMETRY, "1")


def release(version: str) -> tuple[int, ...]:
    """The numbers a version begins with; none of one that does not begin with any."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _causes(error: BaseException | None, end: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on, until ``end``."""
    seen: set[int] = set()
    while error is not None and error is not end and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _described(error: BaseException) -> str:
    name, text = type(error).__name__, str(error).strip()
    return f"{name} ({text.splitlines()[0]})" if text else name


def _about_versions(installed: dict[str, str]) -> str:
    """What is installed, and what to do where the two are known not to fit each other."""
    import numpy as np

    names = [*(f"{name} {version}" for name, version in installed.items()), f"NumPy {np.__version__}"]
    text = f"; installed are {' and '.join(names)}"
    for name, version in installed.items():
        if (0,) < release(version) < _NUMPY_2 and release(np.__version__) >= (2,):
            text += f', which do not fit each other; pip install "{name}>=1.19" or "numpy<2"'
    return text


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
