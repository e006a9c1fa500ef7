"""What each precision costs: KL divergence, top-1 agreement and right answers against fp32, and the size of the file.

``python -m cpmbee.bench.quality`` measures the bundled demo model on the requests that come with it: every other one is
asked, the rest is for calibration. ``--requests`` and ``--calibration`` take other JSON Lines files.
``--checkpoint FOLDER`` measures another model, without ``--requests`` on random text of its own vocabulary (with
``python -m cpmbee.bench.synthetic``, one of a published shape), where there are no right answers. The native kernels
run if they are built.

A single export says little about a method, so the demo model is measured in several draws: the same model with other
weights (`cpmbee.bench.draws`). The verdict on a method is what it makes of the divergence that round-to-nearest has in
the same draw: the geometric mean of these ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee import native
from cpmbee.bench.draws import redrawn
from cpmbee.bench.environment import commit, write_result
from cpmbee.bench.fidelity import open_model
from cpmbee.config import ModelConfig
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.quality import measure
from cpmbee.export.quantize import Method
from cpmbee.export.reference_loading import few_threads, streamed_logits
from cpmbee.export.report import Quality
from cpmbee.export.sources import open_source
from cpmbee.export.transcripts import Transcript, read_requests, read_transcripts
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from cpmbee.vocabulary import is_special

Requests = list[dict[str, Any]]

CALIBRATION_REQUESTS = 256
TEXT_TOKENS, ANSWER_TOKENS = 32, 8  # of random requests


@dataclass(frozen=True)
class Setting:
    """One way to export.

    Attributes:
        precision: of attention and feed-forward matrices.
        block_size: weights that share a scale.
        head_bits: of embedding and head.
        method: of finding scales.
        calibrated: whether errors are corrected by what the inputs look like in requests.
    """

    precision: Precision
    block_size: int = 64
    head_bits: int = 8
    method: Method = "search"
    calibrated: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The setting as columns of a table."""
        if self.precision in ("fp32", "fp16"):
            return self.precision, self.precision, "", ""
        method = f"{self.method}, calibrated" if self.calibrated else self.method
        return self.precision, f"int{self.head_bits}", str(self.block_size), method


