import numpy as np
import pytest

from cpmbee.train.readings import MAX_PHRASE, Reading, is_held_out, majority_share, split_readings


def phrases(held_out: bool, count: int, reading: str, start: int = 0x6000) -> dict[str, tuple[str, ...]]:
    """Phrases of 行 and another character, all or none of them held out."""
    texts = (f"{chr(start + i)}行" for i in range(2000))
    return dict.fromkeys([t for t in texts if is_held_out(t) is held_out][:count], ("x", reading))


SEEN = {**phrases(False, 3, "xíng"), **phrases(False, 2, "háng", start=0x7000)}
READINGS = ("xíng", "háng")


def test_polyphones_are_found_with_their_readings_most_frequent_first() -> None:
    seen, held_out = split_readings(SEEN)
    assert [reading.answer for reading in seen] == ["xíng"] * 3 + ["háng"] * 2
    assert {(reading.character, reading.readings) for reading in seen} == {("行", READINGS)}
    assert held_out == ()


@pytest.mark.parametrize(
    "left_out",
    [
        {"行行": ("xíng", "háng")},  # which of the two is meant?
        {"太" * MAX_PHRASE + "行": ("x",) * MAX_PHRASE + ("xíng",)},
        {"一行": ("yī",)},  # a reading is missing
        phrases(False, 1, "hàng", start=0x8000),  # its only phrase
    ],
)
def test_phrases_that_make_no_question(left_out: dict[str, tuple[str, ...]]) -> None:
    assert split_readings({**SEEN, **left_out})[0] == split_readings(SEEN)[0]


def test_readings_are_counted_in_training_phrases_only() -> None:
    unseen = {**phrases(True, 5, "háng"), **phrases(True, 2, "hàng", start=0x7000)}
    seen, held_out = split_readings({**SEEN, **unseen})
    assert seen == split_readings(SEEN)[0]
    assert [reading.answer for reading in held_out] == ["háng"] * 5
    assert majority_share(held_out) == 0
    assert majority_share(seen) == 3 / 5


def test_forms_of_the_question() -> None:
    reading = Reading("银行", "行", "háng", READINGS)
    assert reading.solved == {"input": "银行", "question": "行", "<ans>": "háng"}
    rng = np.random.default_rng(0)
    places = set()
    for question, form in (("行", reading.choice), ("háng", reading.given_choice)):
        for _ in range(20):
            asked = form(rng)
            assert (asked["input"], asked["question"]) == ("银行", question)
            assert list(asked["options"]) == ["<option_0>", "<option_1>"]
            assert sorted(asked["options"].values()) == sorted(READINGS)
            assert asked["options"][asked["<ans>"]] == "háng"
            places.add(asked["<ans>"])
    assert places == {"<option_0>", "<option_1>"}
