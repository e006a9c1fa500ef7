"""Which exceptions are ONNX Runtime's, in whose calls signal handlers run, too."""

from __future__ import annotations

from types import TracebackType

_PACKAGE = "onnxruntime"


def is_runtime_error(error: Exception) -> bool:
    """Whether an exception that came out of a call of ONNX Runtime is its own.

    Its classes have no common base but `Exception`, and what its C++ throws may be a plain `RuntimeError`. What a
    signal handler raises (the soft time limit of a task queue) was raised by a function of somebody else.
    """
    if type(error).__module__.partition(".")[0] == _PACKAGE:
        return True
    traceback: TracebackType | None = error.__traceback__
    if traceback is None:
        return False
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return len(frames) > 1 and frames[-1].f_globals.get("__name__", "").partition(".")[0] == _PACKAGE


def first_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
