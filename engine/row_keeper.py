"""Who holds which cache rows: promises to requests, the examples they share, and giving everything back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from cpmbee.cache import CachePool, Rows
from cpmbee.encoding import Prompt
from cpmbee.examples import Example, ExampleRows
from cpmbee.prefill import Reading, read
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.runner import Int32, Runner
from cpmbee.token_space import TokenSpace

NO_EXT: Int32 = np.empty(0, np.int32)


@dataclass(eq=False, kw_only=True)
class RowHolder(ABC):
    """A prompt with cache rows, and what will be read after it.

    Attributes:
        prompt: its arrays.
        space: what its logits mean.
        examples: its in-context examples.
        rows: cache rows it holds for its prompt (those of shared examples not counted).
        example_rows: rows of the examples it uses so far, by key.
        reserved: rows promised to it.
        owner: who they are promised to.
    """

    prompt: Prompt
    space: TokenSpace
    examples: list[Example]
    rows: set[int] = field(default_factory=set)
    example_rows: dict[bytes, Rows] = field(default_factory=dict)
    reserved: int = 0
    owner: int = 0

    @property
    def own_tokens(self) -> int:
        """Tokens of the prompt without its examples, the first answer's ``<s>`` included."""
        return len(self.prompt) - sum(len(example.indices) for example in self.examples) + 1

    @property
    @abstractmethod
    def answer_rows(self) -> int:
        """The most rows its answers can take at a time."""

    def own_arrays(self) -> tuple[Int32, Int32]:
        """Ids and subscripts of its own tokens, the first answer's ``<s>`` last; (own_tokens,) each."""
        (own,) = np.nonzero(self.prompt.sample_ids == 0)
        ids = np.append(self.prompt.input_ids[own], np.int32(self.space.bos_id))
        return ids, np.append(self.prompt.input_subs[own], np.int32(0))

    def shared_slots(self) -> list[Rows]:
        """Rows of its examples, in order."""
        return [self.example_rows[example.key] for example in self.examples]

    def layout(self, room: int) -> TokenLayout:
        """Its tokens with examples first (so that rows computed earlier come first), and room for the answers."""
        layout = TokenLayout.from_prompt(self.prompt)
        (own,) = np.nonzero(self.prompt.sample_ids == 0)
        order = np.concatenate([*(example.indices for example in self.examples), own])
        return layout.take(order, room)


class RowKeeper:
    """Promises rows to holders and takes them back; one object serves any number of threads.

    An interrupt (Ctrl-C, a signal) may come between any two lines. So nothing is given back that is still written down
    as held: a row may be lost then, but never belong to two. Lost ones are found when no holder is left.

    Args:
        pool: the cache rows.
        builder: of relations, for reading examples.

    Attributes:
        examples: examples that have been read.
    """

    def __init__(self, pool: CachePool, builder: RelationBuilder) -> None:
        self._pool = pool
        self._builder = builder
        self.examples = ExampleRows(pool)
        self._holders: set[RowHolder] = set()  # with promises

    def reserve(self, holder: RowHolder, *, wait: bool) -> bool:
        """Promise a holder the rows it may come to need, those of examples that have to be read included.

        Args:
            holder: it holds nothing yet.
            wait: until there is room; otherwise False says that there is none now.

        Raises:
            CacheFullError: there never will be.
        """
        with self._pool.lock:
            while (missing := self._try_reserve(holder)) is not None:
                if not wait:
                    return False
                self._pool.wait(missing)
        return True

    def _try_reserve(self, holder: RowHolder) -> int | None:
        """Reserve, borrowing examples that are there; if there is no room, borrow nothing and say how much it takes.

        A holder that waits must not hold examples: two of them could keep each other from being served.
        """
        if not self._holders:
            self.examples.settle()
        owner = None
        wanted = holder.own_tokens + holder.answer_rows
        try:
            for key, size in {example.key: len(example.indices) for example in holder.examples}.items():
                rows = self.examples.borrow(key)
                if rows is None:
                    wanted += size
                else:
                    holder.example_rows[key] = rows
            owner = self._pool.reserve(wanted)
        finally:
            if owner is None:
                self._give_back_examples(holder)
        if owner is None:
            return wanted
        holder.owner, holder.reserved = owner, wanted
        self._holders.add(holder)
        return None

    def read_examples(self, holder: RowHolder, runner: Runner) -> None:
        """Compute the examples of a holder that nobody has computed before."""
        missing = {e.key: e for e in holder.examples if e.key not in holder.example_rows}
        if not missing:
            return
        layout = TokenLayout.from_prompt(holder.prompt)
        readings = []
        for example in missing.values():
            slots = self._pool.take_many(len(example.indices))
            holder.rows.update(slots.tolist())
            ids, subs = holder.prompt.input_ids[example.indices], holder.prompt.input_subs[example.indices]
            readings.append(Reading(ids, subs, layout.take(example.indices), slots))
        read(runner, self._builder, readings, NO_EXT, NO_EXT)
        for key, reading in zip(missing, readings, strict=True):
            holder.rows.difference_update(reading.slots.tolist())
            holder.reserved -= len(reading.slots)
            holder.example_rows[key] = self.examples.add(key, reading.slots, holder.owner)

    def give_back(self, holder: RowHolder) -> None:
        """Take back everything that a holder has, if anything."""
        with self._pool.lock:
            if holder not in self._holders:
                return
            self._holders.remove(holder)
            rows, holder.rows = holder.rows, set()
            self._pool.release(rows)
            self._give_back_examples(holder)
            reserved, holder.reserved = holder.reserved, 0
            self._pool.unreserve(holder.owner, reserved)

    def _give_back_examples(self, holder: RowHolder) -> None:
        keys, holder.example_rows = holder.example_rows, {}
        for key in keys:
            self.examples.give_back(key)
