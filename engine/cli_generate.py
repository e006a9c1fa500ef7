"""``cpmbee generate``: requests in, answers out, as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from cpmbee.engine import Engine
from cpmbee.errors import ConfigError, CpmBeeError, PromptError
from cpmbee.generation_config import GenerationConfig
from cpmbee.json_file import NOT_JSON
from cpmbee.outputs import require_apart
from cpmbee.progress import ProgressBar
from cpmbee.results import GenerationResult
from cpmbee.staging import staged_file

_EPILOG = """\
A request is a nested dict with an "<ans>" key, for example
  cpmbee generate MODEL '{"input": "今天天气真好，", "<ans>": ""}'
Several are JSON Lines, one request a line, in a file or on standard input. Each gives one line: answer, score,
finish_reason, usage, timings.
"""


class Line(NamedTuple):
    """One request and where it came from."""

    source: str
    data: dict[str, Any]


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    require_apart([arguments.output], [arguments.model, arguments.request, arguments.examples])
    options = {
        field.name: getattr(arguments, field.name)
        for field in fields(GenerationConfig)
        if getattr(arguments, field.name) is not None
    }
    try:
        GenerationConfig().updated(**options)
        lines = _requests(arguments.request)
    except ConfigError as error:
        parser.error(str(error))
    if arguments.stream and arguments.output is not None:
        parser.error("--stream writes text as it comes, not to a file; leave --output out")
    examples = [] if arguments.examples is None else [line.data for line in _read_jsonl(arguments.examples)]
    with _output(arguments.output) as out:
        engine = Engine.from_pretrained(
            arguments.model,
            num_threads=arguments.threads,
            cache_tokens=arguments.cache_tokens,
            verify_hashes=arguments.verify_hashes,
        )
        if arguments.stream:
            for line in lines:
                _stream(engine, line, examples, options)
            return 0
        with ProgressBar() as progress:
            done = 0
            while batch := list(islice(lines, arguments.batch_size)):
                for result in _generate(engine, batch, examples, options):
                    print(_json_line(result, out), file=out)
                out.flush()
                done += len(batch)
                if arguments.output is not None:
                    progress(f"{done} requests", 1.0)
    return 0


def _json_line(result: GenerationResult, out: TextIO) -> str:
    """One result as JSON, readable as far as the output's encoding goes: lone surrogates, for one, have no UTF-8."""
    line = json.dumps(asdict(result), ensure_ascii=False)
    try:
        line.encode(out.encoding)
    except UnicodeEncodeError:
        return json.dumps(asdict(result))
    return line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cpmbee generate",
        description="Write the answers of requests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that cpmbee export wrote")
    add("request", nargs="?", default="-", metavar="REQUEST", help="JSON, a JSON Lines file, or - (the default)")
    add("--output", type=Path, metavar="FILE", help="write there instead of standard output; appears when complete")
    add("--examples", metavar="FILE", help="JSON Lines of in-context examples for every request")
    add("--stream", action="store_true", help="write plain text as it comes")
    add("--batch-size", type=_positive, default=16, metavar="N", help="requests that run together (16)")
    add("--threads", type=_not_negative, default=0, metavar="N", help="threads; 0 is one for each physical core")
    add("--cache-tokens", type=_not_negative, default=0, metavar="N", help="tokens of all requests at a time")
    add("--verify-hashes", action="store_true", help="check the weights file, however large it is")
    group = parser.add_argument_group("generation (defaults: the model's generation_config.json)")
    add = group.add_argument
    add("--beam-size", type=int, metavar="N", help="beams; 1 is greedy search")
    add("--max-new-tokens", type=int, metavar="N", help="budget over all answers of a request")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 to avoid tokens written before")
    add("--repetition-window", type=int, metavar="N", help="how many of the last tokens the penalty looks at")
    add("--temperature", type=float, metavar="X", help="sample with this temperature")
    add("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    add("--top-p", type=float, metavar="X", help="sample among the likeliest tokens that reach this probability")
    add("--seed", type=int, metavar="N", help="make sampling repeatable")
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= least:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")


def _requests(argument: str) -> Iterator[Line]:
    """Requests of the command line.

    Raises:
        ConfigError: JSON on the command line that is not a request.
    """
    if not argument.lstrip().startswith(("{", "[")):
        return _read_jsonl(argument)
    try:
        data = json.loads(argument)
    except NOT_JSON as error:
        raise ConfigError(f"the request is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError('the request must be a JSON object, such as {"input": "...", "<ans>": ""}')
    return iter([Line("", data)])


def _read_jsonl(name: str) -> Iterator[Line]:
    """Objects of a JSON Lines file, or of standard input for ``-``; a file that is not there is an error at once.

    Raises:
        PromptError: a line is not a JSON object; names it.
    """
    if name == "-":
        if sys.stdin is None:
            raise PromptError("standard input is closed; give a request or a file")
        return _parse("standard input", sys.stdin.buffer)
    return _parse(name, open(name, "rb"))


def _parse(name: str, file: BinaryIO) -> Iterator[Line]:
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                data = json.loads(raw.decode("utf-8"))
            except NOT_JSON as error:
                raise PromptError(f"{name}, line {number}: not JSON ({error})") from None
            if not isinstance(data, dict):
                raise PromptError(f"{name}, line {number}: expected a JSON object")
            yield Line(f"{name}, line {number}: ", data)


def _generate(
    engine: Engine, batch: list[Line], examples: list[dict[str, Any]], options: dict[str, Any]
) -> list[GenerationResult]:
    try:
        return engine.generate([line.data for line in batch], examples, **options)
    except CpmBeeError as error:
        if error.request is None:
            raise
        reason = str(error).removeprefix(f"request {error.request}: ")
        raise type(error)(f"{batch[error.request].source}{reason}") from None


def _stream(engine: Engine, line: Line, examples: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Write the text of the answers as it comes; each answer of several starts a line with its path."""
    try:
        with engine.stream(line.data, examples, **options) as stream:
            for number, (path, pieces) in enumerate(groupby(stream, key=lambda piece: piece.path)):
                sys.stdout.write("\n" * bool(number) + (f"{'.'.join(path)}: " if path else ""))
                for piece in pieces:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        sys.stdout.write("\n")
    except CpmBeeError as error:
        raise type(error)(f"{line.source}{error}") from None


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name only when it is complete."""
    if path is None:
        yield sys.stdout
        return
    with staged_file(path) as file:
        yield file
