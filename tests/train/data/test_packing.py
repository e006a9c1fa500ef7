"""Rows are filled as well as can be, nothing waits for ever; shuffled orders are permutations."""

from itertools import combinations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from cpmbee.train.data.packing import fill_row
from cpmbee.train.data.permutation import mix, shuffled, uniform


@given(st.data(), st.integers(1, 60))
def test_the_oldest_and_the_best_of_the_others(data: st.DataObject, row_length: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, row_length), min_size=1, max_size=8))
    places = fill_row(lengths, row_length)
    assert places == sorted(set(places))
    assert places[0] == 0
    total = sum(lengths[place] for place in places)
    others = lengths[1:]
    sums = {lengths[0] + sum(chosen) for n in range(len(others) + 1) for chosen in combinations(others, n)}
    assert total == max(tokens for tokens in sums if tokens <= row_length)


def test_older_ones_are_preferred() -> None:
    assert fill_row([3, 2, 2, 2], 7) == [0, 1, 2]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_number_once(size: int, key: int) -> None:
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_orders_look_random() -> None:
    size, orders = 1000, 100
    values = np.array([[shuffled(i, size, mix(key)) for i in range(size)] for key in range(orders)])
    counts = np.zeros((20, 20))
    np.add.at(counts, (np.broadcast_to(np.arange(size) // 50, values.shape), values // 50), 1)
    expected = orders * size / 400
    assert ((counts - expected) ** 2 / expected).sum() < 361 + 5 * 27  # chi-squared, 19 * 19 degrees of freedom
    steps = np.bincount(np.diff(values, axis=1).ravel() % size, minlength=size)[1:]
    assert ((steps - steps.mean()) ** 2 / steps.mean()).sum() < 998 + 5 * 45
    draws = [uniform(7, number, 1) for number in range(2000)]
    assert 0.47 < np.mean(draws) < 0.53
    assert 0 <= min(draws) < max(draws) < 1
