import pytest

from cpmbee.train.traditional import Conversion, Line, character_majority_share, is_held_out, split_lines

SIMPLIFY = Conversion({"頭": "头", "髮": "发", "發": "发", "乾": "干", "乾坤": "乾坤", "乾坤袋": "千坤袋"})
SEEN = next(f"poem {i}" for i in range(100) if not is_held_out(f"poem {i}"))
HELD_OUT = next(f"poem {i}" for i in range(100) if is_held_out(f"poem {i}"))


@pytest.mark.parametrize(
    ("text", "converted"),
    [
        ("頭髮", "头发"),
        ("乾坤乾", "乾坤干"),  # the phrase goes before its characters
        ("乾坤袋乾坤", "千坤袋乾坤"),  # the longest phrase goes first
        ("山", "山"),
        ("", ""),
    ],
)
def test_conversion_takes_the_longest_match(text: str, converted: str) -> None:
    assert SIMPLIFY(text) == converted


def test_lines_of_regular_verse_are_split_at_pauses() -> None:
    seen, held_out = split_lines([(SEEN, ["白頭發短梳，一二三。", "一二三四五六七。"])], SIMPLIFY)
    assert seen == (Line("白头发短梳", "白頭發短梳"), Line("一二三四五六七", "一二三四五六七"))
    assert held_out == ()
    assert seen[0].solved == {"input": "白头发短梳", "prompt": "转繁体", "<ans>": "白頭發短梳"}


@pytest.mark.parametrize("defect", ["□一二三四，", "一二三四五（一作六），", "𠮷二三四五，", "一二三四五。abc"])
def test_a_poem_with_gaps_notes_or_rare_signs_is_left_out(defect: str) -> None:
    assert split_lines([(SEEN, ["山水有清音。", defect])], SIMPLIFY) == ((), ())


def test_poems_are_held_out_whole_and_their_lines_are_new() -> None:
    poems = [(HELD_OUT, ["白頭發短梳，一二三四五。"]), (SEEN, ["一二三四五。", "一二三四五。"])]
    seen, held_out = split_lines(poems, SIMPLIFY)
    assert [line.original for line in seen] == ["一二三四五"]
    assert [line.original for line in held_out] == ["白頭發短梳"]


def test_majority_takes_the_most_frequent_form() -> None:
    training = [Line("发", "髮"), Line("发", "髮"), Line("发", "發")]
    assert character_majority_share(training, [Line("发", "髮"), Line("发", "發"), Line("山", "山")]) == 2 / 3
