"""Quality beside speed: how far each model's probabilities are from fp32, and how many answers it gets right.

``python -m cpmbee.bench.fidelity SPEC`` runs the reference or one model in a process of its own; logits of the
reference go through files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmbee.bench.plan import Subject
from cpmbee.bench.processes import run_module
from cpmbee.bench.records import Result

if TYPE_CHECKING:
    from cpmbee.export.onnx_model import OnnxModel
    from cpmbee.export.transcripts import Transcript

MODULE = "cpmbee.bench.fidelity"
ENGINES = ("cpmbee", "functions", "matmulnbits", "dynamic-quantize")  # whose models are folders of ours


def measure(
    result: Result, subjects: Sequence[Subject], requests: Path, reference: Path, vocabulary: Path, scratch: Path
) -> None:
    """Compare every model that has our weights with the reference; into ``result.quality``.

    Args:
        result: gets the qualities; a model that fails is skipped with its reason, all of them if the reference fails.
        subjects: what is measured; peers with weights of their own are passed over.
        requests: JSON Lines of requests, with their answers if right ones are to be counted.
        reference: checkpoint, or model folder in fp32.
        vocabulary: of the models.
        scratch: for the reference's logits.
    """
    logits = scratch / "reference-logits"
    logits.mkdir(parents=True, exist_ok=True)
    common = {"requests": str(requests), "logits": str(logits), "vocabulary": str(vocabulary)}
    try:
        run_module(MODULE, [json.dumps({**common, "reference": str(reference)})])
    except RuntimeError as error:
        result.skipped.append((reference.name, f"quality: {error}"))
        return
    for subject in subjects:
        if subject.engine not in ENGINES:
            continue
        spec = json.dumps({**common, "model": str(subject.path)})
        try:
            result.quality[subject.label] = run_module(MODULE, [spec], dict(subject.environment)).value
        except RuntimeError as error:
            result.skipped.append((subject.label, f"quality: {error}"))


def main() -> None:
    """Do what the command line asks for; print JSON."""
    spec = json.loads(sys.argv[1])
    if "reference" in spec:
        _write_reference(spec)
        print("{}")
    else:
        print(json.dumps(_compare(spec)))


def _write_reference(spec: dict[str, str]) -> None:
    """Keep the reference's logits, a file for each request."""
    from cpmbee.config import ModelConfig
    from cpmbee.export.reference_loading import few_threads, streamed_logits
    from cpmbee.export.sources import open_source
    from cpmbee.export.transcripts import read_transcripts
    from cpmbee.folder import MANIFEST
    from cpmbee.tokenizer import Tokenizer

    path = Path(spec["reference"])
    is_folder = (path / MANIFEST).is_file()
    source = None if is_folder else open_source(path)
    config = ModelConfig.from_file(path / "config.json") if source is None else source.config
    transcripts = read_transcripts(spec["requests"], Tokenizer.from_file(spec["vocabulary"]), config)
    if source is None:
        model = open_model(path, transcripts)
        logits: Any = (model.run(transcript.inputs)[0] for transcript in transcripts)
        _save(spec, logits)
        return
    with few_threads(config):
        _save(spec, streamed_logits(source, [each.inputs for each in transcripts], lambda stage, fraction: None))


def _save(spec: dict[str, str], logits: Any) -> None:
    for i, each in enumerate(logits):
        np.save(Path(spec["logits"]) / f"{i}.npy", each)


def _compare(spec: dict[str, str]) -> dict[str, Any]:
    from cpmbee.bench.peers.graph_rules import PEER_RULES
    from cpmbee.export.quality import measure as compare
    from cpmbee.export.transcripts import read_transcripts
    from cpmbee.folder import open_folder
    from cpmbee.tokenizer import Tokenizer

    folder = open_folder(spec["model"], rules=PEER_RULES)
    transcripts = read_transcripts(spec["requests"], Tokenizer.from_file(spec["vocabulary"]), folder.config)
    expected = (np.load(Path(spec["logits"]) / f"{i}.npy") for i in range(len(transcripts)))
    return asdict(compare(open_model(folder.path, transcripts), transcripts, expected))


def open_model(folder: Path, transcripts: Sequence[Transcript]) -> OnnxModel:
    """A session with room for the longest transcript, with the native kernels if they are built."""
    from cpmbee import native
    from cpmbee.export.onnx_model import OnnxModel

    rows = max(transcript.num_tokens for transcript in transcripts)
    return OnnxModel(folder / "model.onnx", rows, use_native=native.library_path() is not None)


if __name__ == "__main__":
    main()
