"""``cpmbee generate``: requests in, answers out, as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cpmbee.cli_options import add_generation_options, generation_options
from cpmbee.encoding import Data
from cpmbee.engine import Engine
from cpmbee.errors import ConfigError, CpmBeeError, PromptError
from cpmbee.generation_config import GenerationConfig
from cpmbee.json_file import parse_json
from cpmbee.locale_text import argument_text, use_readable_encoding
from cpmbee.many_requests import ManyRequests, as_record, write_pieces
from cpmbee.outputs import require_apart
from cpmbee.progress import ProgressBar
from cpmbee.request_file import Entry, RequestFile, make_entry
from cpmbee.staging import staged_file

_EPILOG = """\
A request is a nested dict with an "<ans>" key, for example
  cpmbee generate MODEL '{"input": "今天天气真好，", "<ans>": ""}'
Several are JSON Lines, one request a line, in a file or on standard input; a pipe is answered line by line. An input
that is as a whole one JSON object, or an array of objects, may be spread over lines. Each request gives one line:
answer, score, finish_reason, usage, timings.

A request that cannot be answered gives a line with error and line (its number) in its place; the others are answered,
and the command ends with status 1. The "id" of a request (a text or a number beside "<ans>") is not shown to the
model and comes back with the answer.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    require_apart([arguments.output], [arguments.model, arguments.request, arguments.examples])
    options = generation_options(arguments)
    if arguments.stream and arguments.output is not None:
        parser.error("--stream writes text as it comes, not to a file; leave --output out")
    try:
        GenerationConfig().updated(**options)
        typed = _typed_request(arguments.request)
    except ConfigError as error:
        parser.error(str(error))
    asked = RequestFile(arguments.request) if typed is None else typed
    examples = [] if arguments.examples is None else _read_examples(arguments.examples)
    with _output(arguments.output) as out:
        engine = Engine.from_pretrained(
            arguments.model,
            num_threads=arguments.threads,
            cache_tokens=arguments.cache_tokens,
            verify_hashes=arguments.verify_hashes,
        )
        engine.generation_config.updated(**options)  # do they go with the model's own?
        solved = _solved(engine, examples)
        if arguments.stream:
            use_readable_encoding(out)
        if isinstance(asked, Entry):
            _answer_typed(engine, asked, solved, options, out, arguments.stream)
            return 0
        many = ManyRequests(engine, solved, options)
        if arguments.stream:
            for entry in asked:
                many.stream(entry, out)
        else:
            _answer(many, asked, arguments.batch_size, out)
    many.check()
    return 0


def _typed_request(argument: str) -> Entry | None:
    """The request on the command line; None where it names a file.

    Raises:
        ConfigError: it begins like JSON and is no request.
    """
    if not argument.lstrip().startswith(("{", "[")):
        return None
    data = parse_json(argument_text(argument).encode("utf-8", "surrogatepass"), "the request", ConfigError)
    if not isinstance(data, dict):
        raise ConfigError('the request must be a JSON object, such as {"input": "...", "<ans>": ""}')
    return make_entry("", None, data)


def _read_examples(name: str) -> list[Entry]:
    """In-context examples, which all requests need: a bad one ends the run.

    Raises:
        PromptError: a line is not a JSON object; names it.
    """
    examples = list(RequestFile(name))
    for example in examples:
        if example.data is None:
            raise PromptError(example.located(example.error))
    return examples


def _solved(engine: Engine, examples: list[Entry]) -> list[Data]:
    """The examples as the engine takes them, each tried.

    Raises:
        CpmBeeError: the model cannot read one; names its line.
    """
    solved = [example.data for example in examples if example.data is not None]
    for example, data in zip(examples, solved, strict=True):
        try:
            engine.encode({"<ans>": ""}, [data])
        except CpmBeeError as error:
            raise type(error)(example.located(str(error))) from None
    return solved


def _answer_typed(
    engine: Engine, entry: Entry, examples: list[Data], options: dict[str, Any], out: TextIO, stream: bool
) -> None:
    if entry.data is None:
        raise PromptError(entry.error)
    if stream:
        with engine.stream(entry.data, examples, **options) as pieces:
            write_pieces(pieces, out)
    else:
        print(_json_line(as_record(entry, engine.generate(entry.data, examples, **options)), out), file=out)


def _answer(many: ManyRequests, requests: RequestFile, batch_size: int, out: TextIO) -> None:
    """Write a line for each request, batch by batch."""
    with ProgressBar() as progress:
        if progress.active and not out.isatty():
            requests.count()
        begin = time.monotonic()
        for batch in requests.batches(batch_size):
            for record in many.records(batch):
                print(_json_line(record, out), file=out)
            out.flush()
            if not out.isatty():  # there the answers themselves show it
                rate = f"{many.done / (time.monotonic() - begin):,.1f}/s"
                if requests.total:
                    progress("requests", many.done / requests.total, f"{many.done} of {requests.total}, {rate}")
                else:
                    progress("requests", None, f"{many.done}, {rate}")


def _json_line(record: dict[str, Any], out: TextIO) -> str:
    """A record as JSON, readable as far as the output's encoding goes: lone surrogates, for one, have no UTF-8."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(out.encoding)
    except UnicodeEncodeError:
        return json.dumps(record)
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
    add_generation_options(parser, "generation (defaults: the model's generation_config.json)")
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


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name only when it is complete."""
    if path is None:
        yield sys.stdout
        return
    with staged_file(path) as file:
        yield file
