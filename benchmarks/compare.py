"""``cpmbee bench compare``: what changed between two results, and whether it is more than noise.

Each process of a cell gives one value of a metric. The difference of two cells is that of the means of the values'
logarithms, so it reads as a ratio; its noise is half the 99 % confidence interval of Student's t-test, the scatter of
both runs pooled. A change counts when it exceeds both its noise and `THRESHOLD`: with dozens of numbers compared, some
leave their interval by chance, but few of those are large. Tails of the latency are shown and not judged: what makes
the slowest tokens is the machine as often as the build. Nor are the times of a cell judged whose processes read memory
at another rate in one run than in the other: then the machine changed, and the build may not have.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cpmbee.bench.metrics import BY_KEY, Metric, summarize
from cpmbee.bench.records import Cell, Result

THRESHOLD = 0.05  # relative; what two runs of one build on a quiet machine may differ by
BANDWIDTH_THRESHOLD = 0.05  # relative; what the bandwidth of memory beside a cell may differ by
COMPARED = (
    *("encode_s", "prefill_tokens_per_s", "decode_tokens_per_s", "step_p50_s", "step_p90_s", "step_p99_s"),
    *("load_s", "load_to_first_token_s", "peak_resident_bytes", "peak_anonymous_bytes", "cache_bytes", "file_bytes"),
)
EXACT = 1e-9  # smaller differences are none
TAILS = ("step_p90_s", "step_p99_s")
# Quantiles of Student's t at 99.5 %, for 1, 2, ... degrees of freedom; beyond the last one, that of the normal law.
T_QUANTILES = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)
NORMAL_QUANTILE = 2.58


@dataclass(frozen=True)
class Difference:
    """One metric of one cell, in two results.

    Attributes:
        cell: subject and workload, as tables call them.
        metric: what is compared.
        before: median of the first result.
        after: median of the second.
        change: relative, positive where the number grew.
        noise: half of the change's 99 % interval; None where one process each is all there is.
        same_machine: whether memory was as fast beside the cell in both; times say nothing of the build where not.
    """

    cell: str
    metric: Metric
    before: float
    after: float
    change: float
    noise: float | None
    same_machine: bool = True

    @property
    def judged(self) -> bool:
        """Whether a change would say something about the build."""
        comparable = self.same_machine or self.metric.key.endswith("_bytes")
        return comparable and self.metric.key not in TAILS and self.noise is not None

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"``, or empty where the change is noise, or the metric is not judged."""
        if not self.judged or abs(self.change) <= max(THRESHOLD, self.noise or 0.0):
            return ""
        return "better" if (self.change > 0) is bool(self.metric.more_is_better) else "worse"


def main(argv: list[str]) -> int:
    """Run ``cpmbee bench compare``; returns 1 where something got worse."""
    parser = argparse.ArgumentParser(
        "cpmbee bench compare",
        description="Say what changed between two results of cpmbee bench. Exits with 1 if something got worse.",
    )
    parser.add_argument("before", type=Path, metavar="A", help="folder of one run, or its result.json")
    parser.add_argument("after", type=Path, metavar="B", help="that of another")
    arguments = parser.parse_args(argv)
    before, after = Result.read(arguments.before), Result.read(arguments.after)
    found = differences(before, after)
    print(markdown(before, after, found), end="")
    return int(any(difference.verdict == "worse" for difference in found))


def differences(before: Result, after: Result) -> list[Difference]:
    """All metrics of all cells that both results have."""
    theirs = {_name(cell): cell for cell in after.cells}
    found = []
    for cell in before.cells:
        other = theirs.get(_name(cell))
        if other is None:
            continue
        old, new = summarize(before, cell), summarize(after, other)
        same = abs(bandwidth_change(cell, other)) <= BANDWIDTH_THRESHOLD
        for key in COMPARED:
            if key in old and key in new:
                change, noise = relative_change(old[key].values, new[key].values)
                medians = (old[key].median, new[key].median)
                found.append(Difference(_name(cell), BY_KEY[key], *medians, change, noise, same))
    return found


