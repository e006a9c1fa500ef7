"""How long groups of the table take, roughly, from rates that two cores of an AMD EPYC (Zen 5) reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpmbee.bench.cell import WARM_UP_ANSWER
from cpmbee.bench.cost import num_parameters, operations
from cpmbee.bench.peers.registry import PEERS
from cpmbee.bench.plan import Workload
from cpmbee.bench.run import OURS
from cpmbee.bench.synthetic import published_config
from cpmbee.bench.table_plan import DEMO, Group
from cpmbee.machine import physical_cores

CORES = 2
PROCESS_SECONDS = 2.5  # of waiting for quiet, readings of memory, Python and imports
WRITTEN_BYTES = 0.4e9  # a second
PROFILE_SECONDS = 15.0
DEMO_SECONDS = 150.0
THIRD_PROCESS = 0.6  # of cells need one
NUMBER_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.03, "int4": 0.6}  # scales and an int8 head included


@dataclass(frozen=True)
class Rates:
    """How fast an engine is.

    Attributes:
        load: bytes of weights a second.
        prefill: operations a second.
        decode: bytes of weights a second.
        first: seconds of a process before its first token, beyond loading.
        prefills: how often a prompt is read beyond once a repetition.
    """

    load: float
    prefill: float
    decode: float
    first: float = 0.0
    prefills: int = 1


RATES = {
    OURS: Rates(20e9, 1.4e12, 40e9),
    "functions": Rates(0.4e9, 0.25e12, 20e9),
    "matmulnbits": Rates(0.25e9, 0.6e12, 35e9),
    "dynamic-quantize": Rates(1e9, 1.3e12, 40e9),
    "torch": Rates(0.5e9, 0.25e12, 25e9),
    "torch-compiled": Rates(0.5e9, 0.25e12, 25e9, first=40.0),
    "torch-bf16": Rates(0.5e9, 0.25e12, 15e9),
    "llama.cpp": Rates(1e9, 0.35e12, 40e9, first=2.0, prefills=3),
    "ctranslate2": Rates(2e9, 0.9e12, 17e9),
    "onnxruntime-genai": Rates(1e9, 0.5e12, 30e9),
}
FLOATING = Rates(20e9, 0.3e12, 40e9)  # ours, where products are of floating point numbers


def estimates(groups: Sequence[Group], repetitions: int) -> Iterator[float]:
    """Seconds of each group, measured one after another; the first one that needs a model makes it."""
    made: set[tuple[str, str]] = set()
    for group in groups:
        if group.size == DEMO:
            yield DEMO_SECONDS
            continue
        yield _making(group, made) + _measuring(group, repetitions)


def _making(group: Group, made: set[tuple[str, str]]) -> float:
    """Checkpoint, exports, and peers' models of the same size; ``made`` grows by them."""
    numbers = num_parameters(published_config(group.size))
    size = 0.0
    for each in {(group.size, "checkpoint"), *group.models} - made:
        written = NUMBER_BYTES.get(each[1], NUMBER_BYTES["fp16"]) * numbers
        size += written * (1 + sum(PEERS[name].is_llama or name == "dynamic-quantize" for name in group.peers))
        made.add(each)
    return size / WRITTEN_BYTES


def _measuring(group: Group, repetitions: int) -> float:
    """All processes."""
    seconds = 0.0
    for precision in group.precisions:
        for name in (OURS, *group.peers):
            for work in group.sweep.workloads():
                if name == OURS or PEERS[name].can(work):
                    seconds += _process(group.size, name, precision, work, repetitions)
    rounds = min(2, group.rounds) + THIRD_PROCESS * max(0, group.rounds - 2)
    return rounds * seconds + PROFILE_SECONDS * group.profile * len(group.precisions)


def _process(size: str, engine: str, precision: str, work: Workload, repetitions: int) -> float:
    """One process of one cell."""
    rates = FLOATING if engine == OURS and precision.startswith("fp") else RATES[engine]
    config = published_config(size)
    weights = num_parameters(config) * NUMBER_BYTES["fp32" if engine.startswith("torch") else precision]
    prefill = work.batch * operations(config).prefill(work.prompt) / rates.prefill
    step = max(weights / rates.decode, work.batch * work.beams * operations(config).prefill(1) / rates.prefill)
    slower = math.ceil(physical_cores() / work.threads) * CORES / physical_cores()
    computing = (repetitions + rates.prefills) * prefill + (WARM_UP_ANSWER + repetitions * work.answer) * step
    return PROCESS_SECONDS + rates.first + weights / rates.load + slower * computing
