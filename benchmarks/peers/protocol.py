"""What a peer is: another engine, measured on a model as large as ours by the same kind of process."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpmbee.bench.cost import Operations
from cpmbee.bench.made import code_identity
from cpmbee.bench.plan import Subject, Workload
from cpmbee.config import ModelConfig

MATMULNBITS_COPIES = 4  # of the weights that ONNX Runtime holds while it packs them: read, turned, packed, given on
BLOCK = 32  # numbers that share a scale in the formats of peers; widths are made of whole blocks


class UnavailableError(Exception):
    """A peer that cannot be measured here; the message says why, and the run goes on without it."""


@dataclass(frozen=True)
class Target:
    """The model that a peer is to be compared on.

    Attributes:
        subject: our model folder.
        config: its configuration.
        checkpoint: what it was exported from, if that was named.
    """

    subject: Subject
    config: ModelConfig
    checkpoint: Path | None

    @property
    def shape(self) -> LlamaShape:
        """Of a Llama that is as large."""
        return LlamaShape.like(self.config)

    def label(self, engine: str) -> str:
        """What tables call the peer."""
        return f"{self.subject.label}: {engine}"


class Peer(ABC):
    """Another engine.

    Attributes:
        name: on the command line and in tables.
        precision: of its weights, where that does not follow our model's.
        is_llama: whether it runs a `LlamaShape` of random weights.
        about: what its numbers are, and where its model differs from ours; said beside the table.
    """

    name: str
    about: str
    precision: str | None = None
    is_llama = False

    @abstractmethod
    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Make its model in ``scratch`` unless it is there, and say how it is measured.

        Raises:
            UnavailableError: it is not installed, or has no such precision.
        """

    def can(self, workload: Workload) -> bool:
        """Whether the engine's measurement knows such a workload."""
        return workload.beams == 1


def require(package: str, distribution: str) -> None:
    """Raise `UnavailableError` unless a package can be imported."""
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed; pip install {distribution} brings it")


@dataclass(frozen=True)
class LlamaShape:
    """A Llama with as many weights as one of our models, for engines that have no CPM-Bee.

    It has our hidden size, feed-forward width, width of a head and vocabulary (tied to the output head, as ours is), a
    layer for each feed-forward block, and as many heads as make the number of weights equal, to a percent or two. Its
    matrices then have the shapes of ours.
    """

    hidden: int
    layers: int
    heads: int
    dim_head: int
    ff: int
    vocab: int
    eps: float

    @classmethod
    def like(cls, config: ModelConfig) -> LlamaShape:
        """The shape for a configuration of ours."""
        layers = len(config.ffn_layers)
        whole = BLOCK // math.gcd(BLOCK, config.dim_head)  # heads whose width is made of whole blocks
        heads = config.num_attention_heads * len(config.attention_layers) / layers
        heads = whole * max(1, round(heads / whole))
        return cls(config.hidden_size, layers, heads, config.dim_head, config.dim_ff, config.vocab_size, config.eps)

    @property
    def attention(self) -> int:
        """Width of all heads together."""
        return self.heads * self.dim_head

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the matrices of a layer."""
        return {
            "q": (self.attention, self.hidden),
            "k": (self.attention, self.hidden),
            "v": (self.attention, self.hidden),
            "o": (self.hidden, self.attention),
            "gate": (self.ff, self.hidden),
            "up": (self.ff, self.hidden),
            "down": (self.hidden, self.ff),
        }

    def with_heads_of(self, multiple: int) -> LlamaShape:
        """The same widths, divided into the smallest heads that are no smaller and a multiple of ``multiple`` wide."""
        widths = range(-(-self.dim_head // multiple) * multiple, self.attention + 1, multiple)
        dim_head = next((width for width in widths if self.attention % width == 0), self.dim_head)
        return replace(self, dim_head=dim_head, heads=self.attention // dim_head)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        layer = sum(rows * columns for rows, columns in self.layer_matrices.values()) + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden + self.hidden

    @property
    def operations(self) -> Operations:
        """Of reading a prompt; a token sees only those before it, half of all pairs."""
        matrices = sum(rows * columns for rows, columns in self.layer_matrices.values())
        return Operations(
            token=2.0 * self.layers * matrices,
            pair=2.0 * self.attention * self.layers,
            head=2.0 * self.vocab * self.hidden,
        )

    def origin(self, precision: str, *writers: str) -> dict[str, Any]:
        """What a model of random weights depends on: its shape, how it is stored, and the modules that write it."""
        return {"shape": asdict(self), "precision": precision, **code_identity(*writers)}

    def cache_bytes(self, rows: int, number_bytes: int) -> int:
        """Bytes of ``rows`` cached keys and values."""
        return 2 * self.layers * self.attention * number_bytes * rows


LLAMA_NOTE = (
    "random weights with our hidden size, feed-forward width, vocabulary (tied to the head) and number of weights: a "
    "layer for each of our feed-forward blocks, as many heads as make the sizes equal. It attends causally with rotary "
    "positions, where our tokens all see each other and a bias is looked up for every pair"
)
