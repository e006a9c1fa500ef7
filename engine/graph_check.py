"""Whether a graph is one that an export may have written: then nothing in it can harm the runtime that loads it.

Types and shapes of all values are worked out from the configuration and the operators' rules. So what a node computes
is bounded by the model's own sizes, whatever the folder says.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cpmbee.cache_types import CacheType, cache_names
from cpmbee.config import ModelConfig
from cpmbee.graph_operators import MAX_RANK, Call, Operator
from cpmbee.graph_ops import CONTRIB, DOMAIN, PRESENT, cache_value
from cpmbee.graph_proto import FLOAT, INT16, INT32, INT64, ITEM_SIZES, Model, Node, Tensor, ValueInfo
from cpmbee.graph_rules import GraphRules, body_hash
from cpmbee.graph_values import Size, Value, product, shown, total

IR_VERSION, OPSET, CONTRIB_VERSION = 9, 18, 1
INPUTS: dict[str, tuple[int, str]] = {  # dtype, and a symbol for each axis
    "input_ids": (INT32, "BQ"),
    "input_subs": (INT32, "BQ"),
    "relation": (INT16, "BQK"),
    "slots": (INT32, "BK"),
    "new_slots": (INT32, "BQ"),
    "logits_index": (INT32, "BR"),
    "ext_ids": (INT32, "E"),
    "ext_subs": (INT32, "E"),
}
LOGITS = "logits"
_LAST_OF_LOGITS = "V_plus_E"
_READERS = 3  # of a matrix: that of the embedding is read for tokens, for extension tokens and as the head
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_./]*")  # those that a runtime makes up itself begin with an underscore
_LONGEST_NAME = 200


def check_graph(model: Model, config: ModelConfig, cache: CacheType, ops_version: int, rules: GraphRules) -> None:
    """Refuse a model whose graph no export writes for a configuration.

    Args:
        model: what the file holds.
        config: of the model.
        cache: how its cache rows are stored.
        ops_version: the newest of our own operators.
        rules: what it may hold.

    Raises:
        ValueError: says what is wrong, and at which node.
    """
    own = dict(model.opsets).get(DOMAIN, 0)
    opsets = [("", OPSET), (CONTRIB, CONTRIB_VERSION), (DOMAIN, own)]
    if model.ir_version != IR_VERSION or not 1 <= own <= ops_version or sorted(model.opsets) != opsets:
        raise ValueError(f"it is written in IR version {model.ir_version} with operator sets {dict(model.opsets)}")
    _Checker(model, config, cache, rules).check()


class _Checker:
    """Goes through a graph once, node by node, with all values that are known so far."""

    def __init__(self, model: Model, config: ModelConfig, cache: CacheType, rules: GraphRules) -> None:
        self.model = model
        self.config = config
        self.cache = cache
        self.rules = rules
        self.values: dict[str, Value] = {}
        self.blocks = len(config.attention_layers) + len(config.ffn_layers)
        self.nodes: Counter[tuple[str, str]] = Counter()  # so far, by operator
        self.readers: Counter[tuple[str, bool]] = Counter()  # of matrices of the file, those that cast it apart
        self.variants = self._variants()
        width = max(3 * config.attention_dim, 2 * config.dim_ff, config.hidden_size)
        self.width = width  # of what there is for every token
        self.row_width = max(width, config.vocab_size)  # of what there is only where logits are wanted
        logits = total(Size(config.vocab_size), Size(1, ("E",)))
        self.symbols = {"B", "Q", "R", "E", *logits.symbols}
        self.logits = Value(FLOAT, (Size(1, ("B",)), Size(1, ("R",)), logits))

    def check(self) -> None:
        inputs = {name: Value(dtype, _symbols(axes), source=name) for name, (dtype, axes) in INPUTS.items()}
        inputs |= {name: cache_value(name, self.config, self.cache) for name in cache_names(self.config, self.cache)}
        outputs = {LOGITS: self.logits}
        outputs |= {f"{PRESENT}{name}": value for name, value in inputs.items() if name not in INPUTS}
        _check_declared(self.model.inputs, inputs, "input")
        _check_declared(self.model.outputs, outputs, "output")
        for name, value in inputs.items():
            self._define(name, value)
        for tensor in self.model.initializers:
            self._define(tensor.name, _stored(tensor, self.rules, self.config))
        for node in self.model.nodes:
            try:
                self._node(node)
            except ValueError as error:
                raise ValueError(f"node {node.op} ({', '.join(node.outputs)[:_LONGEST_NAME]}): {error}") from None
        for name, value in outputs.items():
            found = self.values.get(name)
            if found is None or found[:2] != value[:2]:
                raise ValueError(f"output {name} is {found and shown(found.shape)} and should be {shown(value.shape)}")

    def _variants(self) -> dict[str, str]:
        """For each operator that the file has a body of, which of ours it is."""
        variants = {}
        for function in self.model.functions:
            known = self.rules.bodies.get(function.name, {}) if function.domain == DOMAIN else {}
            found = body_hash(function)
            variant = next((variant for variant, hashes in known.items() if found in hashes), None)
            if variant is None or function.name in variants:
                raise ValueError(f"function {function.name[:_LONGEST_NAME]} is not one that an export writes")
            variants[function.name] = variant
        return variants

    def _define(self, name: str, value: Value) -> None:
        if name in self.values:
            raise ValueError(f"two values are called {name}")
        if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            raise ValueError(f"a value is called {name[:_LONGEST_NAME]!r}")
        self.values[name] = value

    def _node(self, node: Node) -> None:
        operator = self.rules.operators.get((node.domain, node.op))
        if operator is None:
            raise ValueError(f"no export writes this operator of domain {node.domain!r}")
        _check_form(node, operator)
        kind = (node.domain, node.op)
        self.nodes[kind] += 1
        if self.nodes[kind] > operator.per_block * self.blocks + operator.beside:
            raise ValueError(f"{self.nodes[kind]} of them are too many for {self.blocks} blocks")
        inputs = []
        for place, name in enumerate(node.inputs):
            value = self.values.get(name)
            if value is None:
                raise ValueError(f"its input {name[:_LONGEST_NAME]!r} is not there yet")
            if value.stored and len(value.shape) > 1 and not operator.keeps_rows:
                self._count_reader(node, name)
            if place not in operator.either and value.stored != (place in operator.stored):
                raise ValueError(f"its input {name} is {'' if value.stored else 'not '}a tensor of the file")
            inputs.append(value)
        call = Call(node, tuple(inputs), self.config, self.cache)
        if node.domain == DOMAIN:
            variant = operator.variant(call) if operator.variant else ""
            if self.variants.get(node.op) != variant:
                raise ValueError(f"the file has no body for it{variant and f' that is made for {variant}'}")
        values = operator.infer(call)
        for name, value in zip(node.outputs, values, strict=True):
            if (value is None) != (not name):
                raise ValueError(f"its outputs are {', '.join(node.outputs)}")
            if value is not None:
                if not value.stored and not (operator.keeps_rows and name.startswith(PRESENT)):
                    self._check_size(value)
                self._define(name, value)

    def _count_reader(self, node: Node, name: str) -> None:
        """Refuse a matrix that is computed with, or copied into another type, over and over."""
        casts = node.op == "Cast"
        self.readers[name, casts] += 1
        if self.readers[name, casts] > (1 if casts else _READERS):
            raise ValueError(f"{name} is read by too many nodes")

    def _check_size(self, value: Value) -> None:
        """Refuse what is larger than anything that the model computes."""
        whole = product(value.shape)
        width = self.width if "Q" in whole.symbols else self.row_width
        if (
            len(value.shape) > MAX_RANK
            or not self.symbols.issuperset(whole.symbols)
            or len(set(whole.symbols)) < len(whole.symbols)
            or whole.number > width
        ):
            raise ValueError(f"it computes {shown(value.shape)}, which is nothing of this model")


def _symbols(axes: Iterable[str]) -> tuple[Size, ...]:
    return tuple(Size(1, (axis,)) for axis in axes)


def _check_declared(declared: Sequence[ValueInfo], expected: Mapping[str, Value], what: str) -> None:
    """Refuse inputs or outputs that are not those which the engine binds."""
    found = {value.name: value for value in declared}
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"the graph has no {what} {', '.join(missing[:9])}")
    if len(declared) > len(expected):
        extra = next((name for name in found if name not in expected), "one twice")
        raise ValueError(f"the graph has an {what} too many, {extra[:_LONGEST_NAME]}")
    for name, value in expected.items():
        dims = tuple(size.symbols[0] if size.symbols else size.number for size in value.shape)
        if name == LOGITS:
            dims = (*dims[:-1], _LAST_OF_LOGITS)
        if found[name][1:] != (value.dtype, dims):
            raise ValueError(f"its {what} {name} is declared as {found[name].dims}, and should be {dims}")


def _check_form(node: Node, operator: Operator) -> None:
    """Refuse a node with other attributes or other numbers of inputs and outputs than its operator has."""
    for what, names, allowed in (("inputs", node.inputs, operator.inputs), ("outputs", node.outputs, operator.outputs)):
        if len(names) != allowed and not (isinstance(allowed, tuple) and len(names) in allowed):
            raise ValueError(f"it has {len(names)} {what}")
    if operator.attributes is None:
        return
    if node.attributes.keys() != operator.attributes.keys():
        raise ValueError(f"it has the attributes {', '.join(sorted(node.attributes))[:_LONGEST_NAME] or 'none'}")
    for name, kind in operator.attributes.items():
        if type(node.attributes[name]) is not kind:
            raise ValueError(f"its attribute {name} is of another type")


def _stored(tensor: Tensor, rules: GraphRules, config: ModelConfig) -> Value:
    """What a tensor of the file is; where the data of an external one lies is looked at elsewhere."""
    shape = tuple(map(Size, tensor.dims))
    if tensor.external:
        if tensor.dtype not in rules.dtypes or not 1 <= len(shape) <= MAX_RANK or min(tensor.dims) < 1:
            raise ValueError(f"tensor {tensor.name[:_LONGEST_NAME]} has type {tensor.dtype} and shape {shown(shape)}")
        return Value(tensor.dtype, shape, stored=True, source=tensor.name)
    numbers = tensor.dims[0] if tensor.dims else 1
    size = len(tensor.data or b"")
    if (
        tensor.dtype not in (FLOAT, INT64)
        or len(shape) > 1
        or not 1 <= numbers <= config.hidden_size
        or size != numbers * ITEM_SIZES[tensor.dtype]
    ):
        raise ValueError(
            f"tensor {tensor.name[:_LONGEST_NAME]} has type {tensor.dtype}, shape {shown(shape)} and {size} bytes in "
            "the graph"
        )
    content = None
    if tensor.dtype == INT64 and shape:
        content = tuple(map(Size, struct.unpack(f"<{numbers}q", tensor.data or b"")))
    return Value(tensor.dtype, shape, content, stored=True, source=tensor.name)
