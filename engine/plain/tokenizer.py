"""The tokenizer in plain Python: what `cpmbee._tokenizer` computes, said simply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cpmbee.text_errors import not_initialized, unclosed_special, unknown_id
from cpmbee.token_input import exact_ext_table, exact_id, exact_text, exact_tokens, iterator_of
from cpmbee.vocabulary import check_vocabulary, is_special, read_vocabulary


class Tokenizer:
    """Text to token ids and back.

    ``<...>`` in text is a special token, ``<<`` a literal ``<``; the rest is cut into vocabulary entries, always the
    longest that fits. Characters that fit nothing form unknown runs. An unknown run, and a special token that the
    vocabulary lacks, gets an id past the vocabulary, one per distinct text, listed in an ``ext_table``.

    Args:
        tokens: the vocabulary as its file spells it; the index is the id.

    Raises:
        VocabularyError: ``tokens`` is not a usable vocabulary.
    """

    _tokens: tuple[str, ...] = ()  # empty until __init__ has succeeded
    _spelled: tuple[str, ...] = ()

    def __init__(self, tokens: Sequence[str]) -> None:
        spelled = exact_tokens(tokens)
        ids = check_vocabulary(spelled)
        if self._tokens:  # asked here, since reading the tokens may have run any code
            raise RuntimeError("a Tokenizer is built once")
        self._ids = ids
        self._tokens = tuple(self._ids)
        self._spelled = spelled
        self._longest: dict[str, int] = {}  # first character -> length of the longest plain token
        for token in self._tokens:
            if not is_special(token):
                self._longest[token[0]] = max(len(token), self._longest.get(token[0], 0))

    def _require_vocabulary(self) -> None:
        if not self._tokens:
            raise not_initialized("Tokenizer")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read ``vocab.txt``.

        Raises:
            VocabularyError: the file is not a usable vocabulary; names the file and the line.
        """
        return cls(read_vocabulary(path))

    def encode(self, text: str, ext_table: Mapping[int, str] | None = None) -> tuple[list[int], dict[int, str]]:
        """Cut ``text`` into tokens.

        Args:
            text: any string; lone surrogates count as unknown characters.
            ext_table: ids given out earlier, which keep their meaning; it is not modified.

        Returns:
            The ids, and the ext table with what this text added.

        Raises:
            TokenizeError: a ``<`` opens a special token that does not close; names the character offset. Or ``text`` is
                not a string, or ``ext_table`` not a dict of ids and texts.
        """
        self._require_vocabulary()
        text = exact_text(text)
        table = exact_ext_table(ext_table)
        by_text = {known: ext_id for ext_id, known in table.items()}
        ids = []
        for token_id, piece in self._pieces(text):
            if token_id is None and (token_id := by_text.get(piece)) is None:
                token_id = len(self._tokens) + len(table)
                while token_id in table:
                    token_id += 1
                table[token_id] = piece
                by_text[piece] = token_id
            ids.append(token_id)
        return ids, table

    def _pieces(self, text: str) -> Iterator[tuple[int | None, str]]:
        for part, special in split_specials(text):
            if special:
                yield self._ids.get(part), part
            else:
                yield from self._plain_pieces(part)

    def _plain_pieces(self, text: str) -> Iterator[tuple[int | None, str]]:
        start = unknown = 0  # text[unknown:start] is the pending unknown run
        while start < len(text):
            token_id, length = self._longest_match(text, start)
            if token_id is None:
                start += 1
                continue
            if unknown < start:
                yield None, text[unknown:start]
            yield token_id, text[start : start + length]
            start += length
            unknown = start
        if unknown < start:
            yield None, text[unknown:]

    def _longest_match(self, text: str, start: int) -> tuple[int | None, int]:
        for length in range(min(self._longest.get(text[start], 0), len(text) - start), 0, -1):
            piece = text[start : start + length]
            if (token_id := self._ids.get(piece)) is not None and not is_special(piece):
                return token_id, length
        return None, 0

    def decode(self, ids: Iterable[int], ext_table: Mapping[int, str] | None = None) -> str:
        """Join tokens to text in which a literal ``<`` is escaped, so that it can be encoded again.

        Args:
            ids: token ids.
            ext_table: texts that stand for ids, before the vocabulary's own.

        Raises:
            TokenizeError: an id is in neither; names it. Or ``ids`` are not integers, or ``ext_table`` not a dict of
                ids and texts.
        """
        self._require_vocabulary()
        table = exact_ext_table(ext_table)
        numbers = map(exact_id, iterator_of(ids))
        return "".join([table[i] if i in table else self._text_of(i) for i in numbers])

    def _text_of(self, token_id: int) -> str:
        token = self.id_to_token(token_id)
        return token if is_special(token) else self.escape(token)

    @staticmethod
    def escape(text: str) -> str:
        """Make ``text`` safe to encode as plain text: every ``<`` becomes ``<<``."""
        return exact_text(text).replace("<", "<<")

    @staticmethod
    def unescape(text: str) -> str:
        """Undo `escape`."""
        return exact_text(text).replace("<<", "<")

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry (newline and space as themselves), or None.

        Raises:
            TokenizeError: ``token`` is not a string.
        """
        self._require_vocabulary()
        return self._ids.get(exact_text(token))

    def id_to_token(self, token_id: int) -> str:
        r"""The vocabulary entry of an id (newline as ``"\n"``).

        Raises:
            TokenizeError: the id is not in the vocabulary.
        """
        self._require_vocabulary()
        index = exact_id(token_id)
        if not 0 <= index < len(self._tokens):
            raise unknown_id(index, len(self._tokens))
        return self._tokens[index]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary as its file spells it."""
        return self._spelled

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ext ids start here."""
        return len(self._tokens)

    @property
    def pad_id(self) -> int:
        """Id of ``<pad>``."""
        return self._ids["<pad>"]

    @property
    def unk_id(self) -> int:
        """Id of ``<unk>``, the group of unknown text."""
        return self._ids["<unk>"]

    @property
    def mask_id(self) -> int:
        """Id of ``<mask>``."""
        return self._ids["<mask>"]

    @property
    def bos_id(self) -> int:
        """Id of ``<s>``, which opens every segment."""
        return self._ids["<s>"]

    @property
    def eos_id(self) -> int:
        """Id of ``</s>``, which closes context segments and ends an answer."""
        return self._ids["</s>"]

    @property
    def root_id(self) -> int:
        """Id of ``<root>``, the first segment."""
        return self._ids["<root>"]

    @property
    def ans_id(self) -> int:
        """Id of ``<ans>``."""
        return self._ids["<ans>"]

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tuple[str, ...]]]:
        return type(self), (self._spelled,)

    def __repr__(self) -> str:
        return f"Tokenizer(<{len(self._tokens)} tokens>)"


def split_specials(text: str) -> Iterator[tuple[str, bool]]:
    """Cut ``text`` into plain parts (unescaped) and special tokens, told apart by the bool.

    Raises:
        TokenizeError: a special token does not close.
    """
    plain: list[str] = []
    position = 0
    while (opening := text.find("<", position)) >= 0:
        plain.append(text[position:opening])
        if text.startswith("<<", opening):
            plain.append("<")
            position = opening + 2
            continue
        # The character after the `<` belongs to the token whatever it is, a `>` too.
        closing = text.find(">", opening + 2)
        if closing < 0 or "<" in text[opening + 2 : closing]:
            raise unclosed_special(opening)
        yield "".join(plain), False
        yield text[opening : closing + 1], True
        plain = []
        position = closing + 1
    yield "".join(plain) + text[position:], False
