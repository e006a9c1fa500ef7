"""What a training command shows: log lines, and a progress bar where standard error is a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cpmbee.train.metrics import StepMetrics
from cpmbee.train.processes import Processes


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[[StepMetrics], None]]:
    """Shows log lines and a bar of ``steps`` on the first process; gives the trainer's ``on_step``."""
    first = Processes.current().first
    package = logging.getLogger("cpmbee")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO if first else logging.WARNING)
    shown = first and sys.stderr.isatty()
    try:
        with logging_redirect_tqdm([package]), tqdm(total=steps, unit="step", disable=not shown) as bar:

            def on_step(metrics: StepMetrics) -> None:
                bar.n = metrics.step - 1  # a resumed run does not begin at 0
                bar.update()
                bar.set_postfix(
                    loss=f"{metrics.loss:.4f}",
                    tokens_per_s=f"{metrics.tokens_per_second:.0f}",
                    padding=f"{metrics.padding:.0%}",
                    refresh=False,
                )

            yield on_step
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
