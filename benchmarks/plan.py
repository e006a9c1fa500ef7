"""What a run measures: subjects (a model and the engine that runs it), each at all workloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cpmbee.bench.cost import Operations

PROCESS_BYTES = 200 << 20  # of Python, an engine's library and working memory, at least


@dataclass(frozen=True)
class Workload:
    """What is asked of a model.

    Attributes:
        prompt: tokens that are read, the opening ``<s>`` of the answer included.
        answer: tokens that are written, whatever the model would rather do: ends of answers are never chosen.
        batch: requests that run together.
        beams: of the search; 1 is greedy.
        threads: of one run of the model.
        device: where it runs.
    """

    prompt: int
    answer: int
    batch: int = 1
    beams: int = 1
    threads: int = 1
    device: str = "cpu"

    @property
    def cache_rows(self) -> int:
        """Rows of the cache that are enough for all requests, one for each token of a prompt and of a beam."""
        return self.batch * (self.prompt + self.beams * (self.answer + 1) + 1)


@dataclass(frozen=True)
class Subject:
    """A model, and how it is run.

    Attributes:
        label: what tables call it.
        model: folder of ours that it is, or that it is compared with.
        engine: name of the engine: ``"cpmbee"`` or that of a peer.
        module: run in a process of its own, measures one workload; see `cpmbee.bench.cell`.
        path: folder or file it loads.
        precision: of the stored matrices.
        cache: type of cached keys and values.
        parameters: numbers in its matrices.
        file_bytes: of everything it loads.
        weight_bytes: that one decoding step reads: all of them, for the embedding is the output head as well.
        operations: of reading a prompt.
        loaded_bytes: of memory that the loaded model takes, at most.
        row_bytes: of memory that one token takes in the cache.
        pair_bytes: of memory that each pair of a prompt's tokens takes while it is read.
        environment: variables of its process.
        options: for its module.
    """

    label: str
    model: str
    engine: str
    module: str
    path: Path
    precision: str
    cache: str
    parameters: int
    file_bytes: int
    weight_bytes: int
    operations: Operations
    loaded_bytes: int
    row_bytes: int
    pair_bytes: int
    environment: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    def memory_bytes(self, workload: Workload) -> int:
        """Of memory that a process takes for a workload, about."""
        pairs = workload.batch * workload.prompt**2
        rows = workload.cache_rows * self.row_bytes
        return self.loaded_bytes + rows + pairs * self.pair_bytes + PROCESS_BYTES

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; of the path only its name."""
        values = asdict(self)
        del values["environment"], values["module"], values["options"]
        return {**values, "path": self.path.name}


@dataclass(frozen=True)
class Sweep:
    """All workloads: every combination of these values."""

    prompts: Sequence[int]
    answers: Sequence[int]
    batches: Sequence[int]
    beams: Sequence[int]
    threads: Sequence[int]
    devices: Sequence[str]

    def workloads(self) -> Iterator[Workload]:
        """In the order of the values, threads changing fastest."""
        lists = (self.prompts, self.answers, self.batches, self.beams, self.threads, self.devices)
        for prompt, answer, batch, beams, threads, device in product(*lists):
            yield Workload(prompt, answer, batch, beams, threads, device)
