"""One sequence of tokens being written: its cache rows, its layout, and the token to feed next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpmbee.relation import TokenLayout


class Sequence:
    """A prompt and one continuation of it.

    The first ``shared`` tokens (examples, request, opening ``<s>``) have been read with the prompt.

    Attributes:
        layout: columns of all tokens with a cache row.
        slots: (capacity,) int32 cache rows of the tokens, in order; valid up to ``len(self)``.
        shared: length of the prompt.
        written: for each token that was chosen, its column of the logits (vocabulary ids, then extension rows) and the
            index of its answer.
        fed: (capacity,) int32 base ids fed so far, the opening ``<s>`` included; valid up to ``num_fed``.
        score: sum of the log-probabilities of what was written.
        next_id, next_sub, answer, position: the token to feed next, its answer, and its place in the answer.
    """

    __slots__ = (
        "answer",
        "fed",
        "layout",
        "next_id",
        "next_sub",
        "num_fed",
        "position",
        "score",
        "shared",
        "slots",
        "written",
    )

    def __init__(self, layout: TokenLayout, slots: npt.NDArray[np.int32], first_id: int, room: int) -> None:
        """A sequence that has written nothing.

        Args:
            layout: the prompt's tokens.
            slots: (tokens,) their cache rows.
            first_id: ``<s>``, to be fed next.
            room: most tokens that will be written.
        """
        self.layout = layout
        self.slots = np.zeros(len(slots) + room, np.int32)
        self.slots[: len(slots)] = slots
        self.shared = len(slots) + 1
        self.written: list[tuple[int, int]] = []
        self.fed = np.empty(room, np.int32)
        self.fed[0] = first_id
        self.num_fed = 1
        self.score = 0.0
        self.next_id = first_id
        self.next_sub = 0
        self.answer = 0
        self.position = 0

    def __len__(self) -> int:
        return len(self.layout)

    def fork(self) -> Sequence:
        """A sibling with the same past, in the same rows."""
        other = Sequence.__new__(Sequence)
        other.layout = self.layout.copy()
        other.slots = self.slots.copy()
        other.shared = self.shared
        other.written = self.written.copy()
        other.fed = self.fed.copy()
        other.num_fed = self.num_fed
        other.score = self.score
        other.next_id, other.next_sub = self.next_id, self.next_sub
        other.answer, other.position = self.answer, self.position
        return other

    def feed(self, row: int, segment_id: int) -> None:
        """Put the next token into cache row ``row``."""
        self.slots[len(self.layout)] = row
        self.layout.append(segment_id, self.position)

    @property
    def own_rows(self) -> npt.NDArray[np.int32]:
        """Cache rows of what was fed after the prompt."""
        return self.slots[self.shared : len(self.layout)]
