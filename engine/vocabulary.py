"""Reading and checking a vocabulary: what makes a list of tokens usable, whichever tokenizer runs on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpmbee.errors import VocabularyError
from cpmbee.regular_file import read_text

NEWLINE, SPACE = "</n>", "</_>"  # how the file spells "\n" and " "
REQUIRED = ("<pad>", "<unk>", "<mask>", "<s>", "</s>", "<root>", "<ans>")
MAX_FILE_BYTES = 16 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_LENGTH = 512  # characters; bounds the work of one longest match


def read_vocabulary(path: str | Path) -> list[str]:
    """Read a vocabulary file: UTF-8, one token a line; empty lines and a byte order mark are skipped.

    Returns:
        The tokens as the file spells them; the index is the id.

    Raises:
        VocabularyError: the file cannot be read, is not UTF-8, is absurdly large, repeats a token or lacks a
            required one; names the file and, where there is one, the line.
    """
    text = read_text(path, "the vocabulary", VocabularyError, MAX_FILE_BYTES)
    tokens: list[str] = []
    first_line: dict[str, int] = {}
    for number, line_text in enumerate(text.split("\n"), 1):
        token = line_text.removesuffix("\r")
        if not token:
            continue
        if len(tokens) == MAX_TOKENS:
            raise VocabularyError(f"{path}:{number}: more than {MAX_TOKENS} tokens; is this a vocabulary?")
        if token in first_line:
            raise VocabularyError(f"{path}:{number}: the token {token!r} is already on line {first_line[token]}")
        if len(token) > MAX_TOKEN_LENGTH:
            raise VocabularyError(f"{path}:{number}: a token of {len(token)} characters; is this a vocabulary?")
        first_line[token] = number
        tokens.append(token)
    try:
        check_vocabulary(tokens)
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None
    return tokens


def check_vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Make sure that a tokenizer can be built from ``tokens``.

    Returns:
        Token -> id, with newline and space under the characters that they stand for.

    Raises:
        VocabularyError: a token is not a string, empty, too long or repeated, or a required one is missing.
    """
    if len(tokens) > MAX_TOKENS:
        raise VocabularyError(f"{len(tokens)} tokens; a vocabulary has at most {MAX_TOKENS}")
    spelled = {NEWLINE: "\n", SPACE: " "}
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_LENGTH:
            raise VocabularyError(f"token {index} must be a string of 1 to {MAX_TOKEN_LENGTH} characters")
        if ids.setdefault(spelled.get(token, token), index) != index:
            raise VocabularyError(f"token {index} repeats {token!r}")
    required = {spelled.get(token, token): token for token in (*REQUIRED, NEWLINE, SPACE)}
    if missing := [name for token, name in required.items() if token not in ids]:
        raise VocabularyError(f"lacks {', '.join(missing)}; is this the vocabulary of a CPM-Bee model?")
    return ids


def is_special(token: str) -> bool:
    """Whether ``token`` has the form ``<...>``; such tokens are never found in plain text."""
    return len(token) > 1 and token[0] == "<" and token[-1] == ">"
