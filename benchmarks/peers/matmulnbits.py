"""ONNX Runtime's own quantized product: a model folder whose ``QuantizedLinear`` nodes are ``MatMulNBits``.

The weights are those of ``FOLDER`` (the same file, linked), in the order that ``MatMulNBits`` wants: ONNX Runtime turns
them once, when it loads the model. All else stays as it is, our attention kernel included, so a comparison of the two
folders compares the products and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmbee.bench.peers.other_product import OtherProduct, rewrite_folder
from cpmbee.bench.peers.protocol import MATMULNBITS_COPIES

if TYPE_CHECKING:
    import onnx


class MatMulNBits(OtherProduct):
    """ONNX Runtime's quantized product in our graph."""

    name = "matmulnbits"
    about = "our model folder with MatMulNBits, ONNX Runtime's own product, for ours; same weights and attention kernel"
    precisions = ("int4", "int8")
    copies = MATMULNBITS_COPIES

    @staticmethod
    def write(folder: Path, out: Path) -> None:
        """Put the body of ``QuantizedLinear`` in the place of every such node.

        Raises:
            FileExistsError: there is something called ``out``.
        """
        rewrite_folder(folder, out, _inlined)


def _inlined(model: onnx.ModelProto, files: dict[str, Any]) -> onnx.ModelProto:
    import onnx.inliner

    from cpmbee.export.functions import DOMAIN
    from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

    return onnx.inliner.inline_selected_functions(model, [(DOMAIN, QUANTIZED_LINEAR)])
