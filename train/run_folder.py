"""The folder of a training run: what a run writes there, and what of it may be there before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cpmbee.errors import CheckpointError
from cpmbee.outputs import FolderKind, require_apart, require_replaceable
from cpmbee.train.metrics import FILE_NAME as METRICS

CHECKPOINTS, REPORT = "checkpoints", "report.json"


def require_run_folder(
    out: Path, results: Mapping[str, FolderKind], inputs: Iterable[str | Path | None], resume: bool
) -> None:
    """Refuse a folder in which a run would replace what it reads, or what no run of its own has written.

    Args:
        out: folder of the run.
        results: folders that the run will write in ``out`` at its end, by name.
        inputs: files and folders that the run reads.
        resume: the run was begun in ``out``, so that its own results may be replaced.

    Raises:
        CheckpointError: names what is in the way.
    """
    given = [Path(path) for path in inputs if path is not None]
    require_apart([out / name for name in (*results, METRICS, REPORT)], given, CheckpointError)
    if out.exists() and (same := [path for path in given if path.exists() and out.samefile(path)]):
        raise CheckpointError(f"{out}: is the same as {same[0]}, which is read; write to another place")
    if not resume and any((out / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(f"{out}: holds a run already; resume it, or choose another folder")
    for name, kind in results.items():
        if resume:
            require_replaceable(out / name, kind, True, CheckpointError)
        elif _holds_something(out / name):
            raise CheckpointError(f"{out / name}: is there already; choose another output folder, or move it away")
    for name in (METRICS, REPORT):
        if not resume and _holds_something(out / name):
            raise CheckpointError(
                f"{out / name}: is there already, from a run without checkpoints or of somebody else; go on with it "
                "(--resume), choose another output folder, or move it away"
            )


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0
