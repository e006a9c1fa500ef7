import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee.train import numerals
from cpmbee.train.numerals import from_chinese, is_held_out, make_example, to_chinese

BY_HAND = {
    0: "零",
    7: "七",
    10: "十",
    12: "十二",
    20: "二十",
    21: "二十一",
    99: "九十九",
    100: "一百",
    105: "一百零五",
    110: "一百一十",
    115: "一百一十五",
    200: "二百",
    222: "二百二十二",
    1000: "一千",
    1005: "一千零五",
    1010: "一千零一十",
    1015: "一千零一十五",
    1100: "一千一百",
    2222: "二千二百二十二",
    3005: "三千零五",
    10_000: "一万",
    10_001: "一万零一",
    10_010: "一万零一十",
    10_100: "一万零一百",
    11_000: "一万一千",
    20_020: "二万零二十",
    100_000: "十万",
    100_001: "十万零一",
    120_000: "十二万",
    201_000: "二十万一千",
    1_000_000: "一百万",
    1_100_000: "一百一十万",
    1_050_300: "一百零五万零三百",
    10_100_101: "一千零一十万零一百零一",
    50_006_000: "五千万六千",
    90_000_009: "九千万零九",
    99_999_999: "九千九百九十九万九千九百九十九",
}
SPOKEN = {
    2: "二",
    12: "十二",
    20: "二十",
    200: "两百",
    2222: "两千两百二十二",
    20_000: "两万",
    22_000: "两万两千",
    120_000: "十二万",
    1_020_000: "一百零二万",
}


@pytest.mark.parametrize(("number", "text"), BY_HAND.items())
def test_writes_and_reads_what_was_written_by_hand(number: int, text: str) -> None:
    assert to_chinese(number) == text
    assert from_chinese(text) == number


def read_by_value(text: str) -> int:
    """An independent reader: expand every character to its value and let the larger multiply the smaller before it."""
    values = {char: 10**power for char, power in zip("十百千万", (1, 2, 3, 4), strict=True)}
    if "万" in text:
        head, tail = text.split("万")
        return read_by_value(head) * 10_000 + read_by_value(tail)
    total, factor = 0, 1
    for is_unit, chars in itertools.groupby(text, values.__contains__):
        part = "".join(chars)
        if is_unit:
            total += factor * values[part]
            factor = 0
        else:
            factor = int(part.translate(str.maketrans("零一二三四五六七八九", "0123456789")))
    return total + (factor if text and text[-1] not in values else 0)


@given(st.integers(0, numerals.LIMIT - 1))
def test_every_numeral_reads_back(number: int) -> None:
    text = to_chinese(number)
    assert read_by_value(text) == number
    assert from_chinese(text) == number
    assert from_chinese(numerals.colloquial(text)) == number
    assert "零零" not in text
    assert not (text.endswith("零") and number)
    assert len(text) <= 15


@pytest.mark.parametrize(("number", "text"), [*SPOKEN.items()])
def test_spoken_form(number: int, text: str) -> None:
    assert numerals.colloquial(to_chinese(number)) == text
    assert from_chinese(text) == number


@pytest.mark.parametrize(
    "text", ["", "零五", "一百五十零", "一千零零五", "一十五", "十十", "百", "三千五", "一亿", "12", "两"]
)
def test_refuses_what_the_rules_do_not_write(text: str) -> None:
    with pytest.raises(ValueError, match="not a numeral"):
        from_chinese(text)


@pytest.mark.parametrize("number", [-1, numerals.LIMIT])
def test_refuses_numbers_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        to_chinese(number)


def test_requests_in_both_directions() -> None:
    digits = make_example(2005, "digits", spoken=True)
    assert digits.request == {"input": "两千零五", "prompt": "写成数字", "<ans>": ""}
    assert digits.solved["<ans>"] == "2005"
    chinese = make_example(2005, "chinese", spoken=True)
    assert chinese.request == {"input": "2005", "prompt": "写成汉字", "<ans>": ""}
    assert chinese.solved["<ans>"] == "二千零五"


def test_training_and_held_out_numbers_never_meet() -> None:
    seen = itertools.islice(numerals.examples(np.random.default_rng(0), held_out=False), 4000)
    assert not any(is_held_out(example.number) for example in seen)
    held_out = numerals.held_out_examples(np.random.default_rng(0), 300)
    assert all(is_held_out(example.number) for example in held_out)
    assert len({(example.number, example.direction) for example in held_out}) == 600
    assert 0.04 < np.mean([is_held_out(number) for number in range(100_000)]) < 0.06
    assert not any(map(is_held_out, range(100)))


def test_equal_seeds_give_equal_streams() -> None:
    streams = [list(itertools.islice(numerals.examples(np.random.default_rng(5), held_out=False), 50)) for _ in "ab"]
    assert streams[0] == streams[1]
    assert [example.direction for example in streams[0][:4]] == ["digits", "chinese"] * 2
