"""Runs requests together: admits them as rows allow, feeds all their live sequences in one step, retires them.

A request never waits for another's end: one that is done stops costing, and the next one in line takes its place.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from cpmbee.cache import CachePool
from cpmbee.prefill import Reading, read, read_examples
from cpmbee.relation import RelationBuilder
from cpmbee.request import Request
from cpmbee.row_keeper import RowHolder, RowKeeper
from cpmbee.runner import Backend
from cpmbee.sequence import Sequence
from cpmbee.step_batch import ExtColumns, StepBatch
from cpmbee.task import Task

MAX_SEQUENCES = 64  # that step together at most; a single request may have more


class Decoding(Task):
    """Requests that are answered together, in order as far as rows allow.

    Args:
        backend: the model.
        pool: its cache rows.
        keeper: leases them.
        requests: each fits the cache alone.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper, requests: list[Request]) -> None:
        super().__init__(backend, pool, keeper)
        self._requests = requests
        self._queue = deque(requests)
        self._active: list[Request] = []
        self._builder = RelationBuilder(backend.config)
        self._batch: StepBatch | None = None

    @property
    def holders(self) -> list[RowHolder]:  # noqa: D102
        return list(self._requests)

    def _step(self) -> bool:
        """Read the prompts of requests that have been admitted, or feed the next token of all that run."""
        self._retire()
        before = time.perf_counter()
        fresh = self._admit()
        if not self._active:
            return False
        if self._batch is None:
            self._batch = StepBatch(self._borrow_runner(), self._builder)
        if fresh:
            self._prefill(fresh)
            self._batch.reset()
        else:
            self._batch.step(self._active)
        elapsed = time.perf_counter() - before
        for request in self._active:
            if request in fresh:
                request.prefill_seconds += elapsed
            else:
                request.decode_seconds += elapsed
        return True

    def _tidy(self) -> None:
        self._retire()
        if not self._active and not self._queue:
            self._close()

    def _admit(self) -> list[Request]:
        """Move requests from waiting to active while rows and sequences last, and read their examples."""
        fresh: list[Request] = []
        sequences = sum(request.config.beam_size for request in self._active)
        while self._queue:
            request = self._queue[0]
            sequences += request.config.beam_size
            if self._active and sequences > MAX_SEQUENCES:
                break
            if not self._reserve(request, alone=not self._active):
                break
            self._active.append(self._queue.popleft())
            fresh.append(request)
            read_examples(request, self._keeper, self._borrow_runner(), self._builder, self._stopped)
        return fresh

    def _prefill(self, requests: list[Request]) -> None:
        """Read the prompts, each with the ``<s>`` of its first answer, and choose the first tokens."""
        readings = []
        for request in requests:
            rows = request.rows.take_many(request.own_tokens)
            slots = np.concatenate([*request.shared_slots(), rows[:-1]])
            budget = request.config.max_new_tokens
            sequence = Sequence(request.layout(budget + 1), slots, request.space.bos_id, budget)
            sequence.feed(int(rows[-1]), request.prompt.answers[0].segment_id)
            request.search.sequences = [sequence]
            readings.append(Reading(*request.own_arrays(), sequence.layout, sequence.slots[: len(sequence)]))
        ext = ExtColumns([request.space for request in requests])
        logits = read(self._borrow_runner(), self._builder, readings, ext.ids, ext.subs, self._stopped)
        for request, row, ext_begin in zip(requests, logits, ext.begins, strict=True):
            request.search.advance(row[None], ext_begin)

    def _retire(self) -> None:
        """Let go of requests that are done or cancelled, and of rows that no sequence holds any more."""
        for request in [request for request in self._queue if request.cancelled]:
            self._queue.remove(request)
        for request in self._active.copy():
            if request.cancelled or not request.search.sequences:
                self._active.remove(request)
                request.rows.close()
                self._pool.ring()
            elif request.config.beam_size > 1:
                held: set[int] = set()
                held.update(*(sequence.own_rows.tolist() for sequence in request.search.sequences))
                dropped = request.tail - held
                request.tail &= held
                request.rows.give_back(dropped)
