"""What a graph may hold, by the schema version of its folder: operators, and bodies of our own.

Code that makes other graphs extends the rules for its own use; a folder cannot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cpmbee.graph_operators import STANDARD, Operator
from cpmbee.graph_ops import DOMAIN, OWN, RUNTIME
from cpmbee.graph_proto import FLOAT, FLOAT16, UINT8, Attribute, Function, Reference, Tensor

Operators = Mapping[tuple[str, str], Operator]  # by domain and name
Bodies = Mapping[str, Mapping[str, tuple[str, ...]]]  # operator -> variant -> hashes


@dataclass(frozen=True)
class GraphRules:
    """What the graph of a model folder may hold.

    Attributes:
        operators: that its nodes may be.
        bodies: of operators in our domain, by what `body_hash` makes of them.
        dtypes: of tensors in the data file.
    """

    operators: Operators
    bodies: Bodies
    dtypes: frozenset[int]

    def extended(
        self,
        operators: Operators | None = None,
        bodies: Bodies | None = None,
        dtypes: frozenset[int] = frozenset(),
    ) -> GraphRules:
        """Rules that allow more; an operator that is there already is replaced."""
        return replace(
            self,
            operators={**self.operators, **(operators or {})},
            bodies={**self.bodies, **(bodies or {})},
            dtypes=self.dtypes | dtypes,
        )


def body_hash(function: Function) -> str:
    """What identifies a body: SHA-256 of all that a runtime reads of it but the version of our own domain."""
    opsets = sorted(pair for pair in function.opsets if pair[0] != DOMAIN)
    nodes = [
        (node.domain, node.op, node.inputs, node.outputs, sorted((n, _plain(v)) for n, v in node.attributes.items()))
        for node in function.nodes
    ]
    content = (function.domain, function.name, function.inputs, function.outputs, function.attributes, opsets, nodes)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _plain(value: Attribute) -> Any:
    """An attribute in what JSON has: other classes would make hashes depend on their names."""
    if isinstance(value, Tensor):
        data = None if value.data is None else value.data.hex()
        return ["tensor", value.name, value.dtype, value.dims, data, value.external]
    if isinstance(value, Reference):
        return ["attribute", value.name, value.type]
    return value


# Exports with versions 1 to 3 of the ops have written these. A body that changes adds a hash and keeps those of folders
# that exist.
_BODIES: Bodies = {
    "AddRMSNorm": {
        "": ("16e4ab6dcef6a3dd4c0c75ed565ffad39064ec8322a8cee0894a087f36e74745",),
    },
    "BucketedAttention": {
        "fp16": ("b27497e56ef47748956096b99f64c909be69eaa5bd6d6cec3349dabe434cead4",),
        "fp32": (
            "fa0b4bcd5b00dfd4bf84df60ac02c19835152cd3e43febc6b398e09839ad169d",
            "5aaca6d848ac9fb1c44f7865fbeb9868f9a0b7dc1cf89380df0cecee2aa98787",
        ),
        "int8": ("3dd1c1fed2e03fd278c69744662ee06b31d012190e7cfcafdea4e8554e1eef7a",),
    },
    "BucketedPositionBias": {
        "": (
            "48f8d60c1b1d1c93fb2d3d2ffefd8d799f9f9495369881770ae60e64a0c86888",
            "2c3e813cc804855922847cfa0ebf38a05c0363139988fec10a9d2e7808ae7d58",
        ),
    },
    "ExactLinear": {
        "4": ("9468ceb336a2716f306c72a5c508a13e92572fe6e62a976ef0dc0266723ce0ce",),
        "8": ("3dc47ee72d3f7e50f89ce8ff976bb1ac42b81d232f0f09b8e86196aae48953ab",),
    },
    "GatedGelu": {
        "": ("58ff6e61f021fc987eb991255e5a2f409d38fb84d087e86cfdfacdfbe8da91b9",),
    },
    "QuantizedEmbedding": {
        "4": ("e7e1b5e435cce8f1d1937b326b397f7266198ba47bf35e1d42a96fdd97b2d0c3",),
        "8": ("de3465136834fdb7068f7b1fa4a2592dc8867a373220f7b6ff3f1fa9e29c1dd6",),
    },
    "QuantizedLinear": {
        "": (
            "da8d058544efb56da7c4c3f86c5df771e56227718bf3789f714b443dde99a176",
            "dae8f9673b0a3b461af625e549cef9e1f3b94b825d6c67ebe3c0838a021343a4",
        ),
    },
    "RMSNorm": {
        "": ("7e8b1a4877a36ac307f66b6595cc0afa28e47577e32ea745c1b72bfd9a60b4bc",),
    },
    "SubscriptRotation": {
        "0": ("f232e4296678894e2f96ba67924faeb53119d5ccaf8b8c497f959dbf4bdb3384",),
        "1": ("6019f7497d65877c69e23c633e31cb3c4e30ad2226447c3cd24772a1a960ee48",),
    },
}
RULES: dict[int, GraphRules] = {
    1: GraphRules({**STANDARD, **OWN, **RUNTIME}, _BODIES, frozenset((FLOAT, FLOAT16, UINT8))),
}
