"""What several commands read from their command lines: numbers, checked where they are read, and what fields mean."""

from __future__ import annotations

import argparse
import contextlib
import math

from cpmbee.train.tasks import TaskFields


def add_task_fields(parser: argparse.ArgumentParser) -> None:
    """The options that say what some of the records' fields mean; `task_fields` takes them."""
    add = parser.add_argument
    add("--choices", metavar="FIELD", help="field with the choices: a list, or a dict with them as keys (options)")
    add("--task", metavar="FIELD", help="field with the record's task; losses and metrics are given for each, too")


def task_fields(arguments: argparse.Namespace) -> TaskFields:
    """What the options of `add_task_fields` say."""
    return TaskFields(task=arguments.task, choices=arguments.choices)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(1, text)


def not_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(0, text)


def above_zero(text: str) -> float:
    """A finite number larger than 0."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def _whole(least: int, text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= least:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
