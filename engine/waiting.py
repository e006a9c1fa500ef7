"""Waiting for cache rows that others hold.

The tasks that hold them are at work and will end, or nobody carries them on at the moment (streams between two pieces)
and whoever waits does it for them. So waiting ends, unless all who hold rows wait themselves, further up in the same
threads: that is an error for those threads.
"""

from __future__ import annotations

import threading

from cpmbee.cache import CachePool, Owner
from cpmbee.errors import CacheFullError

PATIENCE = 0.05  # seconds between two looks at whether rows have come back
STUCK_LOOKS = 4  # in which nothing has changed, before waiting is taken for endless


class Waiting:
    """How long a task has waited, and whether anything has happened meanwhile."""

    def __init__(self) -> None:
        self._patient = True  # whoever reads a stream may be about to go on
        self._changes = -1
        self._stuck = 0

    def look(self, pool: CachePool, task: Owner) -> None:
        """Carry somebody on who holds rows, or sleep until they may have come back; not for long.

        Raises:
            CacheFullError: waiting would last for ever.
        """
        if not self._patient and self._help(pool, task):
            return
        stuck = pool.changes == self._changes and self._blocked(pool, task)
        self._stuck = self._stuck + 1 if stuck else 0
        self._changes = pool.changes
        if self._stuck >= STUCK_LOOKS:
            raise CacheFullError(
                "whoever holds the cache rows that the request needs waits for it to end; load the engine with more "
                "cache_tokens, or generate after the generation whose callback this is"
            )
        pool.pause(PATIENCE)
        self._patient = False

    # Those who hold rows are looked up anew each time and referred to for no longer than a step: a stream that nobody
    # refers to any more must not be kept alive by those who wait for its rows.

    def _help(self, pool: CachePool, task: Owner) -> bool:
        """Make a step for one whom nobody carries on; False if there is none."""
        for owner in pool.owners():
            if owner is not task and not owner.driven:
                owner.help()
                return True
        return False

    def _blocked(self, pool: CachePool, task: Owner) -> bool:
        """Whether all who hold rows are carried on by threads that wait, this one among them."""
        drivers = [owner.driver for owner in pool.owners() if owner is not task]
        return threading.get_ident() in drivers and all(map(pool.waits, drivers))
