"""What the recorded table consists of: groups of models and peers, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpmbee.bench.plan import Sweep
from cpmbee.export.weights import PRECISIONS, Precision
from cpmbee.machine import physical_cores

DEMO = "demo"
PEERS_OF = {
    "fp32": ("functions", "torch", "torch-compiled"),
    "fp16": ("functions", "torch-bf16", "llama.cpp"),
    "int8": ("matmulnbits", "dynamic-quantize", "llama.cpp", "ctranslate2", "onnxruntime-genai"),
    "int4": ("matmulnbits", "llama.cpp", "onnxruntime-genai"),
}
WIDE: tuple[Precision, ...] = ("int4", "int8")  # measured with long prompts, too; others take minutes for them


@dataclass(frozen=True)
class Group:
    """Models and peers that take turns in one run.

    Attributes:
        size: ``"demo"``, or of the synthetic model.
        precisions: of our folders.
        peers: beside them.
        prompts: tokens that are read.
        answer: tokens that are written.
        batches: requests that run together.
        beams: of the search.
        threads: all cores where none is named.
        rounds: processes for each cell; a third one only where two do not agree.
        profile: whether our folders are profiled.
        topic: what is varied, where that is not the precision; has a table of its own.
    """

    size: str
    precisions: tuple[Precision, ...]
    peers: tuple[str, ...]
    prompts: tuple[int, ...]
    answer: int = 16
    batches: tuple[int, ...] = (1,)
    beams: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    rounds: int = 2
    profile: bool = False
    topic: str = ""

    @property
    def table(self) -> str:
        """The table its rows are part of."""
        return f"{self.size}-{self.topic}" if self.topic else self.size

    @property
    def name(self) -> str:
        """Of its result."""
        precisions = self.precisions if len(self.precisions) < len(PRECISIONS) else ["all"]
        return "-".join([self.size, *precisions, *([self.topic] if self.topic else [])])

    @property
    def models(self) -> set[tuple[str, str]]:
        """Size and precision of the models that it needs, peers' models beside them included."""
        return {(self.size, precision) for precision in self.precisions}

    @property
    def sweep(self) -> Sweep:
        """Its workloads."""
        threads = self.threads or (physical_cores(),)
        return Sweep(self.prompts, (self.answer,), self.batches, self.beams, threads, ("cpu",))


def groups() -> Iterator[Group]:
    """All of them: the quickest, then what people run, then what takes gigabytes to say that it is slower.

    Groups of one model follow each other, for it is deleted when no later group needs it.
    """
    every = tuple(dict.fromkeys(peer for peers in PEERS_OF.values() for peer in peers))
    yield Group(DEMO, PRECISIONS, every, (128, 512), answer=32, profile=True)
    for precision in WIDE:
        yield _by_precision("2b", precision)
        yield Group("2b", (precision,), ("matmulnbits",), (64,), batches=(1, 8), topic="batch")
        yield Group("2b", (precision,), ("matmulnbits",), (64,), beams=(1, 3), topic="beams")
    for precision in WIDE:
        yield _by_precision("1b", precision)
    yield Group("1b", WIDE, (), (128, 512, 2048), threads=tuple(range(1, physical_cores() + 1)), topic="threads")
    for size in ("2b", "1b"):
        for narrow in ("fp16", "fp32"):
            yield _by_precision(size, narrow)


def _by_precision(size: str, precision: Precision) -> Group:
    """One of our folders beside all peers that stand beside it."""
    wide = precision in WIDE
    prompts = (128, 512) if wide else (128,)
    return Group(size, (precision,), PEERS_OF[precision], prompts, rounds=3 if wide else 2, profile=wide)
