"""The prompt encoder in plain Python: what `cpmbee._prompt` computes, said simply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from cpmbee.encoding import MAX_DEPTH, MAX_NESTING, MAX_SEGMENTS, AnswerSlot, Data, EncodedData, Int32, Prompt
from cpmbee.errors import TokenizeError
from cpmbee.plain.tokenizer import Tokenizer
from cpmbee.text_errors import (
    dict_changed,
    format_path,
    key_not_a_string,
    leaf_not_a_string,
    missing_answer,
    no_answer_leaf,
    not_a_dict,
    not_a_generator,
    not_a_tokenizer,
    not_examples,
    not_items,
    too_deep,
    too_long,
    too_many_segments,
)
from cpmbee.token_input import exact_previous, exact_text, group_of

_INT32_MAX = 2**31 - 1


@dataclass
class _Segment:
    text: str
    parent: int
    path: tuple[str, ...]
    is_answer: bool = False


@dataclass
class _Tables:
    """What has been given out so far: ext ids by text, subscripts by group."""

    ext_table: dict[int, str] = field(default_factory=dict)
    groups: dict[str, dict[int, int]] = field(default_factory=dict)


def encode_data(
    data: Data,
    tokenizer: Tokenizer,
    previous: EncodedData | None = None,
    rng: np.random.Generator | None = None,
) -> EncodedData:
    """Encode one sample with its answers, as training does.

    Args:
        data: nested dict of strings; it is not modified.
        tokenizer: gives the ids.
        previous: the sample whose ext ids and subscripts this one continues, such as the request of an example.
        rng: shuffles the keys below ``<ans>``; None keeps their order.

    Raises:
        PromptError: ``data`` is not a nested dict of strings, or exceeds a limit; names the path.
        TokenizeError: a text has an unclosed ``<``; names the path.
    """
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise not_a_generator(rng)
    _check_tokenizer(tokenizer)
    tables = _Tables()
    if previous is not None:
        tables = _Tables(*exact_previous(previous, tokenizer.vocab_size, tokenizer.token_to_id))
    return _encode(_segments(data, "$", rng), tokenizer, tables, "$")


def encode_prompt(data: Data, tokenizer: Tokenizer, examples: Sequence[Data] = ()) -> Prompt:
    """Encode a request for generation.

    Args:
        data: nested dict of strings with an ``<ans>`` key; the leaves under it are ignored. It is not modified.
        tokenizer: gives the ids.
        examples: in-context examples, dicts like ``data`` with their answers filled in.

    Raises:
        PromptError: there is nothing to answer, or ``data`` is not a nested dict of strings, or exceeds a limit;
            names the path.
        TokenizeError: a text has an unclosed ``<``; names the path.
    """
    tables = _Tables()
    segments = _segments(data, "$")
    _check_tokenizer(tokenizer)
    if all(segment.path[:1] != ("<ans>",) for segment in segments):
        raise missing_answer("$")
    answers = []
    for index, segment in enumerate(segments):
        if segment.is_answer:
            answers.append(AnswerSlot(segment.path[1:], index))
            segment.text = f"<ans_{len(answers)}>"  # never fed; takes the subscripts that the model was trained with
    if not answers:
        raise no_answer_leaf("$")
    samples = [_encode(segments, tokenizer, tables, "$")]
    kept = samples[0].context
    request = samples[0]
    request.input_ids, request.input_subs, request.segment_ids = (
        column[kept] for column in (request.input_ids, request.input_subs, request.segment_ids)
    )
    for index, example in enumerate(_iterator(examples)):
        root = f"examples[{index}]"
        samples.append(_encode(_segments(example, root), tokenizer, tables, root))

    lengths = [len(sample.input_ids) for sample in samples]
    sizes = [len(sample.segment_rel) for sample in samples]
    total = sum(lengths)
    if total > _INT32_MAX or sum(sizes) > _INT32_MAX:
        raise too_long("$")
    return Prompt(
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        input_subs=np.concatenate([sample.input_subs for sample in samples]),
        segment_ids=np.concatenate([sample.segment_ids for sample in samples]),
        sample_ids=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
        positions=np.arange(total, dtype=np.int32),
        num_segments=np.repeat(np.array([s.num_segments for s in samples], np.int32), lengths),
        rel_offset=np.repeat(np.cumsum([0, *sizes[:-1]]).astype(np.int32), lengths),
        context=np.ones(total, np.bool_),
        segment_rel=np.concatenate([sample.segment_rel for sample in samples]),
        answers=tuple(answers),
        ext_tokens=_ext_tokens(tables, tokenizer),
        num_samples=len(samples),
    )


def _check_tokenizer(tokenizer: object) -> None:
    """Either implementation will do."""
    if not hasattr(tokenizer, "token_to_id"):
        raise not_a_tokenizer(tokenizer)
    tokenizer.token_to_id("<unk>")  # refused by one that is empty


def _iterator(examples: Iterable[Data]) -> Iterator[Data]:
    try:
        return iter(examples)
    except TypeError:
        raise not_examples(examples) from None


def _segments(data: Data, root: str, rng: np.random.Generator | None = None) -> list[_Segment]:
    """Every key and value of ``data`` in the order of their ids, the root first."""
    if not issubclass(type(data), dict):
        raise not_a_dict(root, data)
    segments = [_Segment("<root>", -1, ())]

    def add(segment: _Segment) -> int:
        if len(segments) == MAX_SEGMENTS:
            raise too_many_segments(root, MAX_SEGMENTS)
        segments.append(segment)
        return len(segments) - 1

    def walk(value: object, parent: int, path: tuple[str, ...]) -> None:
        under_answer = path[:1] == ("<ans>",)
        if issubclass(type(value), dict):
            if len(path) >= MAX_NESTING:
                raise too_deep(root, path, MAX_NESTING)
            items = _items(value, root, path)
            if rng is not None and under_answer:
                items = _shuffled(items, rng)
            for key, child in items:
                if not issubclass(type(key), str):
                    raise key_not_a_string(root, path, key)
                name = exact_text(key)
                walk(child, add(_Segment(name, parent, (*path, name))), (*path, name))
        elif issubclass(type(value), str):
            add(_Segment(exact_text(value), parent, path, under_answer))
        else:
            raise leaf_not_a_string(root, path, value)

    walk(data, 0, ())
    return segments


def _items(value: Any, root: str, path: tuple[str, ...]) -> list[tuple[object, object]]:
    """Keys and values as they are now: whatever changes the dict later, these stay. No more than can be used."""
    items = []
    try:
        for item in islice(value.items(), MAX_SEGMENTS):
            try:
                key, child = item
            except (TypeError, ValueError):
                raise not_items(root, path) from None
            items.append((key, child))
    except RuntimeError as error:
        if "during iteration" not in str(error):
            raise
        raise dict_changed(root, path, error) from None
    return items


def _shuffled(items: list[tuple[object, object]], rng: np.random.Generator) -> list[tuple[object, object]]:
    order = [int(i) for i in rng.permutation(len(items))]
    if not all(0 <= i < len(items) for i in order):
        raise not_a_generator(rng)
    return [items[i] for i in order]


def _encode(segments: list[_Segment], tokenizer: Tokenizer, tables: _Tables, root: str) -> EncodedData:
    ids: list[int] = []
    subs: list[int] = []
    lengths = []
    for segment in segments:
        try:
            tokens, tables.ext_table = tokenizer.encode(segment.text, tables.ext_table)
        except TokenizeError as error:
            raise TokenizeError(f"{format_path(root, segment.path)}: {error}") from None
        pairs = [_subscript(token, tokenizer, tables) for token in tokens]
        pairs.insert(0, (tokenizer.bos_id, 0))
        if not segment.is_answer:
            pairs.append((tokenizer.eos_id, 0))
        ids += [base for base, _ in pairs]
        subs += [sub for _, sub in pairs]
        lengths.append(len(pairs))
    return EncodedData(
        input_ids=np.array(ids, np.int32),
        input_subs=np.array(subs, np.int32),
        segment_ids=np.repeat(np.arange(len(segments), dtype=np.int32), lengths),
        context=np.repeat(np.array([not segment.is_answer for segment in segments], np.bool_), lengths),
        segment_rel=segment_relations([segment.parent for segment in segments]),
        num_segments=len(segments),
        ext_table=tables.ext_table,
        token_id_table=tables.groups,
    )


def _subscript(token: int, tokenizer: Tokenizer, tables: _Tables) -> tuple[int, int]:
    """A token's base id and its subscript, which a token seen for the first time is given here."""
    text = tables.ext_table.get(token)
    if text is None:
        return token, 0
    group = group_of(text, tokenizer.token_to_id)
    base = tokenizer.token_to_id(group)
    subs = tables.groups.setdefault(group, {})
    return tokenizer.unk_id if base is None else base, subs.setdefault(token, len(subs))


