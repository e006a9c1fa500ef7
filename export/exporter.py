"""From a checkpoint to a model folder: the one function behind ``cpmbee export``."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

import cpmbee
from cpmbee.cache_types import CACHE_TYPES, CacheType
from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError, ConfigError, DependencyError, ExportError, VocabularyError
from cpmbee.export.balance import Balance
from cpmbee.export.builder import GraphBuilder
from cpmbee.export.data_file import ALIGNMENT, DataFile
from cpmbee.export.error_feedback import Moments
from cpmbee.export.folder import REPORT, require_space, staged_folder
from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION
from cpmbee.export.graph import build_graph
from cpmbee.export.model_proto import to_model
from cpmbee.export.packing import BITS, BLOCK_SIZES, BlockFormat
from cpmbee.export.quantize import DEFAULT_BLOCK_SIZE, DEFAULT_HEAD_BITS, METHODS, Method, Quantization
from cpmbee.export.report import ExportReport, MatrixError
from cpmbee.export.sources import HashedSource, TensorSource, open_source
from cpmbee.export.transcripts import read_requests
from cpmbee.export.weights import PRECISIONS, QUANTIZED, Precision
from cpmbee.folder import DEFAULTS, FORMAT, MANIFEST, SCHEMA_VERSION, cache_layout, require_utf8
from cpmbee.generation_config import GenerationConfig
from cpmbee.model.tensor_names import expected_tensors
from cpmbee.outputs import require_apart
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
    block_size: int = DEFAULT_BLOCK_SIZE,
    head_bits: int = DEFAULT_HEAD_BITS,
    method: Method = "search",
    calibration: str | Path | None = None,
    exact_activations: Sequence[int] | Literal["auto"] = (),
    cache: CacheType | None = None,
    vocab: str | Path | None = None,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    verify: bool = True,
    quality: str | Path | None = None,
    generation_config: GenerationConfig | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a CPM-Bee model as an ONNX model folder that `cpmbee.Engine` runs.

    The model is never instantiated: tensors go from file to file one at a time. The folder appears under its name only
    when it is complete and, with ``verify``, has been compared with the PyTorch reference.

    Args:
        checkpoint: a folder, weight file or shard index (`cpmbee.model.checkpoint.open_checkpoint`), or a live model.
        out: the folder to write.
        precision: of the stored matrices. "fp16" halves the file, computation stays fp32; "int8" and "int4" are
            quantized, and compute with int8 activations.
        block_size: of quantized matrices, inputs that share a scale: 32, 64 or 128.
        head_bits: of the quantized embedding, which is the head as well: 4 or 8.
        method: "search" picks the scale of each block for the least squared error, "nearest" from its largest weight.
        calibration: JSON Lines of requests, best with their answers filled in, for "int8" and "int4" with "search",
            which then corrects what rounding does to each matrix by the inputs that it has in these requests
            (`cpmbee.export.error_feedback`). Runs the PyTorch reference, one layer in memory at a time.
        exact_activations: numbers of layers whose products take activations in fp32, for "int8" and "int4"; those
            layers keep 4 bytes a weight in memory. "auto" measures what rounding costs in each layer, and takes those
            where it costs far more than in the others (`cpmbee.export.activation_errors`).
        cache: how the model keeps keys and values of earlier tokens: "fp32", "fp16", or "int8" with a scale for each
            token and head. Computation stays fp32. None is fp32 for precision "fp32", else fp16.
        vocab: the vocabulary, where none lies beside the checkpoint.
        lora: a delta to merge, or where to read it.
        lora_alpha: its alpha, where no configuration beside it says so.
        verify: compare the result with the reference (`cpmbee.export.verify`).
        quality: JSON Lines of requests with their answers: verification then measures how far the export's answers
            are from those of fp32.
        generation_config: the folder's defaults of generation, which its user may edit later; None for those of
            `GenerationConfig`.
        overwrite: replace a model folder that an earlier export wrote to ``out``.
        progress: is told what is being done and how much of it is done, from 0 to 1.

    Raises:
        CheckpointError: the checkpoint or the delta is damaged or does not fit its configuration; names the tensor.
        ConfigError: the configuration or an option is wrong, or a file of requests has a line that is none.
        VocabularyError: no vocabulary, or one that does not fit the model.
        ModelFolderError: the path ``out`` is not UTF-8, so that nobody could load the folder.
        ExportError: ``out`` cannot be written or must not be replaced, or verification does not hold.
        DependencyError: the checkpoint's format or the calibration needs a package that is not installed.
    """
    cache = cache or ("fp32" if precision == "fp32" else "fp16")
    _check_options(precision, block_size, head_bits, method, cache)
    require_utf8(Path(out))
    given = [Path(path) for path in (checkpoint, vocab, lora, calibration, quality) if isinstance(path, str | Path)]
    require_apart([Path(out)], given, ExportError)
    if calibration is not None and (precision not in QUANTIZED or method != "search"):
        raise ConfigError(f"calibration is for int8 and int4 with method search, not for {precision} with {method}")
    if exact_activations and precision not in QUANTIZED:
        raise ConfigError(f"exact activations are for int8 and int4, not for {precision}, which rounds none")
    if quality is not None:
        if not verify:
            raise ConfigError("quality is measured by the verification, which was not asked for")
        read_requests(quality)  # before anything is written
    tell = progress or _tell_nobody
    started = time.perf_counter()
    source = open_source(checkpoint, lora, lora_alpha)
    vocab_file = _vocabulary(source, vocab)
    quantization = None
    if precision in QUANTIZED:
        moments = None
        if calibration is not None:
            tell("calibrating", 0.0)
            moments = _calibrated(source, vocab_file, calibration)
        balance = Balance(source, BlockFormat(QUANTIZED[precision], block_size))
        quantization = Quantization(QUANTIZED[precision], head_bits, block_size, method, moments, balance)
        if exact_activations != "auto":
            quantization = replace(quantization, exact_layers=_layers(source.config, exact_activations))
    planned = build_graph(source.config, precision, quantization, cache)
    with staged_folder(Path(out), overwrite) as folder:
        require_space(folder, sum(tensor.nbytes + ALIGNMENT for tensor in planned.stored.values()))
        hashed = HashedSource(source)
        data_sha256, tensors = _write_tensors(folder, planned, hashed, tell)
        _write_graph(folder, planned, source.config, tensors, cache)
        shutil.copyfile(vocab_file, folder / VOCABULARY_FILE)
        if quantization is not None and exact_activations == "auto":
            from cpmbee.export.activation_errors import layers_that_need_exact  # needs ONNX Runtime

            tell("measuring activations", 0.0)
            tokenizer = Tokenizer.from_file(vocab_file)
            layers = layers_that_need_exact(folder / MODEL_FILE, source.config, tokenizer)
            quantization = replace(quantization, exact_layers=layers)
            again = build_graph(source.config, precision, quantization, cache)  # the same tensors, other nodes
            _write_graph(folder, again, source.config, tensors, cache)
        _write_json(folder / "config.json", {**source.config.to_dict(), "torch_dtype": _torch_dtype(source.config)})
        _write_json(folder / DEFAULTS, (generation_config or GenerationConfig()).to_dict())
        known = {DATA_FILE: data_sha256}
        manifest = _manifest(folder, precision, quantization, cache, source, hashed.hexdigest(), known)
        _write_json(folder / MANIFEST, manifest)
        report = ExportReport(
            folder=Path(out),
            precision=precision,
            cache=cache,
            num_parameters=sum(map(math.prod, expected_tensors(source.config).values())),
            num_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            source_sha256=hashed.hexdigest(),
            seconds=time.perf_counter() - started,
            verification=None,
            matrices=tuple(MatrixError(m.name, m.layout.bits, m.error or 0.0) for m in planned.quantized),
        )
        if verify:
            from cpmbee.export import verification  # needs ONNX Runtime, which writing a model does not

            examined = verification.examine(
                folder, checkpoint, lora=lora, lora_alpha=lora_alpha, quality=quality, progress=tell
            )
            verification.require_passed(out, examined)
            report = replace(report, verification=examined)
        _write_json(folder / REPORT, report.to_dict())
    return report


