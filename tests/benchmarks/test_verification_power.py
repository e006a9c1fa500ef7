"""Right exports pass and mistakes do not: a few of those that the benchmark makes."""

from pathlib import Path

import numpy as np
import pytest

from cpmbee import native
from cpmbee.bench.mistakes import all_mistakes
from cpmbee.bench.verification_power import MEASURES, config_of, distance, refusal, right_export, write_checkpoint
from cpmbee.export import export

needs_native = pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")


@needs_native
@pytest.mark.parametrize("seed", [0, 1])
def test_right_exports_pass(seed: int) -> None:
    facts, measured = right_export(seed)
    assert facts["refused_by"] == []
    assert len(measured) == 2  # native kernels, function bodies
    assert all(len(values) == len(MEASURES) for values in measured)


@needs_native
@pytest.mark.parametrize(
    "mistake",
    [
        "inputs of one block permuted",
        "scale of one block doubled",
        "norm of one layer without its weight",
        "one layer's feed-forward skipped",
        "body of the product rounds to half as many steps",
        "native kernel wrong for the last output",
        "native kernel wrong in one tile of 16 outputs",
    ],
)
def test_mistakes_do_not_pass(mistake: str, tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "model"
    write_checkpoint(checkpoint, config_of(np.random.default_rng(0), layers=2), 0)
    export(checkpoint, folder, "int4", block_size=32, verify=False)
    assert refusal(folder, checkpoint) is None
    with all_mistakes(4)[mistake](folder):
        assert refusal(folder, checkpoint) is not None


def test_distance_to_a_bound() -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 0.1, 1000)).tolist()
    found = distance(values, 2.0)
    assert found["largest"] == pytest.approx(max(values))
    assert 6 < found["standard_deviations_to_bound"] < 8
    assert found["probability_to_exceed"] < 1e-3
    assert distance(values, 1.0)["probability_to_exceed"] > 0.05
