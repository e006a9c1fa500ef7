"""Whole answers through the engine: every logit that the exported folder sees while it writes them, for comparison.

Answers themselves are no evidence: where two tokens or two beams are nearly tied, rounding decides, and a right export
may write another answer than the reference. The searches are the same code on the same logits, though, so an engine
whose every call gets the reference's logits writes what the reference would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cpmbee.engine import Engine
from cpmbee.export.comparison import Call
from cpmbee.export.probes import GraphInputs, Request
from cpmbee.runner import Backend, Runner
from cpmbee.tokenizer import Tokenizer

BEAM_SIZES = {"greedy answers": 1, "beam answers": 3}
NEW_TOKENS = 6


def record_answers(backend: Backend, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Call]:
    """Let an engine write answers to all requests, greedy and with beams; those without examples as one batch.

    Returns:
        The calls that its model got, in order, with their logits.
    """
    recording = _RecordingBackend(backend)
    engine = Engine(recording, tokenizer)
    for recording.kind, beam_size in BEAM_SIZES.items():
        together = [request.data for request in requests if not request.examples]
        if together:
            engine.generate(together, beam_size=beam_size, max_new_tokens=NEW_TOKENS)
        for request in requests:
            if request.examples:
                engine.generate(request.data, request.examples, beam_size=beam_size, max_new_tokens=NEW_TOKENS)
    return recording.calls


class _RecordingBackend(Backend):
    """A backend that keeps what its model is asked and what it answers."""

    def __init__(self, backend: Backend) -> None:
        self.config = backend.config
        self.cache_rows = backend.cache_rows
        self.kind = ""
        self.calls: list[Call] = []
        self._backend = backend

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner of the backend, with `run` replaced while it is lent."""
        with self._backend.runner() as runner:
            run = runner.run

            def recorded() -> None:
                run()
                inputs = GraphInputs(*(getattr(runner, name).copy() for name in GraphInputs._fields))
                self.calls.append(Call(self.kind, inputs, runner.logits.copy()))

            runner.run = recorded  # type: ignore[method-assign]
            try:
                yield runner
            finally:
                del runner.run
