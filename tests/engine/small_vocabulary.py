"""A vocabulary small enough to read, and text that is hard on it."""

from __future__ import annotations

import hypothesis.strategies as st

SPECIALS = (
    "<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>", "<eod>",
)  # fmt: skip
PLAIN = (
    "<",
    ">",
    "_",
    "a",
    "ab",
    "abc",
    "abcde",
    "b",
    "bc",
    " a",
    "。",
    "天",
    "今天",
    "今天天气",
    "气",
    "𠮷野",
    " <<",
    "<a",
)
TOKENS = (*SPECIALS, *PLAIN)

_fragments = st.sampled_from(
    [*TOKENS, "<mask_0>", "<mask_1>", "<option_1>", "<我>", "<AI_2>", "<unk_7>", "<ans_1>", "<>", "<_>", "<<", "<<<<"]
)
_characters = st.sampled_from("<>_abcdex 01今天气𠮷野😀é\n\t\0\ud800\udfff")

wild_text = st.lists(st.one_of(_characters, _fragments), max_size=24).map("".join)
"""Any string: specials, escapes, unknowns, astral characters, lone surrogates, often malformed."""

tame_text = wild_text.map(lambda text: text.replace("<", "<<"))
"""Wild text that is escaped, so that it always encodes."""

vocabularies = st.lists(st.text("<>_ab天😀", min_size=1, max_size=6), unique=True, max_size=20).map(
    lambda tokens: (*SPECIALS, *(token for token in tokens if token not in SPECIALS))
)
"""Random small vocabularies; whether they have a ``<`` is left to chance."""
