"""Backends for tests: a made-up language model, and one that records or breaks what another computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from cpmbee.config import ModelConfig
from cpmbee.runner import Backend, Runner


class TableBackend(Backend):
    """A language model without a network: the logits after a token depend on the fed ids in its rows.

    The "cache" holds the token id of each row, so a wrong row, or one that was given away too early, changes answers.
    """

    def __init__(self, config: ModelConfig, cache_rows: int = 512, seed: int = 0) -> None:
        self.config = config
        self.cache_rows = cache_rows
        self.seed = seed
        self.rows = np.zeros((cache_rows + 1, 2), np.int64)

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        yield TableRunner(self)

    def logits(self, ids: npt.NDArray[np.int64], ext: int) -> npt.NDArray[np.float32]:
        """Logits after the (id, sub) pairs of a sequence, in order."""
        rng = np.random.default_rng([self.seed, *ids.ravel().tolist()])
        return (rng.standard_normal(self.config.vocab_size + ext) * 2).astype(np.float32)


class TableRunner(Runner):
    def __init__(self, backend: TableBackend) -> None:
        super().__init__(backend.config.vocab_size)
        self.backend = backend

    def run(self) -> None:
        for b in range(len(self.slots)):
            new = self.new_slots[b][self.new_slots[b] > 0]
            assert set(new) <= set(self.slots[b])
            self.backend.rows[new, 0] = self.input_ids[b, : len(new)]
            self.backend.rows[new, 1] = self.input_subs[b, : len(new)]
            seen = self.slots[b][self.relation[b, len(new) - 1] >= 0]
            assert (seen > 0).all()
            self.logits[b] = self.backend.logits(self.backend.rows[seen], len(self.ext_ids))  # for all outputs


class WatchedBackend(Backend):
    """Another backend, with a function that is shown the runner after every run."""

    def __init__(self, inner: Backend, watch: Callable[[Runner], None]) -> None:
        self.inner = inner
        self.watch = watch
        self.config = inner.config
        self.cache_rows = inner.cache_rows

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        with self.inner.runner() as runner:
            run = runner.run

            def watched() -> None:
                run()
                self.watch(runner)

            runner.run = watched  # type: ignore[method-assign]
            try:
                yield runner
            finally:
                runner.run = run  # type: ignore[method-assign]
