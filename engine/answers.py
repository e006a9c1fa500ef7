"""From chosen tokens to the texts that a caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from cpmbee.encoding import Prompt
from cpmbee.results import Answer
from cpmbee.tokenizer import Tokenizer


class AnswerWriter:
    """Knows what the tokens of one request mean.

    Args:
        prompt: the encoded request.
        tokenizer: the model's.
    """

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self._answers = prompt.answers
        self._tokenizer = tokenizer
        # Extension rows follow the vocabulary; a special with subscript 0 has none, its base id stands for it.
        self._table = {base: text for (base, sub), text in prompt.ext_tokens.items() if not sub}
        extension = (text for (_, sub), text in prompt.ext_tokens.items() if sub)
        self._table.update(enumerate(extension, tokenizer.vocab_size))

    def path(self, answer: int) -> tuple[str, ...]:
        """Keys below ``<ans>`` of an answer."""
        return self._answers[answer].path

    def text(self, tokens: Sequence[int]) -> str:
        """Text of tokens of one answer; the end of an answer has none."""
        return self._tokenizer.decode([t for t in tokens if t != self._tokenizer.eos_id], self._table)

    def answer(self, written: Sequence[tuple[int, int]]) -> Answer:
        """The texts in the shape of the request's ``<ans>``; None for those that were never begun.

        Args:
            written: all chosen tokens, each with the answer that it belongs to, rising.
        """
        texts: dict[int, str] = {}
        for index, pairs in groupby(written, key=lambda pair: pair[1]):
            texts[index] = self.text([token for token, _ in pairs])
        shaped: dict[str, Answer] = {}
        for index, slot in enumerate(self._answers):
            if not slot.path:
                return texts.get(index)
            level = shaped
            for key in slot.path[:-1]:
                inner = level.setdefault(key, {})
                assert isinstance(inner, dict)  # noqa: S101 - a key of a dict leads to text or to a dict, not both
                level = inner
            level[slot.path[-1]] = texts.get(index)
        return shaped
