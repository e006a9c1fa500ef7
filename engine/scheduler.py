"""Runs requests together: admits them as rows allow, feeds all their live sequences in one step, retires them.

A request never waits for another's end: one that is done stops costing, and the next one in line takes its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

import numpy as np

from cpmbee.cache import CachePool
from cpmbee.examples import ExampleRows
from cpmbee.prefill import Reading, read
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.request import Request
from cpmbee.runner import Backend, Int32, Runner
from cpmbee.sequence import Sequence
from cpmbee.step_batch import ExtColumns, StepBatch

NO_EXT: Int32 = np.empty(0, np.int32)


class Scheduler:
    """Decodes requests on one backend; one object serves any number of threads.

    Args:
        backend: the model.
        pool: its cache rows.
        max_sequences: sequences that step together at most; a single request may have more.
    """

    def __init__(self, backend: Backend, pool: CachePool, max_sequences: int = 64) -> None:
        self._backend = backend
        self._pool = pool
        self._builder = RelationBuilder(backend.config)
        self._max_sequences = max_sequences
        self.examples = ExampleRows(pool)

    def check(self, request: Request) -> None:
        """Raise `CacheFullError` for a request that would not fit if it were the only one."""
        self._pool.check(len(request.prompt) + 1 + request.answer_rows)

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
            for request in active:
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
            if not self._reserve(request, wait=not active):
                break
            active.append(waiting.popleft())
            fresh.append(request)
            self._read_examples(request, runner)
        return fresh

    def _reserve(self, request: Request, *, wait: bool) -> bool:
        """Promise a request the rows it may come to need, those of examples that have to be read included."""
        with self._pool.lock:
            while (missing := self._try_reserve(request)) is not None:
                if not wait:
                    return False
                self._pool.wait(missing)
        return True

    def _try_reserve(self, request: Request) -> int | None:
        """Reserve, borrowing examples that are there; if there is no room, borrow nothing and say how much it takes.

        A request that waits must not hold examples: two of them could keep each other from being served.
        """
        owner = None
        wanted = request.own_tokens + request.answer_rows
        try:
            for key, size in {example.key: len(example.indices) for example in request.examples}.items():
                rows = self.examples.borrow(key)
                if rows is None:
                    wanted += size
                else:
                    request.example_rows[key] = rows
            owner = self._pool.reserve(wanted)
        finally:
            if owner is None:
                self._give_back_examples(request)
        if owner is None:
            return wanted
        request.owner, request.reserved = owner, wanted
        return None

    def _read_examples(self, request: Request, runner: Runner) -> None:
        """Compute the examples of a request that nobody has computed before."""
        missing = {e.key: e for e in request.examples if e.key not in request.example_rows}
        if not missing:
            return
        layout = TokenLayout.from_prompt(request.prompt)
        readings = []
        for example in missing.values():
            slots = self._pool.take_many(len(example.indices))
            request.rows.update(slots.tolist())
            ids, subs = request.prompt.input_ids[example.indices], request.prompt.input_subs[example.indices]
            readings.append(Reading(ids, subs, layout.take(example.indices), slots))
        read(runner, self._builder, readings, NO_EXT, NO_EXT)
        for key, reading in zip(missing, readings, strict=True):
            request.rows.difference_update(reading.slots.tolist())
            request.reserved -= len(reading.slots)
            request.example_rows[key] = self.examples.add(key, reading.slots, request.owner)

    def _prefill(self, requests: list[Request], runner: Runner) -> None:
        """Read the prompts, each with the ``<s>`` of its first answer, and choose the first tokens."""
        readings = []
        for request in requests:
            (own,) = np.nonzero(request.prompt.sample_ids == 0)
            rows = self._pool.take_many(len(own) + 1)
            request.rows.update(rows.tolist())
            shared = [request.example_rows[example.key] for example in request.examples]
            bos_id, segment_id = request.search.space.bos_id, request.prompt.answers[0].segment_id
            slots = np.concatenate([*shared, rows[:-1]])
            sequence = Sequence(request.layout(), slots, bos_id, request.config.max_new_tokens)
            sequence.feed(int(rows[-1]), segment_id)
            request.search.sequences = [sequence]
            ids = np.append(request.prompt.input_ids[own], np.int32(bos_id))
            subs = np.append(request.prompt.input_subs[own], np.int32(0))
            readings.append(Reading(ids, subs, sequence.layout, sequence.slots[: len(sequence)]))
        ext = ExtColumns(requests)
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
                self._pool.release(request.tail - held)
                request.tail &= held

    def _return_rows(self, request: Request) -> None:
        self._pool.release(request.rows | request.tail)
        request.rows.clear()
        request.tail.clear()
        self._give_back_examples(request)
        self._pool.unreserve(request.owner, request.reserved)
        request.reserved = 0

    def _give_back_examples(self, request: Request) -> None:
        for key in request.example_rows:
            self.examples.give_back(key)
        request.example_rows.clear()
