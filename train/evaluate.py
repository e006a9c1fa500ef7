"""Greedy decoding with the PyTorch model, to measure a model during training without exporting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cpmbee.model import CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import Int32Array, TrainingBatch, collate, encode_sample


@torch.no_grad()
def greedy_answers(
    model: CpmBee, tokenizer: Tokenizer, requests: Sequence[dict[str, Any]], max_new_tokens: int
) -> list[str | None]:
    """Answer requests that have one answer, which comes last, by taking the best token at every step.

    Every step runs all tokens again: simple, and fast enough for models and requests this small.

    Args:
        model: in evaluation mode.
        tokenizer: its vocabulary.
        requests: dicts whose last key is ``<ans>``, with an empty answer.
        max_new_tokens: budget of one answer, its end counted.

    Returns:
        The answers; None where the budget ran out.

    Raises:
        ValueError: a request's answer is not its last leaf, or is not empty.
    """
    samples = [encode_sample(request, tokenizer) for request in requests]
    for number, sample in enumerate(samples):
        if np.count_nonzero(~sample.context) != 1 or sample.context[-1]:
            raise ValueError(f"request {number} must end with one empty answer")
    longest = max(map(len, samples))
    batch = collate([[sample] for sample in samples], tokenizer, row_length=longest + max_new_tokens)
    relations = RelationBuilder(model.config)
    answers: list[list[int]] = [[] for _ in samples]
    active = np.arange(len(samples), dtype=np.int32)
    for _ in range(max_new_tokens):
        width = int(batch.length[active].max())
        chosen = _best_next_tokens(model, _rows(batch, active, width), relations)
        active, chosen = active[chosen != tokenizer.eos_id], chosen[chosen != tokenizer.eos_id]
        if not len(active):
            break
        for row, token in zip(active, chosen, strict=True):
            answers[row].append(int(token))
        _append(batch, active, chosen)
    text = [tokenizer.decode(ids) for ids in answers]
    unfinished = set(active.tolist())
    return [None if row in unfinished else text[row] for row in range(len(samples))]


def _best_next_tokens(model: CpmBee, batch: TrainingBatch, relations: RelationBuilder) -> Int32Array:
    """The most likely base token after the last one of every row, int32[B]."""
    logits = model(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.input_subs),
        torch.from_numpy(batch.relation(relations)),
        logits_index=torch.from_numpy(batch.length[:, None] - 1),
    ).logits
    best: Int32Array = logits[:, 0].argmax(-1).int().numpy()
    return best


def _append(batch: TrainingBatch, rows: Int32Array, tokens: Int32Array) -> None:
    """Write one answer token behind each of ``rows``; it belongs to the segment of the token before it."""
    end = batch.length[rows]
    batch.input_ids[rows, end] = tokens
    for column in (batch.num_segments, batch.segment_ids, batch.segment_rel_offset, batch.task_ids):
        column[rows, end] = column[rows, end - 1]
    batch.length[rows] = end + 1


def _rows(batch: TrainingBatch, rows: Int32Array, width: int) -> TrainingBatch:
    """Some rows of a batch, cut to ``width`` tokens."""

    def cut(column: Int32Array) -> Int32Array:
        return np.ascontiguousarray(column[rows, :width])

    return replace(
        batch,
        input_ids=cut(batch.input_ids),
        input_subs=cut(batch.input_subs),
        length=batch.length[rows],
        context=np.ascontiguousarray(batch.context[rows, :width]),
        sample_ids=cut(batch.sample_ids),
        num_segments=cut(batch.num_segments),
        segment_ids=cut(batch.segment_ids),
        segment_rel_offset=cut(batch.segment_rel_offset),
        segment_rel=np.ascontiguousarray(batch.segment_rel[rows]),
        spans=cut(batch.spans),
        task_ids=cut(batch.task_ids),
        targets=cut(batch.targets),
    )
