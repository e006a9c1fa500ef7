"""Given answers, token by token: what is fed, and which column of the logits each next token has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from cpmbee.encoding import Prompt
from cpmbee.errors import PromptError, TokenizeError
from cpmbee.text_errors import format_path
from cpmbee.token_space import TokenSpace
from cpmbee.tokenizer import Tokenizer

Choice: TypeAlias = "str | Mapping[str, Choice]"


class FedToken(NamedTuple):
    """A token of an answer as the model reads it.

    Attributes:
        id: its vocabulary id.
        sub: its subscript.
        segment_id: of its answer.
        position: its place in its answer; ``<s>`` has 0.
        target: the token that follows it, numbered as in `TokenSpace`; an answer's last one is followed by ``</s>``.
    """

    id: int
    sub: int
    segment_id: int
    position: int
    target: int


@dataclass(frozen=True)
class EncodedChoice:
    """All answers of one request, filled in.

    Attributes:
        first: what follows the ``<s>`` of the first answer, which every choice has.
        fed: the tokens after that ``<s>``.
    """

    first: int
    fed: tuple[FedToken, ...]

    @property
    def num_targets(self) -> int:
        """Tokens that have a probability: those of the answers and the ``</s>`` of each."""
        return 1 + len(self.fed)


class ChoiceEncoder:
    """Encodes given answers of one request.

    Args:
        prompt: the encoded request.
        space: what its logits mean.
        tokenizer: the model's.
    """

    def __init__(self, prompt: Prompt, space: TokenSpace, tokenizer: Tokenizer) -> None:
        self._space = space
        self._tokenizer = tokenizer
        self._answers = prompt.answers
        rows = {token: space.vocab_size + i for i, token in enumerate(space.ext)}
        self._columns = {text: rows.get(token, token[0]) for token, text in prompt.ext_tokens.items()}
        self._keys: dict[tuple[str, ...], set[str]] = {}  # of each dict that a choice consists of
        for slot in prompt.answers:
            for depth, key in enumerate(slot.path):
                self._keys.setdefault(slot.path[:depth], set()).add(key)

    def encode(self, choice: Choice, name: str) -> EncodedChoice:
        """Encode one choice.

        Args:
            choice: a text, or a dict shaped like the request's ``<ans>``.
            name: of the choice, for errors.

        Raises:
            PromptError: it has another shape, or a token that the model cannot write as an answer to this request;
                names the choice and the path below ``<ans>``.
            TokenizeError: text with a lone ``<``.
        """
        space = self._space
        texts = [self._text(choice, slot.path, name) for slot in self._answers]
        first, fed = space.eos_id, list[FedToken]()
        for number, (slot, text) in enumerate(zip(self._answers, texts, strict=True)):
            answer = [*self._tokens(text, format_path(name, slot.path)), space.eos_id]
            if number == 0:
                first = answer[0]
            else:
                fed.append(FedToken(space.bos_id, 0, slot.segment_id, 0, answer[0]))
            for position, (token, target) in enumerate(pairwise(answer), 1):
                fed.append(FedToken(*space.base(token), slot.segment_id, position, target))
        return EncodedChoice(first, tuple(fed))

    def _text(self, choice: Choice, path: tuple[str, ...], name: str) -> str:
        """The text of one answer; every dict on the way has the keys of the request's ``<ans>`` and no others."""
        for depth, key in enumerate(path):
            where = format_path(name, path[:depth])
            if not isinstance(choice, Mapping):
                raise PromptError(f"{where}: expected a dict shaped like <ans>, not {type(choice).__name__}")
            if key not in choice:
                raise PromptError(f"{where}: has no {key!r}, which <ans> has")
            if unknown := [other for other in choice if other not in self._keys[path[:depth]]]:
                raise PromptError(f"{where}: has {unknown[0]!r}, which <ans> does not have")
            choice = choice[key]
        if not isinstance(choice, str):
            raise PromptError(f"{format_path(name, path)}: expected a string, not {type(choice).__name__}")
        return choice

    def _tokens(self, text: str, where: str) -> list[int]:
        """The columns of an answer's tokens."""
        try:
            ids, unknown = self._tokenizer.encode(text)
        except TokenizeError as error:
            raise TokenizeError(f"{where}: {error}") from None
        tokens = []
        for token in ids:
            piece = unknown.get(token)
            if token == self._space.eos_id:
                raise PromptError(f"{where}: holds </s>, which ends an answer; it is added by itself")
            if token == self._space.forbidden or (piece is not None and piece not in self._columns):
                piece = piece or "<unk>"
                raise PromptError(f"{where}: holds {piece!r}, which is neither in the vocabulary nor in the request")
            tokens.append(token if piece is None else self._columns[piece])
        return tokens
