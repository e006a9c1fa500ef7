"""The batch source of a mixture: packed batches, made ahead, resumable, following edits of the mixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cpmbee.errors import ConfigError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.data.mixture import Mixture, MixtureText, parse_mixture
from cpmbee.train.data.prefetch import Prefetcher
from cpmbee.train.data.stream import MixtureStream, StreamConfig
from cpmbee.train.data.watch import MixtureWatch
from cpmbee.train.source import rows_of_rank

PREFETCHED_BATCHES = 4


class _Made(NamedTuple):
    """A batch and where the stream is behind it."""

    batch: TrainingBatch
    state: dict[str, Any]


@dataclass(frozen=True)
class SourceStatistics:
    """What a source has made since the process began, batches that wait included.

    Attributes:
        batches: global batches.
        samples: in them.
        padding_share: of their positions.
        tokens_per_second: that it makes per second of work, padding aside.
        waited_seconds: that the reader spent waiting for batches.
        over_long: samples left out because no row holds them, by task.
        too_short: samples left out because their record's text is too short for its transform, by task.
        shortened: samples that lost in-context examples because of their length, by task.
    """

    batches: int
    samples: int
    padding_share: float
    tokens_per_second: float
    waited_seconds: float
    over_long: Mapping[str, int]
    too_short: Mapping[str, int]
    shortened: Mapping[str, int]


class MixtureSource:
    """A `cpmbee.train.source.BatchSource` of a mixture's packed batches, without end.

    A thread makes batches beside the training step. The mixture's files are looked at between batches; an edit is used
    from the next batch on (those that were made ahead are made again), a broken one is said and ignored.

    Args:
        mixture: JSON file of the mixture (`cpmbee.train.data.mixture`).
        tokenizer: the vocabulary.
        row_length: tokens of a row.
        batch_rows: rows of a global batch, at least one for each process.
        seed: of everything that is drawn.
        rank: of this process.
        world_size: number of processes; their shares of a batch make the batch of one process.
        agree: gives every process what the first one passes, as ``broadcast_object_list`` does; called on every process
            before every batch. Without it several processes ignore edits, as each would see them at another moment.

    Raises:
        DataError: the mixture or a data set cannot be used; names file, data set and field.
        ConfigError: there are fewer rows than processes.
    """

    def __init__(
        self,
        mixture: str | Path,
        tokenizer: Tokenizer,
        *,
        row_length: int,
        batch_rows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[Any], Any] | None = None,
    ) -> None:
        if batch_rows < world_size:
            raise ConfigError(f"a global batch of {batch_rows} rows cannot be shared by {world_size} processes")
        text = MixtureText.read(Path(mixture))
        self._stream = MixtureStream(parse_mixture(text), tokenizer, StreamConfig(row_length, batch_rows, seed))
        self._rank, self._world_size = rank, world_size
        self._agree = agree
        self._watch = MixtureWatch(text) if rank == 0 and (world_size == 1 or agree) else None
        self._state = self._stream.state_dict()
        self._prefetcher: Prefetcher[_Made] | None = None
        self._waited = 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the batches' ``task_ids`` index; an edit of the mixture may add some."""
        return tuple(self._state["tasks"])

    @property
    def statistics(self) -> SourceStatistics:
        """What was made so far."""
        made = self._stream.statistics
        return SourceStatistics(
            batches=made.batches,
            samples=made.samples,
            padding_share=made.padding_share,
            tokens_per_second=made.tokens_per_second,
            waited_seconds=self._waited,
            over_long=dict(made.over_long),
            too_short=dict(made.too_short),
            shortened=dict(made.shortened),
        )

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        """This process's rows of the next batch.

        Raises:
            DataError: a record, a transform or a sample is at fault; names mixture, data set and record.
        """
        self._follow_edits()
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._make, PREFETCHED_BATCHES)
        started = time.perf_counter()
        made = self._prefetcher.get()
        self._waited += time.perf_counter() - started
        self._state = made.state
        return rows_of_rank(made.batch, self._rank, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the source is, as of the last batch handed out; plain JSON data, equal on every process."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch after which ``state`` was taken.

        Raises:
            DataError: the state is not of such a source, or of one with another seed or other rows.
        """
        self.close()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def close(self) -> None:
        """Stop making batches ahead; the next one asked for starts it again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self._stream.load_state_dict(self._state)

    def _make(self) -> _Made:
        batch = self._stream.next_batch()
        return _Made(batch, self._stream.state_dict())

    def _follow_edits(self) -> None:
        opened = {entry.key: entry.records for entry in self._stream.mixture.entries}
        edited = self._watch.changed(opened, self._try_out) if self._watch else None
        if self._agree is not None:
            shared = self._agree(edited[0] if edited else None)
            if shared is not None and edited is None:
                edited = (shared, parse_mixture(shared, opened))
        if edited is not None:
            self._use(edited[1])

    def _try_out(self, mixture: Mixture) -> None:
        self._stream.try_out(mixture, self._state)

    def _use(self, mixture: Mixture) -> None:
        """Go on with an edited mixture behind the last batch handed out."""
        self.close()
        self._stream.replace_mixture(mixture)
        self._state = self._stream.state_dict()
