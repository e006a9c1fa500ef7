"""Where a prefill and a decoding step spend their time, by kind of operator, beside the least time each could take.

``python -m cpmbee.bench.step_profile SPEC`` profiles one model at one workload in a process of its own: ONNX Runtime's
profiler is read and summed by operator. What a run takes beyond its operators (dispatch, binding) is in the row
"between"; what a step takes beyond its run (choosing tokens, relation rows) in the row "engine".
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmbee import Engine
from cpmbee.bench import cell
from cpmbee.bench.arithmetic import operations_per_second
from cpmbee.bench.bandwidth import ordinary_memory, read_bandwidth
from cpmbee.bench.graph_cost import costs, read_graph
from cpmbee.bench.peers.graph_rules import PEER_RULES
from cpmbee.bench.plan import Workload
from cpmbee.folder import ModelFolder, open_folder
from cpmbee.onnxruntime_import import import_onnxruntime
from cpmbee.session import OrtBackend
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnxruntime
else:
    onnxruntime = import_onnxruntime()

BETWEEN, ENGINE = "between", "engine"
FUSED = {"FusedMatMul": "MatMul"}  # what the runtime makes of a product and a factor after it

Event = dict[str, Any]
Milliseconds = dict[str, float]


class ProfilingOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Session options with the profiler on."""

    def __init__(self) -> None:
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = str(Path(tempfile.gettempdir()) / "cpmbee_profile")


def main() -> None:
    """Profile what the command line asks for; print JSON."""
    spec = cell.CellSpec.from_json(sys.argv[1])
    print(json.dumps(profile(Path(spec.path), spec.workload)))


def profile(path: Path, work: Workload) -> dict[str, Any]:
    """Milliseconds of the prefill and of a decoding step (medians) by operator, and the least that each could take.

    Returns:
        ``"workload"`` with its numbers, ``"limits"`` (GB/s of reads, the mean of just before and just after; GFLOP/s of
        products), and for ``"prefill"`` and
        ``"decode"`` a dict from operator to ``{"ms", "least_ms"}``, the latter None where it is not known.
    """
    model = open_folder(path, rules=PEER_RULES)
    memory = ordinary_memory()
    before = read_bandwidth(work.threads, memory)
    runs, steps, cache_rows = _measure(model, work)
    bandwidth = (before + read_bandwidth(work.threads, memory)) / 2
    rates = operations_per_second(work.threads)
    prefill = [run["times"] for run in runs if run["tokens"] > 1][-1]
    decodes = [run["times"] for run in runs if run["tokens"] == 1][-len(steps) :]
    decode = medians(decodes)
    decode[ENGINE] = statistics.median(1e3 * step - sum(run.values()) for step, run in zip(steps, decodes, strict=True))
    graph = read_graph(str(model.model))
    costs_prefill = costs(graph, model.config, work.prompt, work.prompt, work.batch, work.batch * work.prompt)
    keys, sequences = work.prompt + work.answer // 2, work.batch * work.beams
    costs_decode = costs(graph, model.config, 1, keys, sequences, cache_rows)
    least_prefill, least_decode = (
        {op: 1e3 * cost.seconds(bandwidth, rates) for op, cost in found.items()}
        for found in (costs_prefill, costs_decode)
    )
    return {
        "workload": {"prompt": work.prompt, "batch": work.batch, "beams": work.beams, "threads": work.threads},
        "limits": {"read_gb_s": bandwidth / 1e9, **{f"{kind}_gflop_s": rate / 1e9 for kind, rate in rates.items()}},
        "prefill": {op: {"ms": ms, "least_ms": least_prefill.get(op)} for op, ms in prefill.items()},
        "decode": {op: {"ms": ms, "least_ms": least_decode.get(op)} for op, ms in decode.items()},
    }


def _measure(model: ModelFolder, work: Workload) -> tuple[list[dict[str, Any]], list[float], float]:
    """Times of every run of the graph, seconds of whole decoding steps, cache rows in use in the mean of these."""
    ordinary, onnxruntime.SessionOptions = onnxruntime.SessionOptions, ProfilingOptions
    try:
        backend = OrtBackend(model, work.device, work.threads, work.cache_rows)
    finally:
        onnxruntime.SessionOptions = ordinary
    tokenizer = Tokenizer.from_file(model.vocabulary)
    engine = Engine(cell.EndlessBackend(backend, tokenizer.eos_id), tokenizer)
    requests = cell.random_requests(engine, work)
    times: list[float] = []
    rows: list[int] = []

    def on_step(_: int) -> None:
        times.append(time.perf_counter())
        rows.append(engine.cache_usage.used)

    for _ in range(2):
        times.clear()
        rows.clear()
        engine.generate(requests, on_step=on_step, max_new_tokens=work.answer, beam_size=work.beams)
    assert backend._session is not None
    path = Path(backend._session.end_profiling())
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return by_run(events), [end - start for start, end in pairwise(times)], statistics.fmean(rows)


def by_run(events: list[Event]) -> list[dict[str, Any]]:
    """The events of each run of the graph, summed by operator, and how many tokens of a sequence it read."""
    runs = [event for event in events if event["name"] == "model_run"]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    found = []
    for run in runs:
        inside = [event for event in nodes if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
        times: Milliseconds = defaultdict(float)
        for event in inside:
            op = str(event["args"]["op_name"])
            times[FUSED.get(op, op)] += event["dur"] / 1e3
        times[BETWEEN] = run["dur"] / 1e3 - sum(times.values())
        found.append({"times": dict(times), "tokens": num_tokens(inside)})
    return found


def num_tokens(events: list[Event]) -> int:
    """How many tokens of each sequence a run read: what its first embedding rows say."""
    shapes = (event["args"].get("output_type_shape") for event in events if "embed/" in event["name"])
    first = next(shape for shape in shapes if shape)
    dimensions = next(iter(first[0].values()))
    return int(dimensions[1]) if len(dimensions) > 1 else 1


def medians(times: Sequence[Milliseconds]) -> Milliseconds:
    """The median of each row of several tables."""
    names = {name for each in times for name in each}
    return {name: statistics.median(each.get(name, 0.0) for each in times) for name in names}


if __name__ == "__main__":
    main()