def _ext_tokens(tables: _Tables, tokenizer: Tokenizer) -> dict[tuple[int, int], str]:
    tokens = {}
    for group, subs in tables.groups.items():
        base = tokenizer.token_to_id(group)
        if group != "<ans>" and base is not None:
            tokens.update({(base, sub): tables.ext_table[ext_id] for ext_id, sub in subs.items()})
    return tokens


def segment_relations(parents: Sequence[int]) -> Int32:
    """Buckets between all segments of a sample.

    Args:
        parents: of each segment the segment above it, -1 for the root; a parent comes before its children.

    Returns:
        int32[S * S]: row i, column j is the bucket of going up from i and down to j.
    """
    ancestors: list[list[int]] = []  # from the segment itself up to the root
    for segment, parent in enumerate(parents):
        ancestors.append([segment, *(ancestors[parent] if parent >= 0 else ())])
    size = len(parents)
    table = np.zeros((size, size), np.int32)
    for i in range(size):
        for j in range(size):
            above = next(node for node in ancestors[i] if node in ancestors[j])
            table[i, j] = segment_bucket(ancestors[i].index(above), ancestors[j].index(above))
    return table.reshape(-1)


def segment_bucket(n_up: int, n_down: int) -> int:
    """Bucket of a way through the tree; 0 is the segment itself, `DIFFERENT_SAMPLE` stays free."""
    bucket = min(n_up, MAX_DEPTH - 1) * MAX_DEPTH + min(n_down, MAX_DEPTH - 1)
    return bucket + 1 if bucket else 0