def main() -> None:
    """Measure, print a Markdown table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="another model than the demo")
    parser.add_argument("--requests", type=Path, nargs="+", metavar="FILE", help="what to ask, with answers")
    parser.add_argument("--calibration", type=Path, nargs="+", metavar="FILE", help="requests to calibrate with")
    parser.add_argument("--name", default="quality", help="of the result")
    parser.add_argument("--count", type=int, default=1000, help="requests to ask at most")
    parser.add_argument("--draws", type=int, default=6, help="of the demo model, itself included")
    parser.add_argument("--short", action="store_true", help="defaults and their closest neighbours only")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    measured_commit = commit()  # now: the tree may move on while this runs
    checkpoint: Path = arguments.checkpoint or demo_checkpoint()
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    config = ModelConfig.from_file(checkpoint / "config.json")
    files = arguments.requests or sorted(checkpoint.glob("*requests.jsonl"))
    if files:
        asked, calibration = divided(files, arguments.calibration, arguments.count)
    else:
        asked = random_requests(tokenizer, arguments.count, 1)
        calibration = random_requests(tokenizer, CALIBRATION_REQUESTS, 2)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        transcripts = read_transcripts(write_jsonl(scratch / "asked.jsonl", asked), tokenizer, config)
        draws = [checkpoint]
        if arguments.checkpoint is None:
            draws += [redrawn(checkpoint, scratch / f"draw{seed}", seed) for seed in range(1, arguments.draws)]
        calibration_file = write_jsonl(scratch / "calibration.jsonl", calibration)
        rows = list(measured(draws, transcripts, calibration_file, settings(arguments.short), scratch))
    if not arguments.no_write:
        facts = {
            "commit": measured_commit,
            "requests": len(asked),
            "calibration_requests": len(calibration),
            "draws": len(draws),
            "kernels": native.kernels(),
        }
        write_result(arguments.name, {**facts, "rows": rows})


def settings(short: bool) -> Iterator[Setting]:
    """What is measured."""
    yield Setting("fp16")
    quantized: tuple[tuple[Precision, int], ...] = (("int8", 8), ("int4", 8), ("int4", 4))
    for precision, head_bits in quantized:
        if short and head_bits == 4:
            continue
        for block_size in BLOCK_SIZES:
            yield Setting(precision, block_size, head_bits, "nearest")
            yield Setting(precision, block_size, head_bits, "search")
            if not short or precision == "int4":  # at 8 bits there is little to correct, and large models take minutes
                yield Setting(precision, block_size, head_bits, "search", calibrated=True)


def measured(
    draws: list[Path], transcripts: list[Transcript], calibration: Path, wanted: Iterator[Setting], scratch: Path
) -> Iterator[dict[str, Any]]:
    """One row for each setting, printed as it comes; the first draw is the checkpoint itself."""
    expected = reference(draws[0], transcripts)
    heads = "body | head | block | scales | file (MB) | KL (nats) | ± | of nearest | × or ÷ | top-1 (%) | right (%)"
    print(f"| {heads} |\n" + "|---" * len(heads.split("|")) + "|")
    nearest: list[float] = []
    for setting in wanted:
        found: list[Quality] = []
        worst = 0.0
        for draw in draws:
            folder = scratch / "model"
            report = export(
                draw,
                folder,
                setting.precision,
                block_size=setting.block_size,
                head_bits=setting.head_bits,
                method=setting.method,
                calibration=calibration if setting.calibrated else None,
                verify=False,
                overwrite=True,
            )
            found.append(measure(open_model(folder, transcripts), transcripts, expected))
            worst = max([worst, *(matrix.error for matrix in report.matrices)])
        size = (folder / "model.onnx.data").stat().st_size
        if setting.method == "nearest":
            nearest = [quality.kl for quality in found]
        summary = {"data_bytes": size, "worst_matrix_error": worst, **summarized(found), **compared(found, nearest)}
        print("| " + " | ".join([*setting.columns, *figures(summary)]) + " |", flush=True)
        yield {**asdict(setting), **summary, "checkpoint_itself": asdict(found[0])}


def summarized(found: list[Quality]) -> dict[str, float | None]:
    """Means over draws, and the standard error of that of the divergence."""
    divergence = [quality.kl for quality in found]
    error = float(np.std(divergence, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None
    right = [quality.accuracy for quality in found if quality.accuracy is not None]
    return {
        "kl": float(np.mean(divergence)),
        "kl_standard_error": error,
        "top1": float(np.mean([quality.top1 for quality in found])),
        "accuracy": float(np.mean(right)) if right else None,
        "reference_accuracy": found[0].reference_accuracy,
    }


def compared(found: list[Quality], nearest: list[float]) -> dict[str, Any]:
    """The divergence of each draw, and what it is of round-to-nearest's: geometric mean, and its standard error."""
    divergence = [quality.kl for quality in found]
    if len(nearest) != len(found) or divergence == nearest:
        return {"kl_draws": divergence, "kl_of_nearest": None, "kl_of_nearest_error": None}
    ratios = np.log(divergence) - np.log(nearest)
    error = float(np.exp(np.std(ratios, ddof=1) / len(found) ** 0.5)) if len(found) > 1 else None
    return {"kl_draws": divergence, "kl_of_nearest": float(np.exp(ratios.mean())), "kl_of_nearest_error": error}


def figures(summary: dict[str, Any]) -> list[str]:
    """Columns of a table."""
    right = summary["accuracy"]
    return [
        f"{summary['data_bytes'] / 1e6:.2f}",
        f"{summary['kl']:.2e}",
        _optional(summary["kl_standard_error"], ".1e"),
        _optional(summary["kl_of_nearest"], ".2f"),
        _optional(summary["kl_of_nearest_error"], ".2f"),
        f"{100 * summary['top1']:.3f}",
        _optional(None if right is None else 100 * right, ".2f"),
    ]


def _optional(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def reference(checkpoint: Path, transcripts: list[Transcript]) -> list[NDArray[np.float32]]:
    """The fp32 reference's logits."""
    source = open_source(checkpoint)
    with few_threads(source.config):
        return list(streamed_logits(source, [t.inputs for t in transcripts], lambda stage, fraction: None))


def divided(files: list[Path], calibration: list[Path] | None, count: int) -> tuple[Requests, Requests]:
    """Requests to ask, at most ``count`` spread over all, and others to calibrate with."""
    asked = [request for file in files for request in read_requests(file)]
    if calibration is None:
        asked, others = asked[::2], asked[1::2]
    else:
        others = [request for file in calibration for request in read_requests(file)]
    return asked[:: -(-len(asked) // count)], others[:: -(-len(others) // CALIBRATION_REQUESTS)]


def random_requests(tokenizer: Tokenizer, count: int, seed: int) -> Requests:
    """Random text with random answers."""
    rng = np.random.default_rng(seed)
    plain = [t for i in range(tokenizer.vocab_size) if not is_special(t := tokenizer.id_to_token(i)) and "<" not in t]

    def text(tokens: int) -> str:
        return "".join(plain[i] for i in rng.integers(0, len(plain), tokens))

    return [{"input": text(TEXT_TOKENS), "<ans>": text(ANSWER_TOKENS)} for _ in range(count)]


def write_jsonl(file: Path, requests: Requests) -> Path:
    """A file of requests."""
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in requests), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
