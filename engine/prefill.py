"""Reading prompts: each one once, several short ones in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.row_keeper import RowHolder, RowKeeper
from cpmbee.runner import Int32, Runner, RunStopped
from cpmbee.search import Float32

RUN_TOKENS = 1024  # more tokens in one run gain nothing on a CPU, and relation matrices grow with the square
NO_EXT: Int32 = np.empty(0, np.int32)
PADDING = 1.25  # prompts share a run if the longest is at most this much longer than the shortest


@dataclass(frozen=True)
class Reading:
    """Tokens to read in one go: a request after its examples, or one example.

    Attributes:
        input_ids: (queries,) tokens to read.
        input_subs: (queries,) their subscripts.
        layout: all tokens they may look at, themselves last.
        slots: (keys,) cache rows of those tokens.
    """

    input_ids: Int32
    input_subs: Int32
    layout: TokenLayout
    slots: Int32


def read(
    runner: Runner,
    builder: RelationBuilder,
    readings: list[Reading],
    ext_ids: Int32,
    ext_subs: Int32,
    stopped: Callable[[], bool],
) -> list[Float32]:
    """Compute the cache rows of ``readings``.

    Args:
        runner: calls the graph.
        builder: of relations.
        readings: what to read.
        ext_ids: (ext,) extension vocabulary of all of them.
        ext_subs: (ext,) its subscripts.
        stopped: whether nobody wants the result any more; asked before every run.

    Returns:
        For each reading, the (vocabulary + ext,) logits after its last token.

    Raises:
        RunStopped: nobody wants the result any more.
    """
    logits: list[Float32] = [np.empty(0, np.float32)] * len(readings)
    for group in _groups(readings):
        if stopped():
            raise RunStopped
        queries = max(len(readings[i].input_ids) for i in group)
        keys = max(len(readings[i].slots) for i in group)
        runner.reshape(len(group), queries, keys, len(ext_ids))
        runner.ext_ids[:] = ext_ids
        runner.ext_subs[:] = ext_subs
        for b, i in enumerate(group):
            reading = readings[i]
            own, seen = len(reading.input_ids), len(reading.slots)
            runner.input_ids[b, :own] = reading.input_ids
            runner.input_subs[b, :own] = reading.input_subs
            runner.slots[b, :seen] = reading.slots
            runner.new_slots[b, :own] = reading.slots[seen - own :]
            runner.logits_index[b, 0] = own - 1
            builder.fill(runner.relation[b, :own], reading.layout, seen - own)
        runner.run()
        for b, i in enumerate(group):
            logits[i] = runner.logits[b, 0]
    return logits


def read_examples(
    holder: RowHolder, keeper: RowKeeper, runner: Runner, builder: RelationBuilder, stopped: Callable[[], bool]
) -> None:
    """Compute the examples of a holder that nobody has computed before, and keep them.

    Raises:
        RunStopped: as `read`.
    """
    missing = {e.key: e for e in holder.examples if holder.example_leases[e.key] not in holder.rows.shared}
    if not missing:
        return
    layout = TokenLayout.from_prompt(holder.prompt)
    readings = []
    for key, example in missing.items():
        slots = holder.example_leases[key].take_many(len(example.indices))
        ids, subs = holder.prompt.input_ids[example.indices], holder.prompt.input_subs[example.indices]
        readings.append(Reading(ids, subs, layout.take(example.indices), slots))
    read(runner, builder, readings, NO_EXT, NO_EXT, stopped)
    for key in missing:
        keeper.keep_example(holder, key)


def _groups(readings: list[Reading]) -> Iterator[list[int]]:
    """Readings of about one length, as many as fit a run; long ones alone."""
    by_length = sorted(range(len(readings)), key=lambda i: len(readings[i].slots))
    group: list[int] = []
    for i in by_length:
        length = len(readings[i].slots)
        if group and (length * (len(group) + 1) > RUN_TOKENS or length > PADDING * len(readings[group[0]].slots)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
