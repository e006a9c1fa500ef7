"""Whole answers through the engine: what the exported folder writes against what the reference writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np

from cpmbee.engine import Engine
from cpmbee.export.probes import Request
from cpmbee.export.report import Check
from cpmbee.generation_config import GenerationConfig
from cpmbee.results import GenerationResult
from cpmbee.runner import Backend, Runner

BEAM_SIZES = {"greedy": 1, "beam": 3}
NEW_TOKENS = 6
TRIALS = 4  # noisy runs of the reference that have to agree before a difference counts as an error

Answers = dict[str, list[GenerationResult]]


def write_answers(engine: Engine, requests: Sequence[Request]) -> Answers:
    """Answers to all requests, greedy and with beams; those without examples as one batch."""
    return {search: _answers(engine, requests, beam_size) for search, beam_size in BEAM_SIZES.items()}


def compare_answers(
    engine: Engine, requests: Sequence[Request], expected: Answers, noisy: Engine, who: str
) -> list[Check]:
    """One check per kind of search.

    Args:
        engine: on the exported folder.
        requests: to ask.
        expected: the reference's answers.
        noisy: the reference with errors as large as the export's; see `NoisyBackend`.
        who: what the engine runs on, for the report.
    """
    checks = []
    for search, written in write_answers(engine, requests).items():
        pairs = list(zip(requests, written, expected[search], strict=True))
        different = [(request, theirs) for request, ours, theirs in pairs if _written(ours) != _written(theirs)]
        wrong = [
            request.name for request, theirs in different if _is_decided(noisy, request, BEAM_SIZES[search], theirs)
        ]
        undecided = len(different) - len(wrong)
        detail = f"against the PyTorch reference: {len(pairs) - len(different)} of {len(pairs)} answers equal"
        if undecided:
            detail += f"; {undecided} differ where rounding errors of this size change the reference's answer, too"
        if wrong:
            detail += f"; wrong: {', '.join(wrong)}"
        checks.append(Check(f"{search} answers, {who}", not wrong, detail))
    return checks


class NoisyBackend(Backend):
    """A backend whose logits are disturbed at random: whoever still writes the same does not depend on rounding.

    Args:
        backend: the undisturbed one.
        noise: the largest disturbance, relative to the range of the logits.
    """

    def __init__(self, backend: Backend, noise: float) -> None:
        self.config = backend.config
        self.cache_rows = backend.cache_rows
        self._backend = backend
        self._noise = noise
        self._rng = np.random.default_rng(0)

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner of the undisturbed backend, with `run` replaced."""
        with self._backend.runner() as runner:
            run = runner.run

            def disturbed() -> None:
                run()
                reach = self._noise * float(np.ptp(runner.logits))
                runner.logits += self._rng.uniform(-reach, reach, runner.logits.shape).astype(np.float32)

            runner.run = disturbed  # type: ignore[method-assign]
            yield runner


def _answers(engine: Engine, requests: Sequence[Request], beam_size: int) -> list[GenerationResult]:
    alone = [request for request in requests if request.examples]
    together = [request for request in requests if not request.examples]
    # All of them, for a folder has defaults of its own.
    options = asdict(GenerationConfig(beam_size=beam_size, max_new_tokens=NEW_TOKENS))
    results = dict(zip(map(id, together), engine.generate([r.data for r in together], **options), strict=True))
    for request in alone:
        results[id(request)] = engine.generate(request.data, request.examples, **options)
    return [results[id(request)] for request in requests]


def _written(result: GenerationResult) -> tuple[object, ...]:
    return result.answer, result.finish_reason, result.usage.completion_tokens


def _is_decided(noisy: Engine, request: Request, beam_size: int, undisturbed: GenerationResult) -> bool:
    """Whether the reference writes under every noise tried what it writes under none."""
    written = _written(undisturbed)
    return all(_written(_answers(noisy, [request], beam_size)[0]) == written for _ in range(TRIALS))
