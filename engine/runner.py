"""The seam between search and model: one call of the graph, with its inputs and outputs as plain arrays.

Everything above (scheduler, searches, cache pool) is the same whether the model is an ONNX Runtime session or the
PyTorch reference; a `Backend` makes runners, a `Runner` owns the arrays of one call and knows how to make it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from cpmbee.config import ModelConfig
from cpmbee.errors import InferenceError

Int32 = npt.NDArray[np.int32]


class RunStopped(Exception):  # noqa: N818 - a caller's wish, no error
    """A run was ended early, because nobody wants its result any more; never leaves the engine."""


class Runner(ABC):
    """Arrays of one call of the graph; write them, `run`, read ``logits``.

    Attributes:
        input_ids: (batch, queries) int32 vocabulary ids.
        input_subs: (batch, queries) int32 subscripts of special and unknown tokens.
        relation: (batch, queries, keys) int16 rows of the bias table, -1 where a query may not look.
        slots: (batch, keys) int32 cache rows of each sequence's keys; 0 is padding.
        new_slots: (batch, queries) int32 cache rows for the new keys and values; 0 is padding.
        logits_index: (batch, outputs) int32 queries whose logits are wanted, one of each sequence most of the time.
        ext_ids: (ext,) int32 base ids of the extension vocabulary.
        ext_subs: (ext,) int32 its subscripts.
        logits: (batch, outputs, vocabulary + ext) float32; the caller may overwrite it after `run`.
    """

    input_ids: Int32
    input_subs: Int32
    relation: npt.NDArray[np.int16]
    slots: Int32
    new_slots: Int32
    logits_index: Int32
    ext_ids: Int32
    ext_subs: Int32
    logits: npt.NDArray[np.float32]

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def reshape(self, batch: int, queries: int, keys: int, ext: int, outputs: int = 1) -> None:
        """New arrays of these sizes: everything 0, ``relation`` -1.

        Raises:
            InferenceError: there is no memory for them.
        """
        try:
            self.relation = np.empty((batch, queries, keys), np.int16)
            self.logits = np.empty((batch, outputs, self.vocab_size + ext), np.float32)
        except MemoryError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # of a signal handler
            raise InferenceError(
                f"no memory to read {queries} tokens of {batch} prompts at a time, whose relation matrix takes "
                f"{2 * batch * queries * keys >> 20} MB; shorten them"
            ) from None
        self.relation.fill(-1)
        self.input_ids = np.zeros((batch, queries), np.int32)
        self.input_subs = np.zeros((batch, queries), np.int32)
        self.slots = np.zeros((batch, keys), np.int32)
        self.new_slots = np.zeros((batch, queries), np.int32)
        self.logits_index = np.zeros((batch, outputs), np.int32)
        self.ext_ids = np.zeros(ext, np.int32)
        self.ext_subs = np.zeros(ext, np.int32)

    @abstractmethod
    def run(self) -> None:
        """Call the graph: reads the inputs, appends to the cache, fills ``logits``.

        Raises:
            InferenceError: it cannot be called.
            RunStopped: the borrower's `stopper` was called.
        """

    def stopper(self) -> Callable[[], None]:
        """A function for other threads that ends the call being made, if that is possible.

        It holds for this borrower only; no other call of theirs will follow.
        """
        return lambda: None


class Backend(ABC):
    """A model with a cache of token rows.

    Attributes:
        config: the model's.
        cache_rows: rows of the cache, row 0 (scratch) not counted.
        num_threads: threads of one run.
    """

    config: ModelConfig
    cache_rows: int
    num_threads: int = 1

    @property
    def native_ops(self) -> dict[str, str]:
        """For each custom op, the kernel that runs it; empty where there are none."""
        return {}

    @abstractmethod
    def runner(self) -> AbstractContextManager[Runner]:
        """Borrow a runner; several may be out at a time, in several threads."""

    def close(self) -> None:  # noqa: B027 - a backend may have nothing to give back
        """Give weights, threads and caches back, not waiting for the garbage collector."""
