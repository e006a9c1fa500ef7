"""Counting what a stream of batches makes, and what it has to leave out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class StreamStatistics:
    """What a stream has made since the process began.

    Attributes:
        batches: global batches.
        samples: in them.
        tokens: in them, padding aside.
        positions: in them, padding included.
        over_long: samples left out because no row holds them, by task.
        too_short: samples left out because their record's text is too short for its transform, by task.
        shortened: samples that kept fewer in-context examples than were drawn, by task, because of their length.
        seconds: time spent making batches.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    positions: int = 0
    over_long: Counter[str] = field(default_factory=Counter)
    too_short: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """Share of the positions that are padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens made per second of work."""
        return self.tokens / self.seconds if self.seconds else 0.0
