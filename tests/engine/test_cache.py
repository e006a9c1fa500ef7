"""The pool of rows: nothing is leased twice, and what nobody holds any more comes back by itself."""

from __future__ import annotations

import random
import threading
import time

import pytest

from cpmbee.cache import CachePool, Lease
from cpmbee.errors import CacheFullError, InferenceError


class Holder:
    """An owner that a test makes."""

    def __init__(self) -> None:
        self.abandoned = False
        self.driven = False
        self.driver = 0

    def help(self) -> None:
        raise AssertionError


def lease(pool: CachePool, rows: int, owner: Holder) -> Lease:
    found = pool.reserve([rows], owner)
    assert found is not None
    return found[0]


def test_rows_are_leased_once_low_ones_first() -> None:
    pool, owner = CachePool(10), Holder()
    first = lease(pool, 4, owner)
    second = lease(pool, 6, owner)
    assert (first.rows.tolist(), second.rows.tolist()) == ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert pool.used == 0
    assert first.take_many(2).tolist() == [1, 2]
    assert first.take() == 3
    assert pool.used == 3
    first.give_back([2])
    assert first.take() == 2
    pool.audit()
    assert pool.reserve([1], owner) is None
    first.close()
    assert lease(pool, 4, owner).rows.tolist() == [1, 2, 3, 4]


def test_all_or_none() -> None:
    pool, owner = CachePool(10), Holder()
    leases = pool.reserve([3, 4], owner)
    assert leases is not None
    assert [len(part.rows) for part in leases] == [3, 4]
    assert pool.reserve([2, 2], owner) is None
    assert pool.reserve([2, 1], owner) is not None
    with pytest.raises(CacheFullError, match=r"needs 11 cache rows .* there are 10"):
        pool.reserve([6, 5], owner)


def test_rows_come_back_when_a_lease_its_owner_or_its_work_is_gone() -> None:
    pool, owner = CachePool(10), Holder()
    held = lease(pool, 10, owner)
    held.take()
    owner.abandoned = True
    assert pool.used == 0
    lease(pool, 10, owner := Holder())  # nobody refers to it
    held = lease(pool, 10, owner)
    del owner  # the lease alone, in a traceback that somebody keeps, is worth nothing
    assert pool.leases() == []
    assert held.rows is not None


def test_kept_rows_give_way_but_not_those_that_are_needed() -> None:
    pool, owner = CachePool(10), Holder()
    kept = lease(pool, 6, owner)
    kept.keep()
    asked = []

    def evict(rows: int, needed: object) -> None:
        asked.append((rows, needed))
        kept.close()

    pool.on_pressure(evict)
    lease(pool, 4, owner)
    assert asked == []
    hold = pool.reserve([5], owner, [kept])
    assert hold is not None
    assert asked == [(1, [kept])]


def test_a_damaged_pool_is_noticed() -> None:
    pool, owner = CachePool(10), Holder()
    first, second = lease(pool, 4, owner), lease(pool, 4, owner)
    pool.audit()
    first.give_back([3])
    with pytest.raises(InferenceError, match="taken twice"):
        pool.audit()
    first.close()
    second.rows = second.rows - 4
    third = lease(pool, 2, owner)
    third.rows = second.rows[:2]
    third._free.clear()
    second._free.clear()
    with pytest.raises(InferenceError, match="two requests"):
        pool.audit()


def test_whoever_waits_is_told_when_rows_come_back() -> None:
    pool = CachePool(10)
    waiting = threading.Event()
    waited: list[float] = []

    def wait() -> None:
        waiting.set()
        start = time.monotonic()
        pool.pause(60)
        waited.append(time.monotonic() - start)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(10)
    assert thread.ident is not None
    while not pool.waits(thread.ident):
        time.sleep(0.001)
    pool.ring()
    thread.join(30)
    assert waited
    assert not pool.waits(thread.ident)
    assert pool.waits(threading.get_ident()), "whoever asks"


def test_threads_never_share_a_row() -> None:
    pool = CachePool(50)
    holders: dict[int, int] = {}
    clashes: list[int] = []

    def work(name: int) -> None:
        rng = random.Random(name)
        owner = Holder()
        for _ in range(200):
            while (found := pool.reserve([rng.randint(1, 20)], owner)) is None:
                pool.pause(0.01)
            rows = found[0].rows.tolist()
            clashes.extend(row for row in rows if holders.setdefault(row, name) != name)
            for row in rows:
                holders.pop(row, None)
            found[0].close()
            pool.ring()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not clashes
    assert (pool.used, pool.leases()) == (0, [])
