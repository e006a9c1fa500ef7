"""Command-line options that are generation options: for a run, or for the defaults that an export writes."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from cpmbee.generation_config import GenerationConfig


def add_generation_options(parser: argparse.ArgumentParser, title: str) -> None:
    """Add a group with an option for each field of `GenerationConfig`."""
    add = parser.add_argument_group(title).add_argument
    add("--beam-size", type=int, metavar="N", help="beams; 1 is greedy search")
    add("--max-new-tokens", type=int, metavar="N", help="budget over all answers of a request")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 to avoid tokens written before")
    add("--repetition-window", type=int, metavar="N", help="how many of the last tokens the penalty looks at")
    add("--temperature", type=float, metavar="X", help="sample with this temperature")
    add("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens")
    add("--top-p", type=float, metavar="X", help="sample among the likeliest tokens that reach this probability")
    add("--seed", type=int, metavar="N", help="make sampling repeatable; equal requests differ")


class OneDelta(argparse.Action):
    """A LoRA delta; a second one is refused, where the first would be dropped in silence."""

    def __call__(  # noqa: D102
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice; merge one of them first (cpmbee merge), then name the other")
        setattr(namespace, self.dest, values)


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of them that were given."""
    values = {field.name: getattr(arguments, field.name) for field in fields(GenerationConfig)}
    return {name: value for name, value in values.items() if value is not None}
