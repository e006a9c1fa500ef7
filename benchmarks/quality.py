"""What each precision costs: KL divergence, top-1 agreement and right answers against fp32, and the size of the file.

``python -m benchmarks.quality`` measures the bundled demo model on held-out requests. ``--checkpoint FOLDER`` measures
another model on random text of its own vocabulary (with ``python -m benchmarks.synthetic``, one of a published shape),
where there are no right answers. The native kernels run if they are built.
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

from benchmarks.environment import write_result
from cpmbee import native
from cpmbee.config import ModelConfig
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.quality import measure
from cpmbee.export.quantize import Method
from cpmbee.export.reference_loading import few_threads, streamed_logits
from cpmbee.export.report import Quality
from cpmbee.export.sources import open_source
from cpmbee.export.transcripts import Transcript, read_transcripts
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import numerals
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
        calibrated: whether errors are weighed by the inputs' strengths.
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
    parser.add_argument("--name", default="quality", help="of the result")
    parser.add_argument("--requests", type=int, default=2000, help="to ask")
    parser.add_argument("--short", action="store_true", help="defaults and their closest neighbours only")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    checkpoint: Path = arguments.checkpoint or demo_checkpoint()
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    if arguments.checkpoint is None:
        asked, calibration = demo_requests(arguments.requests)
    else:
        asked = random_requests(tokenizer, arguments.requests, 1)
        calibration = random_requests(tokenizer, min(arguments.requests, CALIBRATION_REQUESTS), 2)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measured(checkpoint, asked, calibration, settings(arguments.short), Path(scratch)))
    if not arguments.no_write:
        kernels = native.kernels()
        write_result(arguments.name, {"requests": len(asked), "kernels": kernels, "rows": rows})


def settings(short: bool) -> Iterator[Setting]:
    """What is measured."""
    yield Setting("fp16")
    for block_size in BLOCK_SIZES:
        for method in ("nearest", "search"):
            yield Setting("int8", block_size, method=method)
    for head_bits in (8,) if short else (8, 4):
        for block_size in BLOCK_SIZES:
            for method in ("nearest", "search"):
                yield Setting("int4", block_size, head_bits, method)
            yield Setting("int4", block_size, head_bits, "search", calibrated=True)


def measured(
    checkpoint: Path, asked: Requests, calibration: Requests, wanted: Iterator[Setting], scratch: Path
) -> Iterator[dict[str, Any]]:
    """One row for each setting, printed as it comes."""
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    config = ModelConfig.from_file(checkpoint / "config.json")
    transcripts = read_transcripts(write_jsonl(scratch / "asked.jsonl", asked), tokenizer, config)
    calibration_file = write_jsonl(scratch / "calibration.jsonl", calibration)
    expected = reference(checkpoint, transcripts)
    print("| body | head | block | scales | file (MB) | KL (nats) | top-1 (%) | right (%) |\n" + "|---" * 8 + "|")
    for setting in wanted:
        folder = scratch / "model"
        report = export(
            checkpoint,
            folder,
            setting.precision,
            block_size=setting.block_size,
            head_bits=setting.head_bits,
            method=setting.method,
            calibration=calibration_file if setting.calibrated else None,
            verify=False,
            overwrite=True,
        )
        quality = measure(open_model(folder, config, transcripts), transcripts, expected)
        size = (folder / "model.onnx.data").stat().st_size
        print("| " + " | ".join([*setting.columns, *figures(size, quality)]) + " |", flush=True)
        worst = max((matrix.error for matrix in report.matrices), default=None)
        yield {**asdict(setting), "data_bytes": size, "worst_matrix_error": worst, **asdict(quality)}


def figures(size: int, quality: Quality) -> list[str]:
    """Columns of a table."""
    right = "" if quality.accuracy is None else f"{100 * quality.accuracy:.2f}"
    return [f"{size / 1e6:.2f}", f"{quality.kl:.2e}", f"{100 * quality.top1:.3f}", right]


def reference(checkpoint: Path, transcripts: list[Transcript]) -> list[NDArray[np.float32]]:
    """The fp32 reference's logits."""
    source = open_source(checkpoint)
    with few_threads(source.config):
        return list(streamed_logits(source, [t.inputs for t in transcripts], lambda stage, fraction: None))


def open_model(folder: Path, config: ModelConfig, transcripts: list[Transcript]) -> OnnxModel:
    """A session with room for the longest transcript."""
    rows = max(transcript.num_tokens for transcript in transcripts)
    return OnnxModel(folder / "model.onnx", config, rows, use_native=native.library_path() is not None)


def demo_requests(count: int) -> tuple[Requests, Requests]:
    """Held-out requests with their answers, and others to calibrate on."""
    asked = numerals.held_out_examples(np.random.default_rng(2026), count // 2)
    seen = numerals.examples(np.random.default_rng(2027), held_out=False)
    calibration: Requests = [dict(next(seen).solved) for _ in range(CALIBRATION_REQUESTS)]
    return [dict(example.solved) for example in asked], calibration


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
