"""Log-probabilities of given answers.

The tokens of all choices of a request are read in one run, right behind its prompt: a choice sees the prompt and
itself, never another choice, so that the prompt is computed once. What does not fit one run follows in others, over
the cache rows of the prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from cpmbee.cache import CachePool
from cpmbee.choices import Choice
from cpmbee.prefill import PADDING, RUN_TOKENS, read_examples
from cpmbee.relation import RelationBuilder
from cpmbee.row_keeper import RowHolder, RowKeeper
from cpmbee.runner import Backend
from cpmbee.scoring_job import LOGITS_BYTES, ScoringJob
from cpmbee.step_batch import ExtColumns
from cpmbee.task import Task


@dataclass(frozen=True)
class ChoiceScore:
    """How likely one given answer is.

    Attributes:
        choice: the answer, as it was given.
        logprob: natural logarithm of its probability: the sum over its tokens and the closing ``</s>`` (for a dict,
            those of every answer in it). `<unk>` is out of the question unless the request has one, and so are special
            and unknown tokens that it does not have, as when answers are generated.
        tokens: how many tokens that are, each ``</s>`` included; the opening ``<s>`` is given and does not count.
    """

    choice: Choice
    logprob: float
    tokens: int

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, which does not favour short answers."""
        return self.logprob / self.tokens


class Scoring(Task):
    """Requests whose choices are scored together.

    Args:
        backend: the model.
        pool: its cache rows.
        keeper: leases them.
        jobs: the requests with their choices.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper, jobs: Sequence[ScoringJob]) -> None:
        super().__init__(backend, pool, keeper)
        self._jobs = jobs
        self._queue = deque(sorted(jobs, key=lambda job: job.first_queries))
        self._active: list[ScoringJob] = []
        self._builder = RelationBuilder(backend.config)

    @property
    def holders(self) -> list[RowHolder]:  # noqa: D102
        return list(self._jobs)

    def run(self) -> list[list[float]]:
        """The log-probability of every choice of every job.

        Raises:
            CacheFullError: whoever holds what a request needs waits for this call.
            InferenceError: the model cannot be run, or computes logits that are not finite.
        """
        self.complete()
        return [[fsum(terms) for terms in job.log_probabilities] for job in self._jobs]

    def _step(self) -> bool:
        """Read the next tokens of all jobs that run; admit others when those are done."""
        if not self._active:
            self._admit()
        if not self._active:
            return False
        self._run_once([job for job in self._active if not job.finished])
        if all(job.finished for job in self._active):
            while self._active:
                self._active.pop().rows.close()
            self._pool.ring()
        return True

    def _admit(self) -> None:
        """Move jobs of about one length from waiting to active, as many as one run and the cache hold."""
        columns = self._backend.config.vocab_size
        while self._queue:
            job = self._queue[0]
            columns += len(job.space.ext)
            count = len(self._active) + 1
            outputs = max(other.most_outputs for other in (*self._active, job))
            too_many = count * job.first_queries > RUN_TOKENS or count * outputs * columns * 4 > LOGITS_BYTES
            if self._active and (too_many or job.first_queries > PADDING * self._active[0].first_queries):
                break
            if not self._reserve(job, alone=not self._active):
                break
            self._active.append(self._queue.popleft())
            read_examples(job, self._keeper, self._borrow_runner(), self._builder, self._stopped)

    def _run_once(self, jobs: list[ScoringJob]) -> None:
        """Read the next tokens of every job, and the prompt of those that have not begun."""
        runner = self._borrow_runner()
        readings = [job.next_reading() for job in jobs]
        ext = ExtColumns([job.space for job in jobs])
        queries = max(len(reading.input_ids) for reading in readings)
        keys = max(len(reading.slots) for reading in readings)
        runner.reshape(len(jobs), queries, keys, len(ext.ids), max(len(reading.scored) for reading in readings))
        runner.ext_ids[:] = ext.ids
        runner.ext_subs[:] = ext.subs
        for b, reading in enumerate(readings):
            own, seen = len(reading.input_ids), len(reading.slots)
            runner.input_ids[b, :own] = reading.input_ids
            runner.input_subs[b, :own] = reading.input_subs
            runner.slots[b, :seen] = reading.slots
            runner.new_slots[b, :own] = reading.slots[seen - own :]
            runner.logits_index[b, : len(reading.scored)] = reading.scored
            self._builder.fill(runner.relation[b, :own], reading.layout, seen - own)
            reading.separate(runner.relation[b, :own, :seen])
        runner.run()
        for b, (job, ext_begin) in enumerate(zip(jobs, ext.begins, strict=True)):
            job.accept(runner.logits[b], ext_begin)
