"""ONNX Runtime's 8-bit product: a model folder whose ``QuantizedLinear`` nodes are ``DynamicQuantizeMatMul``.

    python -m cpmbee.bench.peers.dynamic_quantize FOLDER OUT

What ``FOLDER`` stores is quantized again, for this operator knows one scale per output where we have one per block, and
one scale and zero point for all activations of a call where we have a scale per token and block. All else stays as it
is, so a comparison of the two folders compares the products, in speed and in quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.bench.peers.matmulnbits import link
from cpmbee.bench.peers.protocol import Peer, Target, UnavailableError, made_once, require
from cpmbee.bench.plan import Subject, Workload
from cpmbee.folder import MANIFEST

if TYPE_CHECKING:
    import onnx

    from cpmbee.export.data_file import DataFile

MODEL_FILE = "model.onnx"
DATA_FILE = "dynamic.data"
LARGEST = 127  # number of a weight


class DynamicQuantize(Peer):
    """ONNX Runtime's 8-bit product in our graph."""

    name = "dynamic-quantize"
    about = (
        "our model folder with DynamicQuantizeMatMul for our product: our int8 weights, quantized again with one scale "
        "per output; same attention kernel"
    )

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the folder unless it is there."""
        require("onnx", '"cpmbee[export]"')
        ours = target.subject
        if ours.precision != "int8":
            raise UnavailableError("is for int8 weights")
        folder = made_once(scratch / f"{ours.label}-{self.name}", lambda out: write_folder(ours.path, out))
        return replace(ours, label=target.label(self.name), engine=self.name, path=folder)

    def can(self, workload: Workload) -> bool:
        """Everything that our engine can."""
        return True


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_folder(arguments.folder, arguments.out)


def write_folder(folder: Path, out: Path) -> None:
    """Put ``DynamicQuantizeMatMul`` in the place of every ``QuantizedLinear``.

    Raises:
        FileExistsError: there is something called ``out``.
    """
    import onnx

    from cpmbee.export.data_file import DataFile
    from cpmbee.export.functions import DOMAIN
    from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

    out.mkdir(parents=True)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if name != MODEL_FILE:
            link(folder / name, out / name)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    with DataFile(out / DATA_FILE) as data:
        for node in model.graph.node:
            if (node.domain, node.op_type) == (DOMAIN, QUANTIZED_LINEAR):
                _exchange(node, model, folder, data)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    content = model.SerializeToString()
    (out / MODEL_FILE).write_bytes(content)
    manifest["files"][MODEL_FILE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][DATA_FILE] = {"size": data.size, "sha256": data.hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _exchange(node: onnx.NodeProto, model: onnx.ModelProto, folder: Path, data: DataFile) -> None:
    """Make one node the other operator and store its weights."""
    from onnx import helper

    from cpmbee.export.dequantized import external_tensors
    from cpmbee.export.packing import BlockFormat
    from cpmbee.export.quantize import StoredMatrix

    tensors = external_tensors(folder / MODEL_FILE)
    value, packed, scales = node.input
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    layout = BlockFormat(attributes["bits"], attributes["block_size"])
    stored = StoredMatrix(tensors[packed], tensors[scales], layout, attributes["in_features"])
    names = (f"{packed}/dynamic", f"{packed}/dynamic_scales")
    for name, array in zip(names, by_output(stored.rows(0, attributes["out_features"])), strict=True):
        model.graph.initializer.append(data.append(name, array.shape, array.dtype, [array]))
    made = helper.make_node("DynamicQuantizeMatMul", [value, *names], node.output, node.name, domain="com.microsoft")
    node.CopyFrom(made)


def by_output(matrix: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A matrix (outputs, inputs) as int8 (inputs, outputs) and one scale for each output."""
    scales = np.abs(matrix).max(1) / np.float32(LARGEST)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    numbers = np.empty(matrix.shape[::-1], np.int8)
    for start in range(0, len(matrix), 1024):
        rows = slice(start, start + 1024)
        numbers[:, rows] = np.rint(matrix[rows] * inverse[rows, None]).T
    return numbers, scales


if __name__ == "__main__":
    main()
