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
from cpmbee.prefill import PADDING, RUN_TOKENS
from cpmbee.relation import RelationBuilder
from cpmbee.row_keeper import RowKeeper
from cpmbee.runner import Backend, Runner
from cpmbee.scoring_job import LOGITS_BYTES, ScoringJob
from cpmbee.step_batch import ExtColumns


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


class Scorer:
    """Scores choices on one backend; one object serves any number of threads.

    Args:
        backend: the model.
        pool: its cache rows.
        keeper: promises them.
    """

    def __init__(self, backend: Backend, pool: CachePool, keeper: RowKeeper) -> None:
        self._backend = backend
        self._pool = pool
        self._keeper = keeper
        self._builder = RelationBuilder(backend.config)

    def run(self, jobs: Sequence[ScoringJob]) -> list[list[float]]:
        """The log-probability of every choice of every job; whatever happens, all rows are returned.

        Raises:
            CacheFullError: the calling thread's own streams hold what a request needs.
            InferenceError: the model cannot be run, or computes logits that are not finite.
        """
        waiting = deque(sorted(jobs, key=lambda job: job.first_queries))
        active: list[ScoringJob] = []
        try:
            with self._backend.runner() as runner:
                while waiting:
                    self._admit(waiting, active, runner)
                    while unfinished := [job for job in active if not job.finished]:
                        self._run_once(unfinished, runner)
                    while active:
                        self._keeper.give_back(active.pop())
        finally:
            for job in jobs:  # all: an interrupted one may hold rows and not be active
                self._keeper.give_back(job)
        return [[fsum(terms) for terms in job.log_probabilities] for job in jobs]

    def _admit(self, waiting: deque[ScoringJob], active: list[ScoringJob], runner: Runner) -> None:
        """Move jobs of about one length from ``waiting`` to ``active``, as many as one run and the cache hold."""
        columns = self._backend.config.vocab_size
        while waiting:
            job = waiting[0]
            columns += len(job.space.ext)
            count = len(active) + 1
            outputs = max(other.most_outputs for other in (*active, job))
            too_many = count * job.first_queries > RUN_TOKENS or count * outputs * columns * 4 > LOGITS_BYTES
            if active and (too_many or job.first_queries > PADDING * active[0].first_queries):
                break
            if not self._keeper.reserve(job, wait=not active):
                break
            active.append(waiting.popleft())
            self._keeper.read_examples(job, runner)

    def _run_once(self, jobs: list[ScoringJob], runner: Runner) -> None:
        """Read the next tokens of every job, and the prompt of those that have not begun."""
        readings = [job.next_reading(self._pool) for job in jobs]
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
            job.accept(runner.logits[b], ext_begin, self._pool)
