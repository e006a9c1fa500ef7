"""The ONNX Runtime session behind the engine: pre-bound buffers, the cache bound in place, native kernels."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cpmbee import native, threads
from cpmbee.cache_types import CacheArrays, cache_names
from cpmbee.errors import CacheFullError, ConfigError, InferenceError, ModelFolderError
from cpmbee.folder import ModelFolder
from cpmbee.forks import keep_in_children
from cpmbee.machine import physical_cores, physical_memory
from cpmbee.onnxruntime_errors import first_line, is_runtime_error
from cpmbee.onnxruntime_import import import_onnxruntime
from cpmbee.option_values import plain_number, shown
from cpmbee.runner import Backend, Runner, RunStopped

if TYPE_CHECKING:
    import onnxruntime as ort

DEFAULT_CACHE_TOKENS = 8192
MEMORY_SHARE = 4  # the default cache takes at most this part of the memory
SHRINK_TOKENS = 512  # runs of more tokens give their working memory back
SHORT_TOKENS = 64  # runs of at most so many cannot be stopped: being ready for it costs 40 microseconds each
MAX_THREADS = 1024
_INPUTS = ("input_ids", "input_subs", "relation", "slots", "new_slots", "logits_index", "ext_ids", "ext_subs")

_log = logging.getLogger("cpmbee")


class OrtBackend(Backend):
    """A model folder in an ONNX Runtime session.

    Args:
        folder: the checked folder.
        device: ``"auto"`` or ``"cpu"``.
        num_threads: of one run; 0 takes one for each physical core, or fewer where a small model gains nothing by them.
        cache_tokens: rows of the cache; 0 takes the default.
        native: with the native kernels, if they are built.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str = "auto",
        num_threads: int = 0,
        cache_tokens: int = 0,
        *,
        native: bool = True,
    ) -> None:
        if device not in ("auto", "cpu"):
            raise ConfigError(f'device must be "auto" or "cpu", not {shown(device)}')
        num_threads, cache_tokens = plain_number(num_threads), plain_number(cache_tokens)
        if type(num_threads) is not int or not 0 <= num_threads <= MAX_THREADS:
            raise ConfigError(f"num_threads must be an integer from 0 to {MAX_THREADS}, not {shown(num_threads)}")
        self._ort = import_onnxruntime()
        self.config = folder.config
        if type(cache_tokens) is not int or not 0 <= cache_tokens < 1 << 30:
            raise ConfigError(f"cache_tokens must be an integer from 0 to {(1 << 30) - 1}, not {shown(cache_tokens)}")
        self._native = native
        self._lock = threading.RLock()  # re-entrant: a signal handler may generate, too
        self._guard = threading.Lock()  # held while runners are lent and returned, never while one runs
        self._idle: list[OrtRunner] = []
        self._runners: weakref.WeakSet[OrtRunner] = weakref.WeakSet()
        self.num_threads = num_threads or (1 if folder.weight_bytes < threads.SMALL_MODEL_BYTES else physical_cores())
        session = self._open(folder, self.num_threads)
        arrays = CacheArrays(session)
        self._row_bytes = arrays.row_bytes
        self.cache_rows = cache_tokens or _default_cache_rows(self._row_bytes)
        self._caches = self._make_caches(arrays)
        if num_threads == 0 and self.num_threads < physical_cores():
            session = self._with_threads_that_pay(folder, session)
        self._session: ort.InferenceSession | None = session
        keep_in_children(session)
        _log.info(
            "loaded %s: %d threads%s, cache of %d tokens, kernels %s",
            *(folder.path, self.num_threads, "" if num_threads else " by default", self.cache_rows, self.native_ops),
        )

    @property
    def native_ops(self) -> dict[str, str]:
        """For each custom op, the instruction set of its native kernel, or ``"function"``."""
        if not self._native:
            return dict.fromkeys(native.OPS, "function")
        return native.kernels()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache rows, row 0 (scratch) counted; memory is taken as rows are first written."""
        return (self.cache_rows + 1) * self._row_bytes

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner for one thread; its bindings are kept for the next borrower.

        Raises:
            InferenceError: the backend is closed.
        """
        with self._guard:
            if self._session is None:
                raise _closed()
            runner = self._idle.pop() if self._idle else None
            if runner is None:
                runner = OrtRunner(self._ort, self._session, self._lock, self._caches, self.config.vocab_size)
                self._runners.add(runner)
        runner.lend()
        try:
            yield runner
        finally:
            with self._guard:
                if self._session is not None:
                    runner.forget()
                    self._idle.append(runner)

    def close(self) -> None:
        """Give weights, threads and caches back, once the run that is being made has ended."""
        with self._guard:
            self._session = None
            runners = list(self._runners)
            self._idle.clear()
        with self._lock:
            for runner in runners:
                runner.close()
            self._caches = {}

    def _with_threads_that_pay(self, folder: ModelFolder, session: ort.InferenceSession) -> ort.InferenceSession:
        """The session of those threads that a small model runs fastest with."""
        sessions = {self.num_threads: session}

        def seconds(count: int) -> float:
            tried = sessions[count] = sessions.get(count) or self._open(folder, count)
            return threads.request_seconds(
                OrtRunner(self._ort, tried, self._lock, self._caches, self.config.vocab_size)
            )

        self.num_threads = threads.choose(physical_cores(), seconds)
        return sessions[self.num_threads]

    def _open(self, folder: ModelFolder, num_threads: int) -> ort.InferenceSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # one plan for each shape would pile up, and shapes change all the time
        options.log_severity_level = 3
        threads.bound_spinning(options, self._ort.__version__)
        if self._native:
            native.register(options)
        if "function" in self.native_ops.values() and (
            reason := native.why_no_bodies(folder.precision.values(), self._ort.__version__)
        ):
            raise ModelFolderError(f"{folder.path}: {reason}")
        try:
            session = self._ort.InferenceSession(str(folder.model), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not is_runtime_error(error):
                raise
            raise ModelFolderError(f"{folder.model}: ONNX Runtime cannot load it ({first_line(error)})") from error
        found = {value.name for value in session.get_inputs()}
        if missing := {*_INPUTS, *cache_names(folder.config, folder.cache)} - found:
            raise ModelFolderError(f"{folder.model}: the graph has no input {', '.join(sorted(missing))}")
        return session

    def _make_caches(self, arrays: CacheArrays) -> dict[str, ort.OrtValue]:
        value = self._ort.OrtValue.ortvalue_from_numpy
        try:  # zeros that the system hands out page by page, as rows are first written
            return {name: value(array) for name, array in arrays.zeros(self.cache_rows + 1).items()}
        except (MemoryError, ValueError):  # the latter where NumPy cannot even count the bytes
            raise CacheFullError(
                f"no memory for a cache of {self.cache_rows} tokens; load the engine with a smaller cache_tokens"
            ) from None


class OrtRunner(Runner):
    """Arrays bound to the session; a change of shape binds new ones, the caches stay bound.

    It knows the session and not the backend, which keeps idle runners: no cycle holds a model that nobody uses.
    """

    def __init__(
        self,
        ort: Any,
        session: ort.InferenceSession,
        lock: threading.RLock,
        caches: Mapping[str, ort.OrtValue],
        vocab_size: int,
    ) -> None:
        super().__init__(vocab_size)
        self._ort = ort
        self._session: ort.InferenceSession | None = session
        self._lock = lock
        self._binding = session.io_binding()
        self._loan = _Loan(ort)
        self._tokens = 0
        for name, value in caches.items():  # as input and as output: kernels then write new rows in place
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"present_{name}", value)

    def lend(self) -> None:
        """Belong to a new borrower, whose calls nobody has stopped."""
        self._loan = _Loan(self._ort)

    def reshape(self, batch: int, queries: int, keys: int, ext: int, outputs: int = 1) -> None:  # noqa: D102
        binding = self._binding
        if binding is None:
            raise _closed()
        super().reshape(batch, queries, keys, ext, outputs)
        value = self._ort.OrtValue.ortvalue_from_numpy
        for name in _INPUTS:
            binding.bind_ortvalue_input(name, value(getattr(self, name)))
        binding.bind_ortvalue_output("logits", value(self.logits))
        self._tokens = batch * queries

    def run(self) -> None:
        """Call the graph. One call at a time: all of them write to the same cache.

        Raises:
            InferenceError: ONNX Runtime refuses, be it for lack of memory; says why. Or the engine was closed.
            RunStopped: the borrower's `stopper` was called.
        """
        loan = self._loan
        options = loan.shrinking if self._tokens > SHRINK_TOKENS else loan.options
        if self._tokens <= SHORT_TOKENS:
            options = None
        try:
            with self._lock:
                session, binding = self._session, self._binding
                if session is None or binding is None:
                    raise _closed()
                if loan.stopped:
                    raise RunStopped
                session.run_with_iobinding(binding, options)
        except Exception as error:
            if not is_runtime_error(error):
                raise
            if loan.stopped:
                raise RunStopped from None
            raise InferenceError(f"ONNX Runtime cannot run the model ({first_line(error)})") from error

    def stopper(self) -> Callable[[], None]:
        """Ends the call that is being made, between two nodes if it is a long one, and refuses any other."""
        return self._loan.stop

    def forget(self) -> None:
        """Let go of large arrays; the runner is usable after the next `reshape`."""
        self.reshape(1, 1, 1, 0)

    def close(self) -> None:
        """Let go of the session and all that is bound to it."""
        self._session = None
        self._binding = None


class _Loan:
    """What one borrower's calls are made with, so that whoever stops them late stops nobody else's.

    Attributes:
        options: of calls that last, which can be ended.
        shrinking: of calls after which working memory is given back.
        stopped: no call is wanted any more.
    """

    def __init__(self, ort: Any) -> None:
        self.options = ort.RunOptions()
        self.shrinking = ort.RunOptions()
        self.shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.options.terminate = True
        self.shrinking.terminate = True


def _closed() -> InferenceError:
    return InferenceError("the engine is closed; load it again")


def _default_cache_rows(row_bytes: int) -> int:
    return max(256, min(DEFAULT_CACHE_TOKENS, physical_memory() // MEMORY_SHARE // max(1, row_bytes)))
