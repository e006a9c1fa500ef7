"""How strong each input of each matrix is while a model reads requests: the weights of a calibrated scale search.

The error that a quantized matrix makes in its output is, input by input, the error of the weight times the input.
Weighing squared errors of weights with the mean square of their input therefore makes the search minimize the error of
the output (inputs taken as uncorrelated). The PyTorch reference reads the requests, one layer in memory at a time, so
that any model can be calibrated whose checkpoint can be exported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmbee.export.reference_loading import few_threads, stream_layers
from cpmbee.export.sources import TensorSource
from cpmbee.export.transcripts import read_transcripts
from cpmbee.model.cpmbee import Linear
from cpmbee.model.tensor_names import EMBEDDING
from cpmbee.tokenizer import Tokenizer

Float32 = NDArray[np.float32]


def input_strengths(
    source: TensorSource, tokenizer: Tokenizer, requests: str | Path, tell: Callable[[str, float], None]
) -> dict[str, Float32]:
    """Mean squares of the inputs of every matrix, by checkpoint tensor, each divided by their mean.

    For the embedding they are those of the head, averaged with 1: its rows are also read as they are.

    Args:
        source: the checkpoint.
        tokenizer: the model's.
        requests: JSON Lines of requests, best with their answers.
        tell: is told how much is done.

    Raises:
        ConfigError: the file has a line that is not a request this model can read.
    """
    transcripts = read_transcripts(requests, tokenizer, source.config)
    squares: dict[str, Tensor] = {}

    def watch(module: nn.Module, prefix: str) -> None:
        for name, part in module.named_modules():
            if isinstance(part, Linear):
                part.register_forward_pre_hook(_adder(squares, f"{prefix}{name}.weight"))

    with few_threads(source.config), torch.no_grad():
        hidden = stream_layers(source, "fp32", [t.inputs for t in transcripts], watch, tell)
        for transcript, h in zip(transcripts, hidden, strict=True):
            index = torch.from_numpy(transcript.inputs.logits_index[0]).long()
            _add(squares, EMBEDDING, h[0, index])
    strengths = {name: _relative(total) for name, total in squares.items()}
    strengths[EMBEDDING] = (strengths[EMBEDDING] + np.float32(1)) / np.float32(2)
    return strengths


def _adder(squares: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, inputs: _add(squares, name, inputs[0])


def _add(squares: dict[str, Tensor], name: str, values: Tensor) -> None:
    total = values.double().square().flatten(0, -2).sum(0)
    squares[name] = squares[name] + total if name in squares else total


def _relative(total: Tensor) -> Float32:
    mean = float(total.mean()) or 1.0
    relative: Float32 = (total / mean).float().numpy()
    return relative
