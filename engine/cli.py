"""The ``cpmbee`` command: finds the subcommand, loads only that, and turns errors into one line."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple

import cpmbee
from cpmbee.errors import CpmBeeError, one_line

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        entry: module and function that takes the arguments after the command's name and returns the exit code.
        summary: what it does.
    """

    entry: str
    summary: str


COMMANDS = {
    "generate": Command("cpmbee.cli_generate:main", "write the answers of requests"),
    "export": Command("cpmbee.export.cli:export_main", "turn a checkpoint into a model folder"),
    "verify": Command("cpmbee.export.cli:verify_main", "compare a model folder with its checkpoint"),
    "bench": Command("cpmbee.bench.cli:main", "measure speed, memory and quality, beside other engines"),
    "demo": Command("cpmbee.export.demo:main", "export, verify and ask the bundled demo model"),
    "finetune": Command("cpmbee.train.cli_finetune:main", "train a checkpoint on records, fully or with LoRA"),
    "eval": Command("cpmbee.train.cli_eval:main", "measure how well a model answers the records of a file"),
    "merge": Command("cpmbee.train.cli_merge:main", "add a LoRA delta to the weights of a checkpoint"),
    "data": Command("cpmbee.train.data.cli:main", "build a data set from text or JSON lines, look into one"),
    "pretrain": Command("cpmbee.train.cli_pretrain:main", "train a model on a mixture of data sets"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0 when done, 1 when it failed, 2 when it was used wrongly, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us, who then wants to see nothing
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # better than failing over a character of an answer
    interrupts = _Interrupts()
    try:
        with interrupts, _unwind_on_sigterm():
            code = _dispatch([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if interrupts.seen and not debug:  # within an import, say, which then fails for reasons of its own
            return EXIT_INTERRUPTED
        if isinstance(error, OSError) and error.filename is None:
            _discard_output()
        if isinstance(error, BrokenPipeError):  # whoever read the output has gone, and knows
            return EXIT_FAILED
        if debug:
            traceback.print_exc()
        else:
            print(f"cpmbee: {_reason(error)}", file=sys.stderr)
        return EXIT_FAILED
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"cpmbee {cpmbee.__version__}")
        return EXIT_DONE
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(one_line(f"cpmbee: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}"), file=sys.stderr)
        return EXIT_USAGE
    module, _, function = command.entry.partition(":")
    try:
        code: int = getattr(import_module(module), function)(arguments[1:])
    except SystemExit as stop:  # argparse: help, or wrong use
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    return code


class _Interrupts:
    """Notes that Ctrl-C was pressed in the block, whatever became of the `KeyboardInterrupt`.

    Attributes:
        seen: whether it was.
    """

    seen = False
    _before: Any = None

    def __enter__(self) -> None:
        # Only the main thread may set handlers; and one that somebody else has set, or that ignores it, stays.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):
                self._before = signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.default_int_handler(number, frame)


@contextlib.contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """Let a polite kill end the process like an exception does, so that half-written files are removed."""

    def unwind(number: int, _: object) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, unwind)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_output() -> None:
    """Forget what standard output cannot take; Python would try once more when it exits, and complain again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reason(error: Exception) -> str:
    """What to say of an error, on one line."""
    if isinstance(error, CpmBeeError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return one_line(_missing_module(error.name))
    if isinstance(error, OSError) and error.strerror is not None:
        return one_line(error.strerror if error.filename is None else f"{error.filename}: {error.strerror}")
    if isinstance(error, MemoryError):
        return one_line(f"not enough memory ({error})" if str(error) else "not enough memory")
    text = " ".join([f"{type(error).__name__}:", *str(error).split()])
    return one_line(f"{text.removesuffix(':')} (--debug shows where)")


def _missing_module(name: str) -> str:
    extras = {"torch": "torch"}
    extras |= dict.fromkeys(("onnx", "safetensors", "ml_dtypes"), "export")
    extras |= dict.fromkeys(("pyarrow", "tensorboard"), "train")
    extras["matplotlib"] = "bench"
    extra = extras.get(name.partition(".")[0])
    return f'{name} is not installed; pip install "cpmbee[{extra}]" brings it' if extra else f"{name} is not installed"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cpmbee COMMAND ... (cpmbee COMMAND --help says more)",
            "",
            *lines,
            "",
            "  --version  say which version this is",
            "  --debug    show the whole trace of an error",
        ]
    )
