"""What was measured: every sample, as values and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpmbee.bench.plan import Workload
from cpmbee.errors import ConfigError
from cpmbee.json_file import NOT_JSON
from cpmbee.staging import staged_file

FORMAT, SCHEMA_VERSION = "cpmbee-bench", 2
MOST_NAMED = 8  # files in an error
RESULT_FILE = "result.json"  # in a folder that cpmbee bench wrote


@dataclass(frozen=True)
class Round:
    """One process that measured one workload; times in seconds.

    Attributes:
        load: from files to a model that is ready, imports not counted; None where the engine does not tell.
        cold: from the start of loading to the first token of the first request.
        encode: of each repetition, from text to arrays, all requests of the batch together.
        prefill: of each repetition, from arrays to the first token.
        decode: of each repetition, the mean of its later steps.
        steps: between one token and the next, all repetitions; empty where the engine tells only their mean.
        cache_bytes: of the cache rows in use at the end of an answer.
        step_cache_bytes: of the cache rows in use, the mean over decoding steps; None where the engine does not tell.
        peak_resident: bytes in memory at most, pages of mapped files included.
        peak_anonymous: bytes of its own at most, as sampled.
        peak_file: bytes of mapped files in memory at most, as sampled.
        bandwidth: bytes per second that as many threads read from memory just before and just after the process.
        disturbed: share of the machine that others took meanwhile.
        kernels: what ran each custom op.
    """

    load: float | None
    cold: float | None
    encode: list[float]
    prefill: list[float]
    decode: list[float]
    steps: list[float]
    cache_bytes: int | None
    peak_resident: int | None
    peak_anonymous: int | None
    peak_file: int | None
    step_cache_bytes: float | None = None
    bandwidth: list[float] = field(default_factory=list)
    disturbed: float = 0.0
    kernels: dict[str, str] = field(default_factory=dict)


@dataclass
class Cell:
    """One subject at one workload: a row of the table.

    Attributes:
        subject: its label.
        workload: what was asked.
        rounds: what each process measured.
    """

    subject: str
    workload: Workload
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Result:
    """One run of the benchmark.

    Attributes:
        about: command, commit, machine, versions, settings.
        subjects: by label, what was measured, as `cpmbee.bench.plan.Subject.to_dict` says it.
        cells: all rows.
        skipped: what could not be measured: label and reason.
        notes: what to know about each engine's numbers.
        quality: by label; fields of `cpmbee.export.report.Quality`.
        profile: by label; see `cpmbee.bench.step_profile`.
    """

    about: dict[str, Any]
    subjects: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: dict[str, dict[str, Any]] = field(default_factory=dict)

    def bandwidth(self) -> dict[int, list[float]]:
        """For each number of threads, all readings of what they read from memory, bytes per second."""
        found: dict[int, list[float]] = {}
        for cell in self.cells:
            rates = found.setdefault(cell.workload.threads, [])
            rates += [rate for each in cell.rounds for rate in each.bandwidth]
        return {threads: rates for threads, rates in sorted(found.items()) if rates}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Keep it as JSON, all of it or nothing."""
        with staged_file(path) as file:
            file.write(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    def include(self, other: Result) -> None:
        """Take the cells of another run, with all that is said of them; circumstances stay those of this one."""
        self.subjects |= other.subjects
        self.cells += other.cells
        self.skipped += [each for each in other.skipped if each not in self.skipped]
        self.notes |= other.notes
        self.quality |= other.quality
        self.profile |= other.profile

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` kept.

        Args:
            path: the file, or the folder of a run.

        Raises:
            ConfigError: it is not that.
        """
        if path.is_dir():
            path = _in_folder(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except NOT_JSON as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ConfigError(f"{path}: not a result of cpmbee bench")
        if raw.get("schema_version") not in (1, SCHEMA_VERSION):
            raise ConfigError(f"{path}: schema version {raw.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        try:
            if raw["schema_version"] == 1:
                _give_rounds_bandwidth(raw)
            result = cls(
                about=raw["about"],
                subjects=raw["subjects"],
                cells=[_cell(cell) for cell in raw["cells"]],
                skipped=[(label, reason) for label, reason in raw["skipped"]],
                notes=raw["notes"],
                quality=raw["quality"],
                profile=raw["profile"],
            )
            result.require_complete()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: incomplete ({type(error).__name__}: {error})") from None
        return result

    def require_complete(self) -> None:
        """See that tables can be made of it.

        Raises:
            KeyError: something is missing.
            TypeError: something is of another type.
            ValueError: a bandwidth is zero.
        """
        _require(self.about, "commit", "machine", "versions", "rounds", "repetitions")
        _require(self.about["machine"], "cpu", "cores", "vector_instructions")
        for rates in self.bandwidth().values():
            if min(rates) <= 0:
                raise ValueError("memory was not read at all")
        for cell in self.cells:
            _require(self.subjects[cell.subject], "engine", "precision", "cache", "parameters")
            _require(self.subjects[cell.subject], "file_bytes", "weight_bytes", "operations")


def _in_folder(folder: Path) -> Path:
    """The result in a folder.

    Raises:
        ConfigError: there is none of the usual name; names others.
    """
    if (folder / RESULT_FILE).exists():
        return folder / RESULT_FILE
    others = sorted(file.name for file in folder.glob("*.json"))
    if not others:
        raise ConfigError(f"{folder}: no {RESULT_FILE} in this folder; cpmbee bench --out FOLDER writes one")
    more = ", ..." if len(others) > MOST_NAMED else ""
    named = ", ".join(others[:MOST_NAMED])
    raise ConfigError(f"{folder}: no {RESULT_FILE} in this folder; name one of its files: {named}{more}")


def _require(values: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in values:
            raise KeyError(name)


def _cell(raw: Mapping[str, Any]) -> Cell:
    return Cell(raw["subject"], Workload(**raw["workload"]), [Round(**each) for each in raw["rounds"]])


def _give_rounds_bandwidth(raw: dict[str, Any]) -> None:
    """Version 1 measured memory once a round of all cells: the median of the run stands beside each process."""
    for cell in raw["cells"]:
        rates = raw["bandwidth"][str(cell["workload"]["threads"])]
        for each in cell["rounds"]:
            each["bandwidth"] = [statistics.median(rates)]
