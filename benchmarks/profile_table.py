"""A profile as a table; `cpmbee.bench.step_profile` makes it."""

from __future__ import annotations

from typing import Any


def profile_markdown(label: str, profile: dict[str, Any]) -> str:
    """One model's profile as a table."""
    decode, prefill, limits = profile["decode"], profile["prefill"], profile["limits"]
    work = ", ".join(f"{name} {value}" for name, value in profile["workload"].items())
    totals = [sum(row["ms"] for row in phase.values()) for phase in (prefill, decode)]
    rows = [
        f"{label}, by operator ({work}; least times at {limits['read_gb_s']:.1f} GB/s of reads (before and after), "
        f"{limits['fp32_gflop_s']:.0f} GFLOP/s of fp32 and {limits['int8_gflop_s']:.0f} of int8 products; "
        "between: what a run takes beyond its operators; engine: what a step takes beyond its run):\n",
        "| operator | prefill, ms | share | least, ms | decode step, ms | share | least, ms |",
        "|---" + "|---:" * 6 + "|",
    ]
    for name in sorted({*prefill, *decode}, key=lambda name: -decode.get(name, prefill.get(name))["ms"]):
        cells = [name]
        for phase, total in zip((prefill, decode), totals, strict=True):
            if name not in phase:
                cells += ["", "", ""]
                continue
            row = phase[name]
            least = "" if row["least_ms"] is None else f"{row['least_ms']:.3f}"
            cells += [f"{row['ms']:.3f}", f"{row['ms'] / total:.1%}", least]
        rows.append("| " + " | ".join(cells) + " |")
    rows.append(f"| all | {totals[0]:.3f} | | | {totals[1]:.3f} | | |")
    return "\n".join(rows)