def bandwidth_change(before: Cell, after: Cell) -> float:
    """How much faster memory was read beside a cell, relative; 0 where that was not measured both times."""
    rates = [[rate for each in cell.rounds for rate in each.bandwidth] for cell in (before, after)]
    if not all(rates):
        return 0.0
    return statistics.median(rates[1]) / statistics.median(rates[0]) - 1


def relative_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """The change from ``before`` to ``after`` and its noise, both relative; one value for each process.

    The interval of the difference of mean logarithms, both groups taken to scatter equally.
    """
    if min(*before, *after) <= 0:
        return (0.0, 0.0) if list(before) == list(after) else (math.inf, None)
    groups = [[math.log(value) for value in values] for values in (before, after)]
    means = [statistics.fmean(values) for values in groups]
    difference = means[1] - means[0]
    squares = sum((value - mean) ** 2 for values, mean in zip(groups, means, strict=True) for value in values)
    freedom = len(before) + len(after) - 2
    if freedom == 0:
        return math.expm1(difference), 0.0 if abs(difference) < EXACT else None
    error = math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))
    return math.expm1(difference), math.expm1(_t_quantile(freedom) * error)


def markdown(before: Result, after: Result, found: Sequence[Difference]) -> str:
    """Circumstances that differ, changes that count, then all numbers."""
    lines = [f"- {line}" for line in _circumstances(before, after)]
    counted = [difference for difference in found if difference.verdict]
    lines.append(f"- {len(counted)} of {len(found)} numbers changed by more than {THRESHOLD:.0%} and their noise")
    if unknown := sum(difference.noise is None for difference in found):
        lines.append(
            f"- {unknown} of them (?) are of one process each, so their noise is unknown and they are not judged"
        )
    if other := sorted({each.cell for each in found if not each.same_machine}):
        lines.append(
            f"- {len(other)} of {len({each.cell for each in found})} cells are not judged by their times (~): memory "
            f"beside them was not read as fast in both, by more than {BANDWIDTH_THRESHOLD:.0%}: {'; '.join(other)}"
        )
    lines += ["", "| cell | metric | before | after | change | noise | |", "|---|---|---:|---:|---:|---:|---|"]
    for difference in [*counted, *(each for each in found if not each.verdict)]:
        metric = difference.metric
        columns = [difference.cell, metric.title]
        columns += [f"{value / metric.scale:,.{metric.digits + 1}f}" for value in (difference.before, difference.after)]
        columns.append(f"{100 * difference.change:+.1f} %")
        columns.append("?" if difference.noise is None else f"±{100 * difference.noise:.1f} %")
        mark = "" if difference.same_machine or difference.judged else "~"
        lines.append("| " + " | ".join([*columns, difference.verdict or mark]) + " |")
    return "\n".join(lines) + "\n"


def _circumstances(before: Result, after: Result) -> list[str]:
    lines = [f"before: commit {before.about['commit']}; after: commit {after.about['commit']}"]
    for name in ("cpu", "cores"):
        old, new = before.about["machine"].get(name), after.about["machine"].get(name)
        if old != new:
            lines.append(f"NOT THE SAME MACHINE: {name} {old}, then {new}")
    versions = (before.about["versions"], after.about["versions"])
    for name in sorted({*versions[0], *versions[1]}):
        old, new = (each.get(name, "none") for each in versions)
        if old != new:
            lines.append(f"{name} {old}, then {new}")
    rates = [each.bandwidth() for each in (before, after)]
    for threads in sorted({*rates[0]} & {*rates[1]}):
        old, new = (statistics.median(each[threads]) for each in rates)
        lines.append(
            f"memory, {threads} thread{'s' if threads > 1 else ''}: {old / 1e9:.1f} GB/s, then {new / 1e9:.1f}"
        )
    names = [{_name(cell) for cell in each.cells} for each in (before, after)]
    if only := sorted(names[0] ^ names[1]):
        lines.append(f"only in one of them: {'; '.join(only)}")
    return lines


def _name(cell: Cell) -> str:
    work = ", ".join(f"{name} {value}" for name, value in asdict(cell.workload).items() if name != "device")
    return f"{cell.subject} ({work}, {cell.workload.device})"


def _t_quantile(freedom: int) -> float:
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else NORMAL_QUANTILE
