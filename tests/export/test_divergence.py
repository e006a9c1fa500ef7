"""Errors as rounding makes them pass, however large; errors that it does not make are found, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpmbee.export.comparison import Call
from cpmbee.export.dequantized import DequantizedSource, check_weights, external_tensors, stored_quantization
from cpmbee.export.divergence import Rounding
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.probes import GraphInputs
from cpmbee.export.report import Check
from cpmbee.export.rounded_model import RoundedModel
from cpmbee.export.sources import open_source
from cpmbee.folder import open_folder
from tests.export.cases import CACHE_ROWS, make_folder, reference_calls
from tests.export.test_verification import rehash

POSITIONS, VOCABULARY, EXTENSION = 64, 3000, 4
Logits = np.ndarray


class Noisy:
    """Calls of a model, and others that answer them with errors of one size."""

    def __init__(self, noise: float, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = noise * self.rng.uniform(0.2, 5, (1, 1, VOCABULARY + EXTENSION))  # tokens differ
        self.exact = self.rng.normal(0, 3, (1, POSITIONS, VOCABULARY + EXTENSION)).astype(np.float32)
        empty = [np.zeros((1, 1), np.int32)] * 6
        inputs = GraphInputs(*empty, np.zeros(EXTENSION, np.int32), np.zeros(EXTENSION, np.int32))  # type: ignore[arg-type]
        self.rounding = Rounding([Call("logits", inputs, self.exact)], [self.answer()])

    def answer(self, factor: float = 1.0) -> Logits:
        return (self.exact + factor * self.rng.normal(0, 1, self.exact.shape) * self.noise).astype(np.float32)

    def judge(self, answer: Logits) -> list[Check]:
        return self.rounding.compare([answer], "it", "reference")


@pytest.mark.parametrize("noise", [0, 1e-5, 1e-3, 1e-1, 1])
def test_errors_like_those_of_rounding_pass(noise: float) -> None:
    noisy = Noisy(noise)
    for factor in (0, 0.5, 1, 1.2):
        assert all(check.passed for check in noisy.judge(noisy.answer(factor)))
    (logits, tokens) = noisy.judge(noisy.answer())
    assert (logits.name, tokens.name) == ("logits, it", "tokens, it")
    assert "of rounding" in logits.detail


def everywhere(noisy: Noisy, answer: Logits) -> None:
    answer += (noisy.answer() - noisy.exact) * 1.5


def one_position(noisy: Noisy, answer: Logits) -> None:
    answer[0, 17] += noisy.rng.normal(0, 8, answer.shape[-1]) * noisy.noise[0, 0]


def one_token(noisy: Noisy, answer: Logits) -> None:
    answer[..., 321] += 4 * noisy.noise[..., 321]


def one_logit(noisy: Noisy, answer: Logits) -> None:
    answer[0, 5, 1000] += 40 * noisy.noise[0, 0, 1000]


def nothing_known(noisy: Noisy, answer: Logits) -> None:
    answer[0, 63, 2] = np.nan


def infinite(noisy: Noisy, answer: Logits) -> None:
    answer[0, 0, -1] = np.inf


@pytest.mark.parametrize("wrong", [everywhere, one_position, one_token, one_logit, nothing_known, infinite])
def test_other_errors_do_not_pass(wrong: Callable[[Noisy, Logits], None]) -> None:
    noisy = Noisy(1e-2)
    answer = noisy.answer()
    wrong(noisy, answer)
    assert not all(check.passed for check in noisy.judge(answer))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_the_rounded_model_rounds_as_the_native_kernels_do(block_size: int, tmp_path: Path) -> None:
    """Before the first roundings tip over, they agree closely; one layer has few."""
    checkpoint, out = make_folder(tmp_path, precision="int8", block_size=block_size, cache="fp32")
    calls = reference_calls(checkpoint)[:4]
    rounded = RoundedModel(out / "model.onnx", "fp32").run_all([call.inputs for call in calls])
    native = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=True).run_all([call.inputs for call in calls])
    for call, theirs, ours in zip(calls, rounded, native, strict=True):
        assert np.square(ours - theirs).mean() < 0.2 * np.square(theirs - call.logits).mean()


@pytest.mark.parametrize(
    ("precision", "scale"), [("int8", 1.05), ("int4", 1.5), ("int4", 0.6), ("int8", -1), ("int4", 0)]
)
def test_one_wrong_scale_is_found(precision: str, scale: float, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, precision=precision, block_size=32)  # type: ignore[arg-type]
    assert weights_check(checkpoint, out).passed
    scales = external_tensors(out / "model.onnx")["layers.1.ffn/out_weight/scales"]
    data = np.memmap(out / "model.onnx.data", np.float16, "r+", scales.offset, scales.shape)  # type: ignore[attr-defined]
    data[0, 0, 3] *= scale
    data.flush()
    rehash(out, "model.onnx.data")
    check = weights_check(checkpoint, out)
    assert not check.passed
    assert "encoder.layers.1.ffn.ffn.w_out.weight in row 3, input 0" in check.detail


def weights_check(checkpoint: Path, out: Path) -> Check:
    model = open_folder(out)
    quantization = stored_quantization(model)
    assert quantization is not None
    source = DequantizedSource(open_source(checkpoint), model, quantization)
    return check_weights(source, lambda stage, fraction: None)
