"""One workload of our engine, in a process of its own: ``python -m cpmbee.bench.cell SPEC``.

SPEC is the JSON of a `CellSpec`. The last line of output is the JSON of a `Sample`; the modules of peers speak the same
way. Requests are random text from a fixed seed, and end tokens are never chosen, so all answers are equally long.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee import Engine
from cpmbee.bench.peers.graph_rules import PEER_RULES
from cpmbee.bench.plan import Workload
from cpmbee.bench.processes import Memory, end_children_on_sigterm
from cpmbee.folder import open_folder
from cpmbee.onnxruntime_import import import_onnxruntime
from cpmbee.runner import Backend, Runner
from cpmbee.session import OrtBackend
from cpmbee.tokenizer import Tokenizer

SEED = 0
WARM_UP_ANSWER = 3  # tokens that the repetition before the measured ones writes
NEVER = np.float32(-1e4)  # a logit that no search chooses; searches refuse infinite ones


@dataclass(frozen=True)
class CellSpec:
    """What a process has to measure.

    Attributes:
        path: what it loads.
        workload: what it asks.
        repetitions: that are measured, after one that is not.
        options: of its engine.
    """

    path: str
    workload: Workload
    repetitions: int
    options: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CellSpec:
        """From the command line."""
        raw = json.loads(text)
        return cls(raw["path"], Workload(**raw["workload"]), raw["repetitions"], raw["options"])


@dataclass
class Sample:
    """What a process measured; the fields are those of `cpmbee.bench.records.Round`."""

    load: float | None = None
    cold: float | None = None
    encode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    step_cache_bytes: float | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    memory: Memory | None = None  # of the process that did the work

    def add_tokens(self, times: list[float]) -> None:
        """Take one repetition's clock readings at each of its tokens."""
        steps = [end - start for start, end in pairwise(times)]
        self.steps += steps
        if steps:
            self.decode.append((times[-1] - times[0]) / len(steps))


def main(measure: Callable[[CellSpec], Sample] | None = None) -> None:
    """Measure what the command line asks for."""
    end_children_on_sigterm()
    sample = (measure or measure_engine)(CellSpec.from_json(sys.argv[1]))
    if sample.memory is None:
        sample.memory = Memory()
        sample.memory.look()
    print(json.dumps(asdict(sample)))


def measure_engine(spec: CellSpec) -> Sample:
    """Load a model folder and answer requests."""
    work, sample = spec.workload, Sample()
    import_onnxruntime()
    start = time.perf_counter()
    engine, backend = endless_engine(Path(spec.path), work)
    sample.load = time.perf_counter() - start
    requests = random_requests(engine, work)
    first = engine.generate(requests, max_new_tokens=WARM_UP_ANSWER, beam_size=work.beams)
    sample.cold = sample.load + first[0].timings.encode + first[0].timings.prefill
    rows: list[int] = []
    for _ in range(spec.repetitions):
        times: list[float] = []

        def on_step(_: int, times: list[float] = times) -> None:
            times.append(time.perf_counter())
            rows.append(engine.cache_usage.used)

        results = engine.generate(requests, on_step=on_step, max_new_tokens=work.answer, beam_size=work.beams)
        sample.encode.append(sum(result.timings.encode for result in results))
        sample.prefill.append(results[0].timings.prefill)
        sample.add_tokens(times)
    row_bytes = backend.cache_bytes // (backend.cache_rows + 1)
    sample.cache_bytes = max(rows) * row_bytes
    sample.step_cache_bytes = statistics.fmean(rows) * row_bytes
    sample.kernels = engine.native_ops
    return sample


def endless_engine(folder: Path, work: Workload) -> tuple[Engine, OrtBackend]:
    """An engine whose answers end only when their budget does."""
    model = open_folder(folder, rules=PEER_RULES)
    tokenizer = Tokenizer.from_file(model.vocabulary)
    backend = OrtBackend(model, work.device, work.threads, work.cache_rows)
    return Engine(EndlessBackend(backend, tokenizer.eos_id), tokenizer), backend


class EndlessBackend(Backend):
    """A backend whose model never ends an answer.

    Args:
        backend: that runs the model.
        end: id of the end token.
    """

    def __init__(self, backend: Backend, end: int) -> None:
        self.config = backend.config
        self.cache_rows = backend.cache_rows
        self.num_threads = backend.num_threads
        self._backend = backend
        self._end = end

    @property
    def native_ops(self) -> dict[str, str]:
        """Those of the backend inside."""
        return self._backend.native_ops

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner of the backend inside, its arrays shared."""
        with self._backend.runner() as runner:
            yield _EndlessRunner(runner, self._end)


class _EndlessRunner(Runner):
    def __init__(self, runner: Runner, end: int) -> None:
        super().__init__(runner.vocab_size)
        self._runner = runner
        self._end = end

    def reshape(self, batch: int, queries: int, keys: int, ext: int, outputs: int = 1) -> None:
        self._runner.reshape(batch, queries, keys, ext, outputs)
        for name in Runner.__annotations__:
            setattr(self, name, getattr(self._runner, name))

    def run(self) -> None:
        self._runner.run()
        self.logits[..., self._end] = NEVER


def random_requests(engine: Engine, work: Workload) -> list[dict[str, Any]]:
    """The requests of a workload, always the same ones for the same vocabulary."""
    return [random_request(engine, work.prompt, random.Random(SEED + i)) for i in range(work.batch)]  # noqa: S311


def random_request(engine: Engine, tokens: int, rng: random.Random) -> dict[str, Any]:
    """A request that makes the model read exactly ``tokens`` tokens, the opening ``<s>`` of its answer included.

    Raises:
        ValueError: no request is as short.
    """
    tokenizer = engine.tokenizer
    texts = map(tokenizer.id_to_token, range(tokenizer.vocab_size))
    letters = [text for text in texts if len(text) == 1 and text != "<"]
    text = ""
    while (missing := tokens - 1 - len(engine.encode({"input": text, "<ans>": ""}))) > 0:
        text += "".join(rng.choices(letters, k=missing))
    if missing < 0:
        raise ValueError(f"no prompt is as short as {tokens} tokens")
    return {"input": text, "<ans>": ""}


if __name__ == "__main__":
    main()
