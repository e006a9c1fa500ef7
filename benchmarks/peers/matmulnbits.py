"""ONNX Runtime's own quantized product: a model folder whose ``QuantizedLinear`` nodes are ``MatMulNBits``.

    python -m cpmbee.bench.peers.matmulnbits FOLDER OUT

The weights are those of ``FOLDER`` (the same file, linked), in the order that ``MatMulNBits`` wants: ONNX Runtime turns
them once, when it loads the model. All else stays as it is, our attention kernel included, so a comparison of the two
folders compares the products and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import onnx
import onnx.inliner

from cpmbee.export.functions import DOMAIN
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR
from cpmbee.folder import MANIFEST

MODEL_FILE = "model.onnx"


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_folder(arguments.folder, arguments.out)


def write_folder(folder: Path, out: Path) -> None:
    """Put the body of ``QuantizedLinear`` in the place of every such node.

    Raises:
        FileExistsError: there is something called ``out``.
    """
    out.mkdir(parents=True)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if name != MODEL_FILE:
            os.link(folder / name, out / name)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    inlined = onnx.inliner.inline_selected_functions(model, [(DOMAIN, QUANTIZED_LINEAR)])
    content = inlined.SerializeToString()
    (out / MODEL_FILE).write_bytes(content)
    manifest["files"][MODEL_FILE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
