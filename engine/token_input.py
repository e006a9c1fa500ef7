"""What callers hand to a tokenizer, checked and made plain once for both implementations.

Subclasses of ``str``, ``dict`` and ``int`` may run code of their own whenever they are read, compared or hashed. So
each is read once, and what goes on is the plain object that it stood for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from cpmbee.encoding import EncodedData
from cpmbee.errors import VocabularyError
from cpmbee.text_errors import not_an_ext_table, not_an_id, not_ids, not_previous, not_text
from cpmbee.vocabulary import MAX_TOKENS, is_special

_INT32_MAX = 2**31 - 1
_Value = TypeVar("_Value")


def exact_text(text: object) -> str:
    """The characters of any string.

    Raises:
        TokenizeError: ``text`` is no string.
    """
    if type(text) is str:
        return text
    if not issubclass(type(text), str):
        raise not_text(text)
    return str.__str__(text)  # whatever __str__ of a subclass says


def exact_id(token_id: object) -> int:
    """The number that a token id is, however large.

    Raises:
        TokenizeError: ``token_id`` is no integer.
    """
    if type(token_id) is int:
        return token_id
    try:
        return int.__int__(operator.index(token_id))  # type: ignore[arg-type]
    except TypeError:
        raise not_an_id(token_id) from None


def iterator_of(ids: Iterable[int]) -> Iterator[int]:
    """The token ids, one by one.

    Raises:
        TokenizeError: nothing can be taken from ``ids``.
    """
    try:
        return iter(ids)
    except TypeError:
        raise not_ids(ids) from None


def exact_ext_table(given: Mapping[int, str] | None) -> dict[int, str]:
    """A copy of an ext table.

    Raises:
        TokenizeError: it is not a mapping from token ids to strings.
    """
    if given is None:
        return {}
    try:
        table = dict(given) if _is_exact(given, str) else _exact_items(given, exact_text)
    except (TypeError, ValueError):  # of dict(), or a TokenizeError
        raise not_an_ext_table(given) from None
    if table and not 0 <= min(table) <= max(table) <= _INT32_MAX:
        raise not_an_ext_table(given)
    return table


def _is_exact(table: object, kind: type) -> bool:
    """Whether there is nothing in a dict that could run code of its own."""
    return type(table) is dict and {*map(type, table)} <= {int} and {*map(type, table.values())} <= {kind}


def _exact_items(table: Any, exact_value: Callable[[object], _Value]) -> dict[int, _Value]:
    return {exact_id(token_id): exact_value(value) for token_id, value in dict(table).items()}


def exact_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """The tokens of a vocabulary as they are now.

    Raises:
        VocabularyError: ``tokens`` is not a list of strings.
    """
    try:
        given = tuple(islice(tokens, MAX_TOKENS + 1))
    except TypeError:
        raise VocabularyError(f"tokens: expected a list of strings, not {type(tokens).__name__}") from None
    for index, token in enumerate(given):
        if not issubclass(type(token), str):
            raise VocabularyError(f"token {index} must be a string, not {type(token).__name__}")
    return tuple(map(exact_text, given))


def exact_previous(
    previous: EncodedData, vocab_size: int, token_to_id: Callable[[str], int | None]
) -> tuple[dict[int, str], dict[str, dict[int, int]]]:
    """Copies of the tables that an earlier sample leaves to the next: ext ids, and subscripts by group.

    Raises:
        PromptError: they are not what encoding with this vocabulary gives out.
    """
    if not isinstance(previous, EncodedData):
        raise not_previous(previous)
    try:
        table = exact_ext_table(previous.ext_table)
        groups = {
            exact_text(group): dict(subs) if _is_exact(subs, int) else _exact_items(subs, exact_id)
            for group, subs in dict(previous.token_id_table).items()
        }
    except (AttributeError, TypeError, ValueError):
        raise not_previous(previous) from None
    owners = {ext_id: group for group, subs in groups.items() for ext_id in subs}
    if (
        list(table) != list(range(vocab_size, vocab_size + len(table)))
        or len(set(table.values())) != len(table)
        or owners != {ext_id: group_of(text, token_to_id) for ext_id, text in table.items()}
        or any(not subs or list(subs.values()) != list(range(len(subs))) for subs in groups.values())
    ):
        raise not_previous(previous)
    return table, groups


def group_of(text: str, token_to_id: Callable[[str], int | None]) -> str:
    """The vocabulary entry that an extra token counts under: ``<mask>`` for ``<mask_3>``, ``<unk>`` for most."""
    group = f"<{text[1:-1].partition('_')[0]}>" if is_special(text) else "<unk>"
    return group if token_to_id(group) is not None else "<unk>"
