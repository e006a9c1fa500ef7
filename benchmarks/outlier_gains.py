"""What channels far above the others cost a quantized model, with and without evening them out first.

``python -m cpmbee.bench.outlier_gains`` scales four in 128 channels of every block of the demo model by a gain and what
reads them by its inverse: the same function, with outliers behind norms, in attention's values, or inside the
feed-forward network. Each is exported to int8 and int4 as it is and evened out (`cpmbee.export.balance`), and its
divergence from fp32 measured on the requests that come with the model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cpmbee import native
from cpmbee.bench.environment import commit, write_result
from cpmbee.bench.fidelity import open_model
from cpmbee.bench.quality import divided, reference, write_jsonl
from cpmbee.export import exporter
from cpmbee.export.balance import Balance, blocks_of
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.quality import measure
from cpmbee.export.transcripts import Transcript, read_transcripts
from cpmbee.model.checkpoint import open_checkpoint
from cpmbee.tokenizer import Tokenizer

Place = Literal["norms", "values", "inner"]
PLACES: tuple[Place, ...] = ("norms", "values", "inner")
GAINS = (20.0, 40.0, 100.0)
SHARE = 32  # one channel of so many


def main() -> None:
    """Measure, print a Markdown table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gains", type=float, nargs="+", default=GAINS, help="of the channels")
    parser.add_argument("--count", type=int, default=250, help="requests to ask at most")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    measured_commit = commit()
    checkpoint = demo_checkpoint()
    asked, _ = divided(sorted(checkpoint.glob("*requests.jsonl")), None, arguments.count)
    config = open_checkpoint(checkpoint).config
    with tempfile.TemporaryDirectory() as name:
        file = write_jsonl(Path(name) / "asked.jsonl", asked)
        transcripts = read_transcripts(file, Tokenizer.from_file(checkpoint / "vocab.txt"), config)
        rows = list(measured(checkpoint, transcripts, arguments.gains, Path(name)))
    if not arguments.no_write:
        facts = {"commit": measured_commit, "requests": len(asked), "kernels": native.kernels()}
        write_result("outlier_gains", {**facts, "rows": rows})


def measured(
    checkpoint: Path, transcripts: list[Transcript], gains: list[float], scratch: Path
) -> Iterator[dict[str, Any]]:
    """One row for each model and precision, printed as it comes."""
    expected = reference(checkpoint, transcripts)
    print(
        "| outliers | gain | precision | KL as it is | evened out | right (%) as it is | evened out |\n"
        + "|---" * 7
        + "|"
    )
    cases: list[tuple[Place | None, float]] = [(None, 1.0), *((place, gain) for place in PLACES for gain in gains)]
    for place, gain in cases:
        model = checkpoint if place is None else with_outliers(checkpoint, scratch / "outliers", place, gain)
        for precision in ("int8", "int4"):
            found = []
            for balance in (lambda source, layout: None, Balance):
                with mock.patch.object(exporter, "Balance", balance):
                    exporter.export(model, scratch / "model", precision, verify=False, overwrite=True)
                found.append(measure(open_model(scratch / "model", transcripts), transcripts, expected))
            kl = [f"{quality.kl:.2e}" for quality in found]
            right = [f"{100 * (quality.accuracy or 0):.1f}" for quality in found]
            print("| " + " | ".join([place or "none", f"{gain:g}", precision, *kl, *right]) + " |", flush=True)
            facts = {"outliers": place, "gain": gain, "precision": precision}
            yield {**facts, "as_it_is": asdict(found[0]), "evened_out": asdict(found[1])}


def with_outliers(checkpoint: Path, out: Path, place: Place, gain: float, seed: int = 0) -> Path:
    """Write the same function with a few large channels in every block (fp32), and its vocabulary."""
    opened = open_checkpoint(checkpoint)
    tensors: dict[str, NDArray[Any]] = {name: opened.read(name).astype(np.float32) for name in opened.names()}
    rng = np.random.default_rng(seed)
    for block in blocks_of(opened.config):
        if place == "norms":
            channels = _some(rng, len(tensors[block.norm]))
            tensors[block.norm][channels] *= np.float32(gain)
            for name in block.readers:
                tensors[name][:, channels] /= np.float32(gain)
        elif (block.gate is None) == (place == "values"):
            channels = _some(rng, len(tensors[block.inner]))
            tensors[block.inner][channels] *= np.float32(gain)
            tensors[block.out][:, channels] /= np.float32(gain)
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    for name in ("config.json", "vocab.txt"):
        shutil.copy(checkpoint / name, out)
    return out


def _some(rng: np.random.Generator, channels: int) -> NDArray[np.int64]:
    return rng.choice(channels, max(1, channels // SHARE), replace=False)


if __name__ == "__main__":
    main()
