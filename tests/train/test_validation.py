"""Which evaluation is the best one."""

from __future__ import annotations

import math

import pytest

from cpmbee.train.validation import Best


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_never_the_best(broken: float, higher_is_better: bool) -> None:
    best = Best()

    def update(step: int, value: float) -> bool:
        return best.update(step, {"x": value}, "x", higher_is_better)

    assert not update(1, broken)
    assert (best.step, best.value, best.waited) == (None, None, 1)
    assert update(2, 0.5)
    assert not update(3, broken)
    assert update(4, 0.6 if higher_is_better else 0.4)
    assert (best.step, best.waited) == (4, 0)
