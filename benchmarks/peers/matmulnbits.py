"""ONNX Runtime's own quantized product: a model folder whose ``QuantizedLinear`` nodes are ``MatMulNBits``.

The weights are those of ``FOLDER`` (the same file, linked), in the order that ``MatMulNBits`` wants: ONNX Runtime turns
them once, when it loads the model. All else stays as it is, our attention kernel included, so a comparison of the two
folders compares the products and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from cpmbee.bench.peers.protocol import Peer, Target, UnavailableError, made_once, require
from cpmbee.bench.plan import Subject, Workload
from cpmbee.folder import MANIFEST

MODEL_FILE = "model.onnx"


class MatMulNBits(Peer):
    """ONNX Runtime's quantized product in our graph."""

    name = "matmulnbits"
    about = "our model folder with MatMulNBits, ONNX Runtime's own product, for ours; same weights and attention kernel"

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the folder unless it is there."""
        require("onnx", '"cpmbee[export]"')
        ours = target.subject
        if ours.precision not in ("int4", "int8"):
            raise UnavailableError("is for int4 and int8 weights")
        folder = made_once(scratch / f"{ours.label}-matmulnbits", lambda out: write_folder(ours.path, out))
        return replace(ours, label=target.label(self.name), engine=self.name, path=folder)

    def can(self, workload: Workload) -> bool:
        """Everything that our engine can."""
        return True


def write_folder(folder: Path, out: Path) -> None:
    """Put the body of ``QuantizedLinear`` in the place of every such node.

    Raises:
        FileExistsError: there is something called ``out``.
    """
    import onnx
    import onnx.inliner

    from cpmbee.export.functions import DOMAIN
    from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

    out.mkdir(parents=True)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if name != MODEL_FILE:
            link(folder / name, out / name)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    inlined = onnx.inliner.inline_selected_functions(model, [(DOMAIN, QUANTIZED_LINEAR)])
    content = inlined.SerializeToString()
    (out / MODEL_FILE).write_bytes(content)
    manifest["files"][MODEL_FILE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
