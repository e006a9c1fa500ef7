"""The pool of rows: promises are kept, nothing is handed out twice, nobody waits for ever."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest

from cpmbee.cache import CachePool
from cpmbee.errors import CacheFullError


def reserve(pool: CachePool, rows: int) -> int:
    """Reserve, waiting for other threads if need be."""
    with pool.lock:
        while (owner := pool.reserve(rows)) is None:
            pool.wait(rows)
    return owner


def test_rows_are_handed_out_once_low_ones_first() -> None:
    pool = CachePool(10)
    assert pool.reserve(10) is not None
    first = pool.take_many(4).tolist()
    assert first == [1, 2, 3, 4]
    rest = [pool.take() for _ in range(6)]
    assert sorted(first + rest) == list(range(1, 11))
    pool.release(first)
    assert pool.used == 6
    assert sorted(pool.take_many(4).tolist()) == first


def test_reservations() -> None:
    pool = CachePool(10)
    owner = pool.reserve(7)
    assert owner is not None
    assert pool.reserve(4) is None
    with pool.lock, pytest.raises(CacheFullError, match="needs 4 cache rows and 3 of 10"):
        pool.wait(4)
    with pytest.raises(CacheFullError, match=r"needs 11 cache rows .* there are 10"):
        pool.reserve(11)
    pool.unreserve(owner, 7)
    assert pool.reserved == 0
    assert pool.reserve(10) is not None


def test_pressure_makes_room() -> None:
    pool = CachePool(10)
    owner = pool.reserve(6)
    assert owner is not None
    pool.keep(owner, 6)
    asked = []

    def evict(rows: int) -> None:
        asked.append(rows)
        pool.unreserve(0, 6)

    pool.on_pressure(evict)
    assert pool.reserve(4) is not None
    assert asked == []
    assert pool.reserve(5) is not None
    assert asked == [5]


def test_waiting_ends_when_another_thread_is_done() -> None:
    pool = CachePool(10)
    order: list[str] = []

    def other() -> None:
        owner = reserve(pool, 8)
        held.set()
        time.sleep(0.05)
        order.append("released")
        pool.unreserve(owner, 8)

    held = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    reserve(pool, 5)
    order.append("reserved")
    thread.join()
    assert order == ["released", "reserved"]


def test_threads_never_share_a_row() -> None:
    pool = CachePool(50)
    holders: dict[int, int] = {}
    clashes: list[int] = []

    def work(name: int) -> None:
        rng = random.Random(name)
        for _ in range(200):
            count = rng.randint(1, 20)
            owner = reserve(pool, count)
            rows = pool.take_many(count).tolist()
            for row in rows:
                if holders.setdefault(row, name) != name:
                    clashes.append(row)
            for row in rows:
                del holders[row]
            pool.release(rows)
            pool.unreserve(owner, count)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not clashes
    assert (pool.used, pool.reserved) == (0, 0)


def test_threads_that_wait_for_each_other_are_told_so() -> None:
    pool = CachePool(10)
    told: list[int] = []
    both_hold = threading.Barrier(2)

    def work(name: int) -> None:
        owner = pool.reserve(5)
        assert owner is not None
        both_hold.wait(10)
        try:
            reserve(pool, 3)
        except CacheFullError:
            told.append(name)
        else:
            pool.unreserve(owner, 3)
        pool.unreserve(owner, 5)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 1, "one is told, which lets the other go on"
    assert pool.reserved == 0


def test_rows_that_only_garbage_holds_come_back_to_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CachePool(10)
    monkeypatch.setattr("cpmbee.cache.PATIENCE", 0.01)

    class Abandoned:
        def __init__(self) -> None:
            self.me = self
            self.owner = reserve(pool, 8)

        def __del__(self) -> None:
            pool.unreserve(self.owner, 8)

    gc.disable()
    try:
        other = threading.Thread(target=Abandoned)
        other.start()
        other.join()
        assert pool.reserved == 8
        reserve(pool, 5)
    finally:
        gc.enable()
    assert pool.reserved == 5
