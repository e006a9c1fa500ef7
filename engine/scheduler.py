"""Runs requests together: admits them as rows allow, feeds all their live sequences in one step, retires them.

A request never waits for another's end: one that is done stops costing, and the next one in line takes its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

import numpy as np

from cpmbee.cache import CachePool
from cpmbee.prefill import Reading, read
from cpmbee.relation import RelationBuilder
from cpmbee.request import Request, most_rows
from cpmbee.row_keeper import RowKeeper
from cpmbee.runner import Backend, Runner
from cpmbee.sequence import Sequence
from cpmbee.step_batch import ExtColumns, StepBatch


class Scheduler:
    """Decodes requests on one backend; one object serves any number of threads.

    Args:
        backend: the model.
        pool: its cache rows.
        keeper: promises them.
        max_sequences: sequences that step together at most; a single request may have more.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper, max_sequences: int = 64) -> None:
        self._backend = backend
        self._pool = pool
        self._keeper = keeper
        self._builder = RelationBuilder(backend.config)
        self._max_sequences = max_sequences

    def check(self, request: Request) -> None:
        """Raise `CacheFullError` for a request that would not fit if it were the only one."""
        self._pool.check(most_rows(request.prompt, request.config))

    def run(self, requests: list[Request]) -> Generator[None, None, None]:
        """Carry out requests that passed `check`, in order as far as rows allow; yields after every step.

        Setting ``cancelled`` on a request between two steps ends it. Closing the iterator ends all of them; whatever
        happens, all rows are returned.

        Raises:
            CacheFullError: the calling thread's own streams hold what a request needs.
        """
        waiting, active = deque(requests), list[Request]()
        try:
            with self._backend.runner() as runner:
                batch = StepBatch(runner, self._pool, self._builder)
                while waiting or active:
                    before = time.perf_counter()
                    fresh = self._admit(waiting, active, runner)
                    if fresh:
                        self._prefill(fresh, runner)
                        batch.reset()
                    else:
                        batch.step(active)
                    elapsed = time.perf_counter() - before
                    for request in active:
                        if request in fresh:
                            request.prefill_seconds += elapsed
                        else:
                            request.decode_seconds += elapsed
                    yield
                    self._retire(waiting, active)
        finally:
            for request in requests:  # all: an interrupted one may hold rows and not be active
                self._return_rows(request)

    def _admit(self, waiting: deque[Request], active: list[Request], runner: Runner) -> list[Request]:
        """Move requests from ``waiting`` to ``active`` while rows and sequences last, and read their examples."""
        fresh: list[Request] = []
        sequences = sum(request.config.beam_size for request in active)
        while waiting:
            request = waiting[0]
            sequences += request.config.beam_size
            if active and sequences > self._max_sequences:
                break
            if not self._keeper.reserve(request, wait=not active):
                break
            active.append(waiting.popleft())
            fresh.append(request)
            self._keeper.read_examples(request, runner)
        return fresh

    def _prefill(self, requests: list[Request], runner: Runner) -> None:
        """Read the prompts, each with the ``<s>`` of its first answer, and choose the first tokens."""
        readings = []
        for request in requests:
            rows = self._pool.take_many(request.own_tokens)
            request.rows.update(rows.tolist())
            slots = np.concatenate([*request.shared_slots(), rows[:-1]])
            budget = request.config.max_new_tokens
            sequence = Sequence(request.layout(budget + 1), slots, request.space.bos_id, budget)
            sequence.feed(int(rows[-1]), request.prompt.answers[0].segment_id)
            request.search.sequences = [sequence]
            readings.append(Reading(*request.own_arrays(), sequence.layout, sequence.slots[: len(sequence)]))
        ext = ExtColumns([request.space for request in requests])
        logits = read(runner, self._builder, readings, ext.ids, ext.subs)
        for request, row, ext_begin in zip(requests, logits, ext.begins, strict=True):
            request.search.advance(row[None], ext_begin)

    def _retire(self, waiting: deque[Request], active: list[Request]) -> None:
        """Let go of requests that are done or cancelled, and of rows that no sequence holds any more."""
        for request in [request for request in waiting if request.cancelled]:
            waiting.remove(request)
        for request in active.copy():
            if request.cancelled or not request.search.sequences:
                self._return_rows(request)
                active.remove(request)
            elif request.config.beam_size > 1:
                held: set[int] = set()
                held.update(*(sequence.own_rows.tolist() for sequence in request.search.sequences))
                dropped = request.tail - held
                request.tail &= held
                self._pool.release(dropped)

    def _return_rows(self, request: Request) -> None:
        request.rows |= request.tail
        request.tail.clear()
        self._keeper.give_back(request)
