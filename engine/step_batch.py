"""One decode step of all live sequences: writes into the runner only what has changed since the step before."""

from __future__ import annotations

import numpy as np

from cpmbee.relation import RelationBuilder
from cpmbee.request import Request
from cpmbee.runner import Int32, Runner
from cpmbee.sequence import Sequence
from cpmbee.token_space import TokenSpace

KEY_STEP = 32  # keys are padded to a multiple of this, so that shapes and bindings change only now and then


class ExtColumns:
    """Extension vocabularies of several requests, one after the other.

    Attributes:
        ids: (ext,) base ids.
        subs: (ext,) subscripts.
        begins: for each request, the column of the logits where its own begin.
    """

    def __init__(self, spaces: list[TokenSpace]) -> None:
        rows = [row for space in spaces for row in space.ext]
        self.ids: Int32 = np.array([base for base, _ in rows], np.int32)
        self.subs: Int32 = np.array([sub for _, sub in rows], np.int32)
        self.begins: list[int] = []
        begin = spaces[0].vocab_size if spaces else 0
        for space in spaces:
            self.begins.append(begin)
            begin += len(space.ext)


class StepBatch:
    """The sequences that the runner's arrays hold, and how to bring those arrays up to date."""

    def __init__(self, runner: Runner, builder: RelationBuilder) -> None:
        self._runner = runner
        self._builder = builder
        self.reset()

    def reset(self) -> None:
        """Forget everything: somebody else has used the runner."""
        self._requests: list[Request] = []
        self._placed: list[Sequence | None] = []  # what each row of the arrays was written for
        self._keys = 0

    def step(self, requests: list[Request]) -> None:
        """Feed the next token of every sequence of ``requests`` and let their searches choose."""
        runner, fill = self._runner, self._builder.fill
        sequences = [(request, s) for request in requests for s in request.search.sequences]
        self._fit(requests, len(sequences), max(len(s) for _, s in sequences) + 1)
        for b, (request, sequence) in enumerate(sequences):
            row = request.rows.take()
            request.tail.add(row)
            sequence.feed(row, request.prompt.answers[sequence.answer].segment_id)
            length = len(sequence)
            if self._placed[b] is sequence:
                runner.slots[b, length - 1] = row
            else:
                runner.slots[b, :length] = sequence.slots[:length]
                runner.slots[b, length:] = 0
                self._placed[b] = sequence
            runner.input_ids[b, 0] = sequence.next_id
            runner.input_subs[b, 0] = sequence.next_sub
            runner.new_slots[b, 0] = row
            fill(runner.relation[b], sequence.layout, length - 1)
        runner.run()
        logits = runner.logits[:, 0]
        begin = 0
        for request, ext_begin in zip(requests, self._ext.begins, strict=True):
            end = begin + len(request.search.sequences)
            request.search.advance(logits[begin:end], ext_begin)
            begin = end

    def _fit(self, requests: list[Request], batch: int, keys: int) -> None:
        """Give the runner arrays of the right size, if those it has are not."""
        same = requests == self._requests
        if same and batch == len(self._placed) and keys <= self._keys:
            return
        if not same:
            self._requests = requests.copy()
            self._ext = ExtColumns([request.space for request in requests])
        self._keys = -(-keys // KEY_STEP) * KEY_STEP
        self._placed = [None] * batch
        self._runner.reshape(batch, 1, self._keys, len(self._ext.ids))
        self._runner.ext_ids[:] = self._ext.ids
        self._runner.ext_subs[:] = self._ext.subs
