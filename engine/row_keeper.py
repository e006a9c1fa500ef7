"""Which cache rows a request holds: its own, and those of the examples that it shares with others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from cpmbee.cache import CachePool, Lease, Owner, Rows
from cpmbee.encoding import Prompt
from cpmbee.examples import Example, ExampleRows
from cpmbee.relation import TokenLayout
from cpmbee.runner import Int32
from cpmbee.token_space import TokenSpace


@dataclass(eq=False, kw_only=True)
class RowHolder(ABC):
    """A prompt with cache rows, and what will be read after it.

    Attributes:
        prompt: its arrays.
        space: what its logits mean.
        examples: its in-context examples.
        cancelled: the caller wants no more of it.
        lease: rows for its prompt and its answers; None until it has some.
        example_leases: rows of its examples, by key.
    """

    prompt: Prompt
    space: TokenSpace
    examples: list[Example]
    cancelled: bool = False
    lease: Lease | None = None
    example_leases: dict[bytes, Lease] = field(default_factory=dict)

    @property
    def own_tokens(self) -> int:
        """Tokens of the prompt without its examples, the first answer's ``<s>`` included."""
        return len(self.prompt) - sum(len(example.indices) for example in self.examples) + 1

    @property
    @abstractmethod
    def answer_rows(self) -> int:
        """The most rows its answers can take at a time."""

    @property
    def rows(self) -> Lease:
        """The lease of its own rows."""
        assert self.lease is not None  # noqa: S101 - a holder is admitted with a lease
        return self.lease

    def own_arrays(self) -> tuple[Int32, Int32]:
        """Ids and subscripts of its own tokens, the first answer's ``<s>`` last; (own_tokens,) each."""
        (own,) = np.nonzero(self.prompt.sample_ids == 0)
        ids = np.append(self.prompt.input_ids[own], np.int32(self.space.bos_id))
        return ids, np.append(self.prompt.input_subs[own], np.int32(0))

    def shared_slots(self) -> list[Rows]:
        """Rows of its examples, in order."""
        return [self.example_leases[example.key].rows for example in self.examples]

    def layout(self, room: int) -> TokenLayout:
        """Its tokens with examples first (so that rows computed earlier come first), and room for the answers."""
        layout = TokenLayout.from_prompt(self.prompt)
        (own,) = np.nonzero(self.prompt.sample_ids == 0)
        order = np.concatenate([*(example.indices for example in self.examples), own])
        return layout.take(order, room)


class RowKeeper:
    """Leases rows to holders; one object serves any number of threads.

    Args:
        pool: the cache rows.

    Attributes:
        examples: examples that have been read.
    """

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        self.examples = ExampleRows(pool)

    def reserve(self, holder: RowHolder, owner: Owner) -> bool:
        """Lease a holder the rows it may come to need, those of examples that have to be read included.

        Args:
            holder: it holds nothing yet.
            owner: the task that it is a part of.

        Returns:
            False when there is no room now; it holds nothing then.

        Raises:
            CacheFullError: there never will be.
        """
        sizes = {example.key: len(example.indices) for example in holder.examples}
        with self._pool.lock:
            known = {key: lease for key in sizes if (lease := self.examples.get(key)) is not None}
            missing = [key for key in sizes if key not in known]
            wanted = [holder.own_tokens + holder.answer_rows, *(sizes[key] for key in missing)]
            leases = self._pool.reserve(wanted, owner, list(known.values()))
        if leases is None:
            return False
        holder.example_leases = {**known, **dict(zip(missing, leases[1:], strict=True))}
        holder.lease = leases[0]
        return True

    def keep_example(self, holder: RowHolder, key: bytes) -> None:
        """Keep an example that has been read for a holder, for all who come after it."""
        with self._pool.lock:
            lease = self.examples.add(key, holder.example_leases[key])
            holder.rows.shared = [*holder.rows.shared, lease]
            holder.example_leases[key] = lease
