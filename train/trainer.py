"""The training loop: steps, evaluations, checkpoints and the record of a run, over batches that somebody else makes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cpmbee.errors import CheckpointError
from cpmbee.model import CpmBee
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.interrupts import Interrupts
from cpmbee.train.metrics import FILE_NAME, MetricsLog, StepMetrics
from cpmbee.train.options import TrainerConfig
from cpmbee.train.processes import Processes
from cpmbee.train.random_state import random_state, set_random_state
from cpmbee.train.result import TrainingResult
from cpmbee.train.run_checkpoints import RunCheckpoints
from cpmbee.train.schedule import batch_factor, learning_rate_factor
from cpmbee.train.source import BatchSource
from cpmbee.train.step import OptimizerStep, StepResult
from cpmbee.train.validation import Best

__all__ = ["Evaluate", "Trainer", "TrainerConfig", "TrainingResult"]

logger = logging.getLogger("cpmbee.train")

Evaluate = Callable[[CpmBee], Mapping[str, float]]


@dataclass
class _Progress:
    """Where a run is; what a checkpoint holds besides tensors, data position and random state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=Best)


class Trainer:
    """Trains the parameters of one model that require gradients.

    Args:
        model: on its device, in fp32; in a run of several processes its parameters become sharded. Frozen parameters
            stay as they are, and are not part of checkpoints.
        config: how to train.
        output: folder of the run: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``. None keeps nothing.
        evaluate: called on every process every ``evaluate_every`` steps, with the model in evaluation mode and
            gradients off; gives named values, among them ``config.monitor``.
        on_step: called on the first process after every step.
        fixed: JSON data without which the parameters mean something else, such as the scale of adapters; a run can only
            be resumed with the same.
    """

    def __init__(
        self,
        model: CpmBee,
        config: TrainerConfig,
        *,
        output: Path | None = None,
        evaluate: Evaluate | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.output = output
        self.evaluate = evaluate
        self.on_step = on_step
        self.processes = Processes.current()
        model.recompute_layers(config.activation_checkpointing)
        self.processes.shard(model, model.input_embedding.weight.device)
        self.optimizer_step = OptimizerStep(
            model,
            self.processes,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
        )
        self.checkpoints = None if output is None else RunCheckpoints(output / "checkpoints", self.processes, fixed)
        self._progress = _Progress()
        self._log: MetricsLog | None = None
        self._rate_factor = 1.0

    def train(self, source: Iterable[TrainingBatch], resume: bool = False) -> TrainingResult:
        """Take steps until the configured number is done, or evaluations stop getting better.

        Where checkpoints are kept, Ctrl-C and SIGTERM wait for the end of the step and leave one behind; a second
        signal of the same kind does not wait.

        Args:
            source: batches; a step takes ``config.accumulation`` of them. Only a `BatchSource` can be resumed.
            resume: go on from the last checkpoint in the output folder.

        Raises:
            CheckpointError: there is nothing to resume, or it does not fit; or there is, and ``resume`` is not set.
            ValueError: there are fewer batches than the steps need.
            FloatingPointError: the loss is no longer finite.
        """
        self._begin(source, resume)
        if self.output is not None and self.processes.first:
            self._log = MetricsLog(self.output, self._progress.step, self.config.tensorboard)
        interrupts = Interrupts(said=self.processes.first)
        try:
            with interrupts if self.checkpoints is not None else nullcontext():
                losses, stopped = self._loop(source, interrupts)
        finally:
            self.model.eval()
            if self._log is not None:
                self._log.close()
                self._log = None
        now = self._progress
        return TrainingResult(losses, now.tokens, now.seconds, now.step, now.best.step, now.best.value, stopped)

    def load_best(self) -> None:
        """Give the model the parameters that evaluated best.

        Raises:
            CheckpointError: the run keeps no checkpoints, or had no evaluation.
        """
        if self.checkpoints is None or self._progress.best.step is None:
            raise CheckpointError("there is no best checkpoint: the run has no output folder, or no evaluation")
        self.checkpoints.load(self._progress.best.step, self.model)

    def _loop(self, source: Iterable[TrainingBatch], interrupts: Interrupts) -> tuple[list[float], bool]:
        config, progress = self.config, self._progress
        before = progress.seconds
        started = last = time.perf_counter()
        batches = iter(source)
        losses: list[float] = []
        stopped = progress.step >= config.steps or self._patience_is_over()
        self.model.train()
        while progress.step < config.steps and not stopped:
            micro_batches = self._next_batches(batches)
            if not losses:
                self._announce(micro_batches)
            # Asked anew: a source may learn new tasks while it is read.
            tasks = tuple(source.tasks) if isinstance(source, BatchSource) else ("all",)
            rate = self._learning_rate()
            result = self.optimizer_step(micro_batches, len(tasks), rate)
            now = time.perf_counter()
            progress.step += 1
            progress.tokens += result.tokens
            progress.seconds = before + now - started
            losses.append(result.loss)
            self._report(result, tasks, rate, now - last)
            last = now
            if self.processes.first and (progress.step % config.log_every == 0 or progress.step == config.steps):
                recent = losses[-config.log_every :]
                logger.info(
                    "step %d of %d: loss %.4f, %.0f tokens/s, %.0f s",
                    progress.step, config.steps, sum(recent) / len(recent),
                    progress.tokens / progress.seconds, progress.seconds,
                )  # fmt: skip
            improved = self._evaluate_if_due()
            stopped = self._patience_is_over()
            progress.seconds = before + time.perf_counter() - started
            done = stopped or progress.step == config.steps
            due = improved or done or (config.checkpoint_every and progress.step % config.checkpoint_every == 0)
            interrupt = interrupts.agreed(self.processes, self.optimizer_step.device)
            if due or interrupt:
                self._save(source)
            if interrupt:
                self._say_where_it_ended()
                interrupts.deliver(interrupt)
            last += time.perf_counter() - now  # evaluations and checkpoints are no part of a step's speed
        if self.processes.first and stopped and progress.step < config.steps:
            logger.info("stopped after step %d: %d evaluations without improvement", progress.step, config.patience)
        return losses, stopped and progress.step < config.steps

    def _next_batches(self, batches: Iterator[TrainingBatch]) -> list[TrainingBatch]:
        taken = list(islice(batches, self.config.accumulation))
        if len(taken) < self.config.accumulation:
            raise ValueError(f"the data ended after {self._progress.step} of {self.config.steps} steps")
        return taken

    def _announce(self, batches: list[TrainingBatch]) -> None:
        """Scale the learning rate to the global batch, and say so."""
        config = self.config
        device = self.optimizer_step.device
        rows = int(self.processes.sum(torch.tensor([sum(len(b.input_ids) for b in batches)]).numpy(), device)[0])
        if config.reference_batch is not None:
            self._rate_factor = batch_factor(config.batch_scaling, rows, config.reference_batch)
        if self.processes.first:
            trained = sum(parameter.numel() for parameter in self.optimizer_step.trained)
            logger.info(
                "training %d parameters from step %d on; global batch %d rows (%d processes, accumulation %d); "
                "peak learning rate %.3g%s",
                trained, self._progress.step, rows, self.processes.world_size, config.accumulation,
                config.learning_rate * self._rate_factor,
                "" if config.reference_batch is None else
                f" = {config.learning_rate:.3g} x {self._rate_factor:.3f} "
                f"({config.batch_scaling} of {rows} rows over the reference of {config.reference_batch})",
            )  # fmt: skip

    def _learning_rate(self) -> float:
        config = self.config
        factor = learning_rate_factor(config.schedule, self._progress.step, config.warmup, config.steps)
        return config.learning_rate * self._rate_factor * factor

    def _report(self, result: StepResult, tasks: tuple[str, ...], rate: float, seconds: float) -> None:
        if not self.processes.first or (self._log is None and self.on_step is None):
            return
        counted = zip(tasks, result.losses.tolist(), result.targets.tolist(), strict=True)
        metrics = StepMetrics(
            step=self._progress.step,
            loss=result.loss,
            task_losses={task: loss / count for task, loss, count in counted if count},
            learning_rate=rate,
            tokens=self._progress.tokens,
            tokens_per_second=result.tokens / seconds,
            padding=1 - result.tokens / result.positions,
            gradient_norm=result.gradient_norm,
            seconds=self._progress.seconds,
        )
        if self._log is not None:
            self._log.step(metrics)
        if self.on_step is not None:
            self.on_step(metrics)

    def _evaluate_if_due(self) -> bool:
        """Evaluate after every so many steps and after the last; returns whether it was the best so far."""
        config, progress = self.config, self._progress
        if self.evaluate is None or not config.evaluate_every:
            return False
        if progress.step % config.evaluate_every and progress.step != config.steps:
            return False
        self.model.eval()
        with torch.no_grad(), self.optimizer_step.autocast():
            # What follows must be the same everywhere, down to the last bit.
            values = self.processes.broadcast(dict(self.evaluate(self.model)))
        self.model.train()
        improved = progress.best.update(progress.step, values, config.monitor, config.higher_is_better)
        if self.processes.first:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            logger.info("evaluation after step %d: %s%s", progress.step, shown, " (best so far)" if improved else "")
        if self._log is not None:
            self._log.evaluation(progress.step, values)
        return improved

    def _say_where_it_ended(self) -> None:
        if self.processes.first and self.checkpoints is not None:
            step = self._progress.step
            logger.warning(
                "interrupted after step %d of %d: kept %s; --resume goes on from it",
                step, self.config.steps, self.checkpoints.path(step),
            )  # fmt: skip

    def _patience_is_over(self) -> bool:
        return self.config.patience is not None and self._progress.best.waited >= self.config.patience

    def _save(self, source: Iterable[TrainingBatch]) -> None:
        if self.checkpoints is None:
            return
        progress = self._progress
        state: dict[str, Any] = {
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "best": vars(progress.best),
            "source": source.state_dict() if isinstance(source, BatchSource) else None,
            "scaler": self.optimizer_step.scaler.state_dict(),
            "random": self.processes.gather(random_state(self.optimizer_step.device)),
            "config": self.config.to_dict(),
        }
        self.checkpoints.save(progress.step, self.model, self.optimizer_step.optimizer, state)
        kept = set(self.checkpoints.steps()[-self.config.keep_checkpoints :])
        if progress.best.step is not None:
            kept.add(progress.best.step)
        self.checkpoints.prune(kept)

    def _begin(self, source: Iterable[TrainingBatch], resume: bool) -> None:
        """Refuse to mix runs; restore the last checkpoint where asked to."""
        if self.checkpoints is None:
            if resume:
                raise CheckpointError("a run without an output folder has no checkpoint to resume")
            return
        steps = self.checkpoints.steps()
        self.processes.wait()  # nobody writes while others still look
        if not resume:
            if steps:
                raise CheckpointError(f"{self.output}: holds a run already; resume it, or choose another folder")
            return
        if not steps and self.output is not None and (self.output / FILE_NAME).exists():
            if self.processes.first:
                logger.warning("%s: killed before its first checkpoint; it begins anew", self.output)
            return
        if not steps:
            raise CheckpointError(f"{self.checkpoints.folder}: no checkpoint to resume; begin without resuming")
        if not isinstance(source, BatchSource):
            raise CheckpointError(f"{self.output}: cannot be resumed, because its data has no position to return to")
        state = self.checkpoints.read_state(steps[-1])
        self.checkpoints.load(steps[-1], self.model, self.optimizer_step.optimizer)
        try:
            self._progress = _Progress(steps[-1], state["tokens"], state["seconds"], Best(**state["best"]))
            source.load_state_dict(state["source"])
            if self.optimizer_step.scaler.is_enabled() and state["scaler"]:
                self.optimizer_step.scaler.load_state_dict(state["scaler"])
            set_random_state(state["random"], self.processes.rank, self.optimizer_step.device)
            changed = self.config.changes_since(state["config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.checkpoints.path(steps[-1]) / 'state.json'}: unusable ({error!r})") from None
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoints.path(steps[-1])}: cannot be resumed: {error}") from None
        if changed and self.processes.first:
            logger.warning("resuming with other options than the run began with: %s", changed)