def _tell_nobody(stage: str, fraction: float) -> None:
    """The progress of an export that nobody watches."""


def _check_options(precision: str, block_size: int, head_bits: int, method: str, cache: str) -> None:
    """Refuse options that do not exist.

    Raises:
        ConfigError: names the option and what it can be.
    """
    for name, value, allowed in (
        ("precision", precision, PRECISIONS),
        ("block size", block_size, BLOCK_SIZES),
        ("head bits", head_bits, BITS),
        ("method", method, METHODS),
        ("cache", cache, CACHE_TYPES),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def _layers(config: ModelConfig, wanted: Sequence[int]) -> frozenset[int]:
    """Layers by their numbers.

    Raises:
        ConfigError: the model has no such layer; names it.
    """
    for layer in wanted:
        if layer not in range(config.num_hidden_layers):
            last = config.num_hidden_layers - 1
            raise ConfigError(f"exact activations: there is no layer {layer}; the model has 0 to {last}")
    return frozenset(wanted)


def _calibrated(source: TensorSource, vocab_file: Path, requests: str | Path) -> Callable[[str], Moments]:
    """What the inputs of each matrix look like in some requests.

    Raises:
        DependencyError: torch is not installed.
    """
    try:
        from cpmbee.export.calibration import Calibration
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise DependencyError('calibration needs torch: pip install "cpmbee[torch]"') from None
    return Calibration(source, Tokenizer.from_file(vocab_file), requests).moments


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
        padded = f"; if the last are padding, set vocab_size in its config.json to {num_tokens}"
        raise VocabularyError(
            f"{path}: has {num_tokens} tokens, the model has {source.config.vocab_size}"
            + (padded if num_tokens < source.config.vocab_size else "")
        )
    return path


def _write_tensors(
    folder: Path, planned: GraphBuilder, source: HashedSource, tell: Progress
) -> tuple[str, list[onnx.TensorProto]]:
    """Stream the tensors; returns the data file's hash, and where each tensor is."""
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
    tell("writing tensors", 1.0)
    return data.hexdigest(), initializers


def _write_graph(
    folder: Path, planned: GraphBuilder, config: ModelConfig, tensors: list[onnx.TensorProto], cache: CacheType
) -> None:
    """Write ``model.onnx``."""
    model = to_model(planned, config, tensors, cache)
    model.producer_version = cpmbee.__version__
    onnx.save(model, folder / MODEL_FILE)


def _manifest(
    folder: Path,
    precision: str,
    quantization: Quantization | None,
    cache: CacheType,
    source: TensorSource,
    source_sha256: str,
    known_hashes: dict[str, str],
) -> dict[str, Any]:
    """The content of ``engine.json``."""
    by_group = dict.fromkeys(("embedding", "attention", "ffn", "head"), precision)
    quantized = {}
    if quantization is not None:
        by_group.update(dict.fromkeys(("embedding", "head"), f"int{quantization.head_bits}"))
        quantized = {
            "quantization": {
                "block_size": quantization.block_size,
                "method": quantization.method,
                "calibrated": quantization.calibration is not None,
                "activations": "int8",
                **({"exact_layers": sorted(quantization.exact_layers)} if quantization.exact_layers else {}),
            }
        }
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "precision": by_group,
        **quantized,
        "cache": cache_layout(source.config, cache),
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
