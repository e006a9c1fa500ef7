"""The curve of a CCPM run as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpmbee.bench.ccpm_data import OPTIONS

TOKENS = 2  # of an answer that count in mean losses: the option and, once there are no look-ups any more, its end


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw loss and held-out accuracy of ``cpmbee.bench.ccpm``'s results over the steps; the suffix says the format."""
    from matplotlib.figure import Figure  # only this needs it

    curve, pretraining = results["curve"], results["options"]["lookup_steps"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, right = figure.subplots(1, 2)
    for task, label in (("look-up", "generated look-ups"), ("ccpm", "CCPM records")):
        points = [
            (point["step"], point[task] * (1 if point["step"] <= pretraining else TOKENS))
            for point in curve["loss"]
            if task in point and point[task] > 0
        ]
        loss.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    held_out = [point for point in curve["held_out"] if point["step"] > pretraining]
    steps, means = _columns(held_out, "loss")
    loss.plot(steps, [TOKENS * mean for mean in means], "o-", markersize=3, label="CCPM, held out")
    loss.set(xlabel="step", ylabel="loss (nats per answer)", yscale="log")
    loss.legend(frameon=False)
    steps, shares = _columns(curve["held_out"], "choice_accuracy")
    right.plot(steps, [100 * share for share in shares], "o-", markersize=3, label="model")
    bars = {"chance": 1 / OPTIONS, **{name: bar["held out"] for name, bar in results["bars"].items()}}
    for style, (name, share) in zip((":", "--", "-."), bars.items(), strict=True):
        right.axhline(100 * share, color="gray", linestyle=style, linewidth=1, label=f"{name} ({100 * share:.1f} %)")
    right.set(xlabel="step", ylabel="right on held-out records (%)", xlim=(0, None))
    right.legend(frameon=False, loc="center right")
    machine, millions = results["machine"], results["parameters"] / 1e6
    where = f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(f"CCPM: {millions:.1f} million parameters, trained in bf16 with one thread on {where}")
    for axes in (loss, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _columns(points: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in points], [point[name] for point in points]
