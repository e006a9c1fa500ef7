"""The reference with the weights that an exported file stores: the whole model, or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmbee.config import ModelConfig
from cpmbee.export.comparison import Call, all_ext, plan
from cpmbee.export.memory import fp32_bytes
from cpmbee.export.probes import GraphInputs, Probe
from cpmbee.export.reference import ReferenceBackend, ReferenceRunner
from cpmbee.export.sources import TensorSource
from cpmbee.export.weights import Precision
from cpmbee.model.cpmbee import CpmBee, ExtendedEmbedding
from cpmbee.model.layers import BucketedBias, Layer, RMSNorm
from cpmbee.model.tensor_names import EMBEDDING, is_linear
from cpmbee.model.torch_threads import suited_threads, torch_threads

Module = TypeVar("Module", bound=nn.Module)
Progress = Callable[[str, float], None]


class ReferenceModel:
    """The reference with a cache, called like the graph."""

    def __init__(self, model: CpmBee, cache_rows: int) -> None:
        self._vocab_size = model.config.vocab_size
        self._runner = ReferenceRunner(ReferenceBackend(model, cache_rows))

    def run(self, inputs: GraphInputs) -> NDArray[np.float32]:
        """Logits (B, R, V + E); the new tokens' keys and values go into the cache."""
        for name, array in inputs._asdict().items():
            setattr(self._runner, name, array)
        logits = np.empty((*inputs.logits_index.shape, self._vocab_size + len(inputs.ext_ids)), np.float32)
        self._runner.logits = logits
        self._runner.run()
        return logits


def few_threads(config: ModelConfig) -> AbstractContextManager[None]:
    """Let torch compute a small model on one thread: its many small steps lose more in waiting than they gain."""
    return torch_threads(suited_threads(fp32_bytes(config) // 4))


def load_reference(source: TensorSource, precision: Precision) -> CpmBee:
    """The fp32 reference; for an fp16 file its matrices are rounded like the file's.

    Those of a quantized file come rounded from their source (`cpmbee.export.dequantized.DequantizedSource`).
    """
    return _filled(lambda: CpmBee(source.config), source, "", precision)


@torch.no_grad()
def record_streamed(
    source: TensorSource, precision: Precision, probes: Sequence[Probe], steps: int, tell: Progress | None = None
) -> list[Call]:
    """What the reference says to the calls of `cpmbee.export.comparison.plan`, with one layer in memory at a time.

    It reads each probe once, with all of its tokens: none of them sees what comes after it.
    """
    plans = plan(probes, steps)
    whole = [probe.inputs(0, all_ext(probes)) for probe in probes]
    hidden = stream_layers(source, precision, whole, tell=tell)
    embedding = load_embedding(source, precision)
    calls = []
    for kind, inputs, places in plans:
        index = _tensor(inputs.logits_index).long()
        selected = torch.stack([hidden[n][0, first + row] for (n, first), row in zip(places, index, strict=True)])
        calls.append(Call(kind, inputs, _logits(embedding, selected, inputs)))
    return calls


def streamed_logits(source: TensorSource, inputs: Sequence[GraphInputs], tell: Progress) -> Iterator[NDArray[Any]]:
    """The fp32 reference's logits (R, V + E) for each call of one sequence, one layer in memory at a time."""
    hidden = stream_layers(source, "fp32", inputs, tell=tell)
    embedding = load_embedding(source, "fp32")
    indices = (_tensor(call.logits_index)[0].long() for call in inputs)
    return (_logits(embedding, h[0, i], call) for h, i, call in zip(hidden, indices, inputs, strict=True))


def load_embedding(source: TensorSource, precision: Precision) -> ExtendedEmbedding:
    """The embedding, which is the head as well."""
    return _filled(lambda: ExtendedEmbedding(source.config), source, "input_embedding.", precision)


@torch.no_grad()
def stream_layers(
    source: TensorSource,
    precision: Precision,
    inputs: Sequence[GraphInputs],
    tell: Progress | None = None,
) -> list[Tensor]:
    """Run calls of one sequence each through the model, layer by layer.

    Args:
        source: of the weights.
        precision: that the matrices are rounded to.
        inputs: calls that read everything; no cache is kept.
        tell: is told how much is done.

    Returns:
        For each call the hidden state after the final norm, (1, Q, D).
    """
    hidden = embedded(source, precision, inputs)
    for layer, _ in enumerate(layer_steps(source, precision, inputs, hidden)):
        if tell is not None:
            tell("running the reference", layer / source.config.num_hidden_layers)
    config = source.config
    norm = _filled(lambda: RMSNorm(config.hidden_size, config.eps), source, "encoder.output_layernorm.", precision)
    return [norm(h) for h in hidden]


@torch.no_grad()
def embedded(source: TensorSource, precision: Precision, inputs: Sequence[GraphInputs]) -> list[Tensor]:
    """The hidden state of each call in front of the first layer, (1, Q, D)."""
    embedding = load_embedding(source, precision)  # the largest tensor of all: not kept
    return [embedding(_tensor(call.input_ids), _tensor(call.input_subs)) for call in inputs]


def layer_steps(
    source: TensorSource,
    precision: Precision,
    inputs: Sequence[GraphInputs],
    hidden: list[Tensor],
    watch: Callable[[nn.Module, str], None] | None = None,
) -> Iterator[None]:
    """Replace hidden states in front of the first layer by those behind each layer in turn.

    Args:
        source: of the weights.
        precision: that the matrices are rounded to.
        inputs: calls of one sequence each that read everything; no cache is kept.
        hidden: their hidden states, (1, Q, D) each.
        watch: is shown each layer and the prefix of its tensors' names, before it runs.
    """
    config = source.config
    table = _filled(
        lambda: BucketedBias(config.num_bias_rows, config.num_attention_heads), source, "position_bias.", precision
    )
    for i in range(config.num_hidden_layers):
        prefix = f"encoder.layers.{i}."
        layer = _filled(lambda: Layer(config, i), source, prefix, precision)  # noqa: B023
        if watch is not None:
            watch(layer, prefix)
        with torch.no_grad():
            for n, call in enumerate(inputs):
                hidden[n] = layer(hidden[n], table(_tensor(call.relation)), None)[0]
        del layer
        yield


@torch.no_grad()
def _logits(embedding: ExtendedEmbedding, selected: Tensor, inputs: GraphInputs) -> NDArray[np.float32]:
    """(..., D) -> (..., V + E)."""
    logits: NDArray[np.float32] = embedding.logits(selected, _tensor(inputs.ext_ids), _tensor(inputs.ext_subs)).numpy()
    return logits


def _filled(make: Callable[[], Module], source: TensorSource, prefix: str, precision: Precision) -> Module:
    """A part of the model with its tensors, fp32."""
    with torch.device("meta"):  # shapes only; every parameter is replaced
        module = make()
    state = {name: _stored(source, prefix + name, precision) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def _stored(source: TensorSource, name: str, precision: Precision) -> Tensor:
    array = source.read(name)
    if precision == "fp16" and (name == EMBEDDING or is_linear(name, array.shape)):
        array = array.astype(np.float16)
    owned = array.dtype == np.float32 and array.base is None  # else copied: a parameter must not map a file
    return torch.from_numpy(array if owned else array.astype(np.float32))


def _tensor(array: NDArray[np.int32] | NDArray[np.int16]) -> Tensor:
    return torch.from_numpy(array)
