"""The endless stream of packed batches that a mixture gives, and its state.

Everything is computed from the seed and the number of a draw: the data set, how many in-context examples, the records
(each data set is read in a shuffled order, anew each time round), the transform's chances, the order of the answers.
What waits to be packed can therefore be saved as draws and made again, and every process makes the same stream.
"""

from __future__ import annotations

import bisect
import logging
import time
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from cpmbee.errors import ConfigError, CpmBeeError, DataError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, TrainingSample, collate, encode_sample
from cpmbee.train.data.markup import check_sample
from cpmbee.train.data.mixture import Mixture, MixtureEntry
from cpmbee.train.data.packing import fill_row
from cpmbee.train.data.permutation import mix, shuffled, uniform
from cpmbee.train.data.records import Record
from cpmbee.train.data.statistics import StreamStatistics
from cpmbee.train.data.transform import Apply, TooShortError

logger = logging.getLogger("cpmbee.train.data")

BUFFERED_ROWS = 4  # rows' worth of tokens to choose from when a row is filled
BUFFERED_SAMPLES = 48  # and at least so many samples
MAX_REJECTED = 1000  # samples in a row that are left out before the mixture is given up
LeftOut = Literal["over_long", "too_short"]  # why; counted under these names
_CHOOSE_DATASET, _CHOOSE_EXAMPLES = 1, 2


class Draw(NamedTuple):
    """What was drawn.

    Attributes:
        number: of the draw, from 0.
        key: of the data set.
        records: numbers of the request's record and of its examples'.
    """

    number: int
    key: str
    records: tuple[int, ...]


@dataclass(frozen=True)
class StreamConfig:
    """How batches are made.

    Attributes:
        row_length: tokens of a row.
        batch_rows: rows of a global batch.
        seed: of everything that is drawn.
    """

    row_length: int
    batch_rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 1 or self.batch_rows < 1:
            raise ConfigError("row_length and batch_rows must be at least 1")


