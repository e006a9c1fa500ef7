"""``cpmbee eval``: how well a model answers the records of a file, as JSON."""

from __future__ import annotations

import argparse
import errno
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cpmbee.cli_options import OneDelta
from cpmbee.engine import Engine
from cpmbee.errors import ConfigError
from cpmbee.outputs import require_apart, with_folders
from cpmbee.progress import ProgressBar
from cpmbee.staging import staged_file
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.arguments import add_task_fields, not_negative, positive, task_fields
from cpmbee.train.evaluation import predict
from cpmbee.train.jsonl import open_records
from cpmbee.train.predictions import METRICS, Prediction, summarize
from cpmbee.train.shots import choose_shots, without_shots
from cpmbee.train.tasks import TaskRecord, read_tasks

_EPILOG = """\
A record is a request with its right answer under "<ans>", such as
  {"input": "...", "question": "...", "options": {"<option_0>": "...", "<option_1>": "..."}, "<ans>": "<option_1>"}
Metrics: loss and perplexity of the right answers (every token, and the </s> that ends an answer), the share of records
whose likeliest choice is right, and the share whose written answer is right to the last character. Choices are the keys
of "options", or what --choices names.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.shots is not None and arguments.examples is None:
        parser.error("--shots needs --examples")
    if arguments.lora_alpha is not None and arguments.lora is None:
        parser.error("--lora-alpha needs --lora")
    metrics = arguments.metrics or METRICS
    for path in (arguments.output, arguments.predictions):
        if path is not None and not path.parent.is_dir():  # now, not when everything has been computed
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    given = (arguments.file, arguments.examples, arguments.vocab, *with_folders((arguments.model, arguments.lora)))
    require_apart((arguments.output, arguments.predictions), given)
    records = open_records(arguments.file)
    fields = task_fields(arguments)
    solved = None if arguments.examples is None else open_records(arguments.examples)
    tasks = list(read_tasks(records, fields))
    if arguments.limit:
        tasks = tasks[: arguments.limit]
    engine, backend = open_engine(arguments)
    shots: list[TaskRecord] = []
    shown: dict[str, Any] = {}
    if solved is not None:
        shots = choose_shots(solved, fields, engine.tokenizer, arguments.shots, arguments.seed)
        all_tasks, tasks = tasks, without_shots(tasks, shots)
        shown["examples"] = [shot.where for shot in shots]
        shown["left_out"] = len(all_tasks) - len(tasks)
    begin = time.perf_counter()
    predictions: list[Prediction] = []
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressBar())
        out = None
        if arguments.predictions is not None:
            out = stack.enter_context(staged_file(arguments.predictions))
        for prediction in predict(engine, tasks, metrics, arguments.max_new_tokens, [shot.request for shot in shots]):
            predictions.append(prediction)
            if out is not None:
                print(json.dumps(prediction.to_dict(), ensure_ascii=False), file=out)
            progress(f"{len(predictions)} of {len(tasks)} records", len(predictions) / len(tasks))
    report: dict[str, Any] = {
        "model": str(arguments.model),
        "backend": backend,
        "file": str(arguments.file),
        **shown,
        **summarize(predictions).to_dict(),
        "seconds": round(time.perf_counter() - begin, 3),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if arguments.output is not None:
        with staged_file(arguments.output) as file:
            file.write(text + "\n")
    print(text)
    return 0


def open_engine(arguments: argparse.Namespace) -> tuple[Engine, str]:
    """The model of the command line, and what runs it."""
    model: Path = arguments.model
    if (model / "engine.json").is_file():
        if arguments.lora is not None or arguments.vocab is not None:
            raise ConfigError(
                f"{model}: an exported folder has its vocabulary and merged deltas; leave the options out"
            )
        return Engine.from_pretrained(
            model, num_threads=arguments.threads, cache_tokens=arguments.cache_tokens
        ), "engine"
    from cpmbee.model import load_model, open_checkpoint
    from cpmbee.train.processes import Processes
    from cpmbee.train.torch_backend import TorchBackend

    vocabulary = arguments.vocab or open_checkpoint(model).vocab_file
    if vocabulary is None:
        raise ConfigError(f"{model}: no vocabulary beside the checkpoint; name one with --vocab")
    device = Processes.current().device(arguments.device)
    loaded = load_model(model, lora=arguments.lora, lora_alpha=arguments.lora_alpha, device=device)
    backend = TorchBackend(loaded, arguments.cache_tokens or 8192, arguments.threads)
    return Engine(backend, Tokenizer.from_file(vocabulary)), "torch"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cpmbee eval",
        description="Measure how well a model answers the records of a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a folder that cpmbee export wrote, or a checkpoint (with PyTorch)")
    add("file", type=Path, metavar="FILE", help="JSON Lines of records, or the folder of a data set")
    add("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"of {', '.join(METRICS)} (all)")
    add_task_fields(parser)
    add("--max-new-tokens", type=positive, metavar="N", help="budget of a written answer (that of the right ones)")
    add("--limit", type=positive, metavar="N", help="read the first N records only")
    add("--output", type=Path, metavar="FILE", help="write the report there as well")
    add("--predictions", type=Path, metavar="FILE", help="write answers and scores of each record there, JSON Lines")
    add("--threads", type=not_negative, default=0, metavar="N", help="of one run; 0 is one for each physical core")
    add("--cache-tokens", type=not_negative, default=0, metavar="N", help="tokens of all requests at a time")
    group = parser.add_argument_group("in-context examples")
    add = group.add_argument
    add("--examples", type=Path, metavar="FILE", help="solved records, which the model sees beside every request")
    add("--shots", type=positive, metavar="N", help="draw N of them (all, in order)")
    add("--seed", type=not_negative, default=0, metavar="N", help="of the drawing (0)")
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--vocab", type=Path, metavar="FILE", help="vocabulary, if none lies beside the checkpoint")
    add("--lora", action=OneDelta, type=Path, metavar="DELTA", help="LoRA delta to merge")
    add("--lora-alpha", type=float, metavar="ALPHA", help="its alpha, if no configuration says it")
    add("--device", default="cpu", help="such as cpu or cuda (cpu)")
    return parser
