"""From a checkpoint to a model folder: the one function behind ``cpmbee export``."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

import cpmbee
from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError, ConfigError, VocabularyError
from cpmbee.export import graph
from cpmbee.export.builder import GraphBuilder
from cpmbee.export.data_file import ALIGNMENT, DataFile
from cpmbee.export.folder import REPORT, require_space, staged_folder
from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION
from cpmbee.export.report import ExportReport
from cpmbee.export.sources import HashedSource, TensorSource, open_source
from cpmbee.export.weights import PRECISIONS, Precision
from cpmbee.folder import FORMAT, MANIFEST, SCHEMA_VERSION
from cpmbee.generation_config import GenerationConfig
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cpmbee.model import CpmBee
    from cpmbee.model.lora import LoraDelta

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
VOCABULARY_FILE = "vocab.txt"

Progress = Callable[[str, float], None]


def export(
    checkpoint: str | Path | CpmBee,
    out: str | Path,
    precision: Precision = "fp32",
    *,
    vocab: str | Path | None = None,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a CPM-Bee model as an ONNX model folder that `cpmbee.Engine` runs.

    The model is never instantiated: tensors go from file to file one at a time. The folder appears under its name only
    when it is complete and, with ``verify``, has been compared with the PyTorch reference.

    Args:
        checkpoint: a folder, weight file or shard index (`cpmbee.model.checkpoint.open_checkpoint`), or a live model.
        out: the folder to write.
        precision: of the stored matrices; "fp16" halves the file, computation stays fp32.
        vocab: the vocabulary, where none lies beside the checkpoint.
        lora: a delta to merge, or where to read it.
        lora_alpha: its alpha, where no configuration beside it says so.
        verify: compare the result with the reference (`cpmbee.export.verify`).
        overwrite: replace a model folder that an earlier export wrote to ``out``.
        progress: is told what is being done and how much of it is done, from 0 to 1.

    Raises:
        CheckpointError: the checkpoint or the delta is damaged or does not fit its configuration; names the tensor.
        ConfigError: the configuration or ``precision`` is wrong.
        VocabularyError: no vocabulary, or one that does not fit the model.
        ExportError: ``out`` cannot be written or must not be replaced, or verification does not hold.
        DependencyError: the checkpoint's format needs a package that is not installed.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    tell = progress or _tell_nobody
    started = time.perf_counter()
    source = open_source(checkpoint, lora, lora_alpha)
    vocab_file = _vocabulary(source, vocab)
    planned = graph.build_graph(source.config, precision)
    with staged_folder(Path(out), overwrite) as folder:
        require_space(folder, sum(tensor.nbytes + ALIGNMENT for tensor in planned.stored.values()))
        hashed = HashedSource(source)
        data_sha256 = _write_model(folder, planned, source.config, hashed, tell)
        shutil.copyfile(vocab_file, folder / VOCABULARY_FILE)
        _write_json(folder / "config.json", {**source.config.to_dict(), "torch_dtype": _torch_dtype(source.config)})
        _write_json(folder / "generation_config.json", GenerationConfig().to_dict())
        manifest = _manifest(folder, precision, source, hashed.hexdigest(), {DATA_FILE: data_sha256})
        _write_json(folder / MANIFEST, manifest)
        report = ExportReport(
            folder=Path(out),
            precision=precision,
            num_parameters=sum(tensor.size for tensor in planned.stored.values()),
            num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            source_sha256=hashed.hexdigest(),
            seconds=time.perf_counter() - started,
            verification=None,
        )
        if verify:
            from cpmbee.export import verification  # needs ONNX Runtime, which writing a model does not

            examined = verification.examine(folder, checkpoint, lora=lora, lora_alpha=lora_alpha, progress=tell)
            verification.require_passed(out, examined)
            report = replace(report, verification=examined)
        _write_json(folder / REPORT, report.to_dict())
    return report


def _tell_nobody(stage: str, fraction: float) -> None:
    """The progress of an export that nobody watches."""


def _vocabulary(source: TensorSource, vocab: str | Path | None) -> Path:
    """The vocabulary file to copy, checked.

    Raises:
        VocabularyError: there is none, or it does not fit the model.
    """
    path = source.vocab_file if vocab is None else Path(vocab)
    if path is None:
        raise VocabularyError("no vocab.txt lies beside the checkpoint; say where the vocabulary is (--vocab)")
    num_tokens = Tokenizer.from_file(path).vocab_size
    if num_tokens != source.config.vocab_size:
        raise VocabularyError(f"{path}: has {num_tokens} tokens, the model has {source.config.vocab_size}")
    return path


def _write_model(folder: Path, planned: GraphBuilder, config: ModelConfig, source: HashedSource, tell: Progress) -> str:
    """Stream the tensors and write the graph; returns the data file's hash."""
    total = sum(tensor.nbytes for tensor in planned.stored.values())
    initializers = []
    done = 0
    with DataFile(folder / DATA_FILE) as data:
        for tensor in planned.stored.values():
            tell("writing tensors", done / total)
            try:
                pieces = tensor.rows([source.read(name) for name in tensor.sources])
                initializers.append(data.append(tensor.name, tensor.shape, tensor.dtype, pieces))
            except OverflowError as error:
                raise CheckpointError(f"{', '.join(tensor.sources)}: {error}") from None
            done += tensor.nbytes
    model = graph.to_model(planned, config, initializers)
    model.producer_version = cpmbee.__version__
    onnx.save(model, folder / MODEL_FILE)
    tell("writing tensors", 1.0)
    return data.hexdigest()


def _manifest(
    folder: Path, precision: str, source: TensorSource, source_sha256: str, known_hashes: dict[str, str]
) -> dict[str, Any]:
    """The content of ``engine.json``."""
    config = source.config
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "precision": dict.fromkeys(("embedding", "attention", "ffn", "head"), precision),
        "cache": {
            "num_layers": len(config.attention_layers),
            "num_heads": config.num_attention_heads,
            "dim_head": config.dim_head,
            "dtype": "float32",
        },
        "ops": {"domain": DOMAIN, "version": DOMAIN_VERSION},
        "files": {
            file.name: {"size": file.stat().st_size, "sha256": known_hashes.get(file.name) or _sha256(file)}
            for file in sorted(folder.iterdir())
        },
        "source": {"sha256": source_sha256, "format": source.format},
        "created_with": {"cpmbee": cpmbee.__version__, "onnx": onnx.__version__},
    }


def _sha256(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _torch_dtype(config: ModelConfig) -> str:
    """What Hugging Face configurations call the precision a model was trained in."""
    return "float16" if config.half else "float32"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
