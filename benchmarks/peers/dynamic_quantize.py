"""ONNX Runtime's 8-bit product: a model folder whose ``QuantizedLinear`` nodes are ``DynamicQuantizeMatMul``.

    python -m cpmbee.bench.peers.dynamic_quantize FOLDER OUT

What ``FOLDER`` stores is quantized again, for this operator knows one scale per output where we have one per block, and
one scale and zero point for all activations of a call where we have a scale per token and block. All else stays as it
is, so a comparison of the two folders compares the products, in speed and in quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.bench.peers.other_product import MODEL_FILE, OtherProduct, rewrite_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from cpmbee.export.data_file import DataFile

DATA_FILE = "dynamic.data"
LARGEST = 127  # number of a weight


class DynamicQuantize(OtherProduct):
    """ONNX Runtime's 8-bit product in our graph."""

    name = "dynamic-quantize"
    about = (
        "our model folder with DynamicQuantizeMatMul for our product: our int8 weights, quantized again with one scale "
        "per output; same attention kernel"
    )
    precisions = ("int8",)
    copies = 2

    @staticmethod
    def write(folder: Path, out: Path) -> None:
        """See `write_folder`."""
        write_folder(folder, out)


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
    from cpmbee.export.data_file import DataFile
    from cpmbee.export.dequantized import external_tensors
    from cpmbee.export.functions import DOMAIN
    from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

    def exchange(model: onnx.ModelProto, files: dict[str, Any]) -> onnx.ModelProto:
        tensors = external_tensors(folder / MODEL_FILE)
        with DataFile(out / DATA_FILE) as data:
            for node in model.graph.node:
                if (node.domain, node.op_type) == (DOMAIN, QUANTIZED_LINEAR):
                    _exchange(node, model, tensors, data)
        read = {name for node in model.graph.node for name in node.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        files[DATA_FILE] = {"size": data.size, "sha256": data.hexdigest()}
        return model

    rewrite_folder(folder, out, exchange)


def _exchange(
    node: onnx.NodeProto, model: onnx.ModelProto, tensors: Mapping[str, NDArray[Any]], data: DataFile
) -> None:
    """Make one node the other operator and store its weights."""
    from onnx import helper

    from cpmbee.export.packing import BlockFormat
    from cpmbee.export.quantize import StoredMatrix

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
    for start in range(0, len(matrix), 64):  # rows that stay in the processor's cache while they are turned
        rows = slice(start, start + 64)
        numbers[:, rows] = np.rint(matrix[rows] * inverse[rows, None]).astype(np.int8).T
    return numbers, scales


if __name__ == "__main__":
    main()
