"""Where a prefill and a decoding step spend their time, by kind of operator, as ONNX Runtime's profiler sees it.

    python -m cpmbee.bench.step_profile FOLDER [--prompt TOKENS] [--rows N] [--by-node]

Columns are milliseconds of one run: medians over the decoding steps, and the one prefill after a warm-up. What a run
takes beyond its operators (dispatch, binding) is in the row "between", what a step takes beyond its run (choosing
tokens, relation rows) in the row "engine".
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime

from cpmbee import Engine
from cpmbee.bench.model_cell import request
from cpmbee.folder import open_folder
from cpmbee.session import OrtBackend
from cpmbee.tokenizer import Tokenizer

STEPS = 20

Event = dict[str, Any]
Milliseconds = dict[str, float]


class ProfilingOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Session options with the profiler on."""

    def __init__(self) -> None:
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = str(Path(tempfile.gettempdir()) / "cpmbee_profile")


def main() -> None:
    """Profile one model and print two columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rows", type=int, default=1, help="requests at a time")
    parser.add_argument("--by-node", action="store_true", help="tell apart what the graph calls differently")
    arguments = parser.parse_args()
    runs, steps = profile(arguments.folder, arguments.prompt, arguments.rows, arguments.by_node)
    prefills = [run for run in runs if run["rows"] == "many"]
    decodes = [run for run in runs if run["rows"] == "one"]
    prefill = prefills[-1]["times"]
    decode = medians([run["times"] for run in decodes[1:]])
    last = [sum(run["times"].values()) for run in decodes[-len(steps) :]]
    decode["engine"] = statistics.median(1e3 * step - run for step, run in zip(steps, last, strict=True))
    print("| operator | prefill, ms | decode, ms |\n|---|---:|---:|")
    for name in sorted({*prefill, *decode}, key=lambda name: -decode.get(name, 0.0)):
        print(f"| {name} | {prefill.get(name, 0.0):.3f} | {decode.get(name, 0.0):.3f} |")
    print(f"| all | {sum(prefill.values()):.3f} | {sum(decode.values()):.3f} |")


def profile(folder: Path, prompt: int, rows: int, by_node: bool) -> tuple[list[dict[str, Any]], list[float]]:
    """Times of every run of the graph, and the seconds of whole decoding steps."""
    model = open_folder(folder)
    ordinary, onnxruntime.SessionOptions = onnxruntime.SessionOptions, ProfilingOptions
    try:
        backend = OrtBackend(model)
    finally:
        onnxruntime.SessionOptions = ordinary
    engine = Engine(backend, Tokenizer.from_file(model.vocabulary), model.generation_config)
    rng = random.Random(0)  # noqa: S311
    times: list[float] = []
    for _ in range(2):
        times.clear()
        batch = [request(engine, prompt, rng) for _ in range(rows)]
        engine.generate(batch, on_step=lambda _: times.append(time.perf_counter()), max_new_tokens=STEPS)
    path = Path(backend._session.end_profiling())
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return by_run(events, by_node), [end - start for start, end in pairwise(times[1:])]


def by_run(events: list[Event], by_node: bool) -> list[dict[str, Any]]:
    """The events of each run of the graph, summed by operator; a run of one token is a decoding step."""
    runs = [event for event in events if event["name"] == "model_run"]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    found = []
    for run in runs:
        inside = [event for event in nodes if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
        times: Milliseconds = defaultdict(float)
        for event in inside:
            times[label(event, by_node)] += event["dur"] / 1e3
        times["between"] = run["dur"] / 1e3 - sum(times.values())
        found.append({"times": times, "rows": "many" if has_many_tokens(inside) else "one"})
    return found


def has_many_tokens(events: list[Event]) -> bool:
    """Whether a run read more than one token of each sequence: what its first embedding rows say."""
    shapes = (event["args"].get("output_type_shape") for event in events if "embed/" in event["name"])
    first = next(shape for shape in shapes if shape)
    dimensions = next(iter(first[0].values()))
    return len(dimensions) > 1 and dimensions[1] > 1


def label(event: Event, by_node: bool) -> str:
    """Row of the table that an event belongs to."""
    op = str(event["args"]["op_name"])
    if not by_node:
        return op
    name = re.sub(r"^layers\.\d+\.", "", event["name"].removesuffix("_kernel_time"))
    return f"{op} {name}"


def medians(times: list[Milliseconds]) -> Milliseconds:
    """The median of each row of several tables."""
    names = {name for each in times for name in each}
    return {name: statistics.median(each.get(name, 0.0) for each in times) for name in names}


if __name__ == "__main__":
    main()
