"""What is said about text and requests that cannot be encoded; one place, so that both implementations say the same."""

from __future__ import annotations

from cpmbee.errors import PromptError, TokenizeError

_LONGEST_KEY = 40
_LONGEST_PATH = 8


def format_path(root: str, path: tuple[str, ...]) -> str:
    """``$.options.<option_2>``: on one line and short, whatever the keys hold."""
    keys = path if len(path) <= _LONGEST_PATH else (*path[: _LONGEST_PATH - 1], "...", path[-1])
    return ".".join([root, *map(_format_key, keys)])


def _format_key(key: str) -> str:
    short = key if len(key) <= _LONGEST_KEY else f"{key[: _LONGEST_KEY - 3]}..."
    return short if short.isprintable() and short else repr(short)


def unclosed_special(offset: int, where: str | None = None) -> TokenizeError:
    """A ``<`` that opens a special token which never closes, or in which another one opens."""
    prefix = f"{where}: " if where else ""
    return TokenizeError(
        f"{prefix}the `<` at character {offset} opens a special token that is not closed; "
        "for a literal `<` write `<<`, or pass the text through Tokenizer.escape"
    )


def not_a_dict(root: str, value: object) -> PromptError:
    """The request or an example is not a dict."""
    return PromptError(f"{root}: expected a dict, not {type(value).__name__}")


def key_not_a_string(root: str, path: tuple[str, ...], key: object) -> PromptError:
    """A key of some other type."""
    return PromptError(f"{format_path(root, path)}: has a key of type {type(key).__name__}; keys must be strings")


def leaf_not_a_string(root: str, path: tuple[str, ...], value: object) -> PromptError:
    """A leaf of some other type."""
    return PromptError(f"{format_path(root, path)}: expected a string or a dict, not {type(value).__name__}")


def too_deep(root: str, path: tuple[str, ...], limit: int) -> PromptError:
    """Dicts in dicts in dicts, or a dict that holds itself."""
    return PromptError(f"{format_path(root, path)}: dicts are nested deeper than {limit}")


def too_many_segments(root: str, limit: int) -> PromptError:
    """More keys and values than one sample may have."""
    return PromptError(f"{root}: more than {limit} segments (each key and each value is one)")


def too_long(root: str) -> PromptError:
    """More tokens, or a larger table of segment relations, than int32 can index."""
    return PromptError(f"{root}: the request is too long to be indexed with 32 bits")


def missing_answer(root: str) -> PromptError:
    """A request without the key under which the model writes."""
    return PromptError(f'{root}: has no "<ans>" key, so nothing to answer; add "<ans>": ""')


def no_answer_leaf(root: str) -> PromptError:
    """``<ans>`` holds only empty dicts."""
    return PromptError(f'{root}.<ans>: holds no answer to write; give it a "" for each answer, such as {{"name": ""}}')