class MixtureStream:
    """Global batches of a mixture, one after the other.

    Args:
        mixture: what to draw from.
        tokenizer: the vocabulary.
        config: how batches are made.
    """

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, config: StreamConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._draws = 0
        self._positions: dict[str, tuple[int, int]] = {}  # times round a data set, place in this round
        self._waiting: list[tuple[Draw, TrainingSample]] = []
        self.tasks: list[str] = []
        self.statistics = StreamStatistics()
        self._use(mixture)

    @property
    def mixture(self) -> Mixture:
        """What is drawn from."""
        return self._mixture

    def next_batch(self) -> TrainingBatch:
        """The next global batch.

        Raises:
            DataError: a record, a transform or a sample is at fault (names mixture, data set and record), or all
                samples are too long or too short.
        """
        started = time.perf_counter()
        rows = [self._next_row() for _ in range(self._config.batch_rows)]
        batch = collate(rows, self._tokenizer, self._config.row_length)
        made = self.statistics
        made.batches += 1
        made.samples += sum(map(len, rows))
        made.tokens += int(batch.length.sum())
        made.positions += batch.input_ids.size
        made.seconds += time.perf_counter() - started
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain JSON data."""
        return {
            "seed": self._config.seed,
            "row_length": self._config.row_length,
            "batch_rows": self._config.batch_rows,
            "draws": self._draws,
            "positions": {key: list(position) for key, position in self._positions.items()},
            "waiting": [[draw.number, draw.key, list(draw.records)] for draw, _ in self._waiting],
            "tasks": list(self.tasks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream with this state was.

        Raises:
            DataError: the state is not of such a stream, or of one with another seed or other rows.
        """
        for name in ("seed", "row_length", "batch_rows"):
            ours = getattr(self._config, name)
            if state.get(name) != ours:
                raise DataError(f"the saved data position has {name} {state.get(name)}, this run has {ours}")
        try:
            draws = int(state["draws"])
            positions = {str(key): (int(times), int(place)) for key, (times, place) in state["positions"].items()}
            waiting = [Draw(int(n), str(key), tuple(map(int, records))) for n, key, records in state["waiting"]]
            tasks = [str(task) for task in state["tasks"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"the saved data position is damaged ({type(error).__name__}: {error})") from None
        self._draws, self._positions, self.tasks = draws, positions, tasks
        self._add_tasks()
        self._make_again(waiting)

    def replace_mixture(self, mixture: Mixture) -> None:
        """Draw from another mixture from now on; what waits to be packed is made again from it.

        Data sets that stay go on where they were; tasks keep their numbers, new ones are added.
        """
        self._use(mixture)
        self._make_again([draw for draw, _ in self._waiting])

    def try_out(self, mixture: Mixture, state: dict[str, Any]) -> None:
        """Make the samples that wait in a state, and one of each data set, from another mixture; nothing is changed.

        Raises:
            DataError: a record, a transform or a sample is at fault.
        """
        trial = MixtureStream(mixture, self._tokenizer, self._config)
        trial.load_state_dict(state)
        for entry in mixture.entries:
            trial._make(Draw(0, entry.key, (0,)), entry)

    def _use(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._entries = {entry.key: entry for entry in mixture.entries}
        self._orders = {entry.key: zlib.crc32(entry.key.encode()) for entry in mixture.entries}
        self._add_tasks()

    def _add_tasks(self) -> None:
        self.tasks += [task for task in self._mixture.tasks if task not in self.tasks]

    def _make_again(self, draws: list[Draw]) -> None:
        self._waiting = []
        for draw in draws:
            entry = self._entries.get(draw.key)
            if entry is None or max(draw.records) >= len(entry.records):
                continue  # the data set has left the mixture, or shrunk
            sample = self._make(draw, entry)
            if isinstance(sample, TrainingSample):
                self._waiting.append((draw, sample))

    def _next_row(self) -> list[TrainingSample]:
        waiting, row_length = self._waiting, self._config.row_length
        tokens = sum(len(sample) for _, sample in waiting)
        rejected = 0
        while tokens < BUFFERED_ROWS * row_length or len(waiting) < BUFFERED_SAMPLES:
            draw, entry = self._draw()
            sample = self._make(draw, entry)
            if isinstance(sample, TrainingSample):
                waiting.append((draw, sample))
                tokens += len(sample)
                rejected = 0
                continue
            self._count_left_out(sample, entry.task)
            rejected += 1
            if rejected == MAX_REJECTED:
                raise DataError(
                    f"{self._mixture.path}: {rejected} samples in a row are {self._reason(sample)}; the last was of "
                    + entry.records.name
                )
        places = fill_row([len(sample) for _, sample in waiting], row_length)
        row = [waiting[place][1] for place in places]
        chosen = set(places)
        self._waiting = [item for place, item in enumerate(waiting) if place not in chosen]
        return row

    def _draw(self) -> tuple[Draw, MixtureEntry]:
        seed, number = self._config.seed, self._draws
        self._draws += 1
        mixture = self._mixture
        entry = mixture.entries[bisect.bisect(mixture.cumulative, uniform(seed, number, _CHOOSE_DATASET))]
        examples = bisect.bisect(entry.cumulative, uniform(seed, number, _CHOOSE_EXAMPLES))
        records: list[int] = []
        while len(records) < min(1 + examples, len(entry.records)):
            record = self._next_record(entry)
            if record not in records:  # a new round may begin with one of them; none may be its own example
                records.append(record)
        return Draw(number, entry.key, tuple(records)), entry

    def _next_record(self, entry: MixtureEntry) -> int:
        size = len(entry.records)
        times, place = self._positions.get(entry.key, (0, 0))
        if place >= size:
            times, place = times + 1, 0
        self._positions[entry.key] = (times, place + 1)
        return shuffled(place, size, mix(self._config.seed, self._orders[entry.key], times))

    def _make(self, draw: Draw, entry: MixtureEntry) -> TrainingSample | LeftOut:
        """The sample of a draw; or why there is none: it is too long, even without examples, or its text too short."""
        rng = np.random.default_rng((self._config.seed, draw.number))
        plan = entry.transform.plan(rng)
        count = len(draw.records) - 1
        try:
            made = [self._transformed(plan, entry, index, count, rng) for index in draw.records]
        except TooShortError:
            return "too_short"
        task = self.tasks.index(entry.task)
        while True:
            try:
                sample = encode_sample(made[0], self._tokenizer, made[1:], rng, task)
            except CpmBeeError as error:
                where = ", ".join(map(str, draw.records[: len(made)]))
                raise DataError(
                    f"{self._where(entry)}, record {where}: the sample cannot be encoded: {error}"
                ) from None
            if len(sample) <= self._config.row_length:
                break
            if len(made) == 1:
                return "over_long"
            made.pop()
        if len(made) <= count:
            self.statistics.shortened[entry.task] += 1
        return sample

    def _transformed(
        self, plan: Apply, entry: MixtureEntry, index: int, count: int, rng: np.random.Generator
    ) -> Record:
        record = entry.records.read(index)
        try:
            sample = plan(record, count, rng)
            check_sample(sample)
        except TooShortError:
            raise
        except CpmBeeError as error:
            raise DataError(f"{self._where(entry)}, record {index}: {error}") from error
        except Exception as error:
            raise DataError(
                f"{self._where(entry)}, record {index}: its transform raised {type(error).__name__}: {error}"
            ) from error
        return sample

    def _where(self, entry: MixtureEntry) -> str:
        return f"{self._mixture.path}, data set {entry.records.name}"

    def _count_left_out(self, why: LeftOut, task: str) -> None:
        made = self.statistics
        counts = made.over_long if why == "over_long" else made.too_short
        counts[task] += 1
        if counts[task] & (counts[task] - 1) == 0:  # 1, 2, 4, ...: often enough to be seen, seldom enough to be read
            logger.warning("task %s: %d samples so far are %s and are left out", task, counts[task], self._reason(why))

    def _reason(self, why: LeftOut) -> str:
        if why == "over_long":
            return f"longer than a row of {self._config.row_length} tokens"
        return "too short for their transform"
