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


def dict_changed(root: str, path: tuple[str, ...], error: RuntimeError) -> PromptError:
    """A dict that another thread, or code run by reading it, changed meanwhile."""
    return PromptError(f"{format_path(root, path)}: changed while it was encoded ({error}); encode a copy")


def not_items(root: str, path: tuple[str, ...]) -> PromptError:
    """A dict subclass whose ``items()`` are not pairs."""
    return PromptError(f"{format_path(root, path)}: a dict whose items() gives something other than pairs")


def not_examples(examples: object) -> PromptError:
    """Something that no examples can be taken from."""
    return PromptError(f"examples: expected a list of dicts, not {type(examples).__name__}")


def not_a_tokenizer(tokenizer: object) -> PromptError:
    """An encoder that was given something else."""
    kind = type(tokenizer)
    return PromptError(f"tokenizer: expected a cpmbee.Tokenizer, not {kind.__module__}.{kind.__name__}")


def not_a_generator(rng: object) -> PromptError:
    """Something that cannot shuffle."""
    return PromptError(f"rng: expected a numpy.random.Generator, not {type(rng).__name__}")


def not_previous(previous: object) -> PromptError:
    """An earlier sample whose tables do not fit each other or the vocabulary."""
    return PromptError(
        f"previous: expected what encode_data returned with this vocabulary, not a {type(previous).__name__} whose "
        "tables differ from that"
    )


def not_initialized(name: str) -> TokenizeError:
    """An object of a subclass that left ``__init__`` out, or one that only ``__new__`` made."""
    return TokenizeError(f"this {name} is empty: its __init__ was not called, or failed")


def not_text(value: object) -> TokenizeError:
    """Something else where text is wanted."""
    return TokenizeError(f"expected a string, not {type(value).__name__}")


def not_ids(value: object) -> TokenizeError:
    """Something that no token ids can be taken from."""
    return TokenizeError(f"expected a list of token ids, not {type(value).__name__}")


def not_an_id(value: object) -> TokenizeError:
    """Something else where a token id is wanted."""
    return TokenizeError(f"token ids are integers, not {type(value).__name__}")


def unknown_id(token_id: int, vocab_size: int) -> TokenizeError:
    """A token id that nobody gave out; a huge one is not spelled out, which takes long or is refused by Python."""
    shown = str(token_id) if token_id.bit_length() <= 64 else f"of {token_id.bit_length()} bits"
    return TokenizeError(f"token id {shown} is not in the vocabulary of {vocab_size}")


def not_an_ext_table(value: object) -> TokenizeError:
    """An ext table that does not lead from ids to texts."""
    return TokenizeError(
        f"ext_table: expected a dict of token ids (0 to 2147483647) and their texts, not a {type(value).__name__} of "
        "something else"
    )
