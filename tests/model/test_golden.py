"""The reference model against recorded outputs of the original implementation."""

import json

import numpy as np
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import IGNORE_INDEX, CpmBee, language_model_loss, load_model
from cpmbee.relation import RelationBuilder
from tests.golden import GOLDEN, requires_golden

pytestmark = requires_golden


def test_rotated_embedding() -> None:
    recorded = np.load(GOLDEN / "tiny" / "embedding.npz")
    ids, subs = torch.from_numpy(recorded["ids"]), torch.from_numpy(recorded["subs"])
    raw = json.loads((GOLDEN / "tiny" / "config.json").read_text(encoding="utf-8"))
    weights = load_model(GOLDEN / "tiny").state_dict()
    for name, tolerance in (("float", 1e-6), ("half", 2e-3)):
        model = CpmBee(ModelConfig.from_dict({**raw, "half": name == "half"}))
        model.load_state_dict(weights)
        for dtype in (torch.float32, torch.float16) if name == "half" else (torch.float32,):
            embedding = model.to(dtype).input_embedding(ids, subs).detach().float().numpy()
            np.testing.assert_allclose(embedding, recorded[name].astype(np.float32), rtol=0, atol=tolerance)


def test_packed_training_batch_with_pruned_blocks() -> None:
    batch = np.load(GOLDEN / "train" / "batch.npz")
    model = load_model(GOLDEN / "tiny-pruned")
    relation = RelationBuilder(model.config).packed(
        context=batch["context"],
        sample_ids=batch["sample_ids"],
        num_segments=batch["num_segments"],
        segment_ids=batch["segment_ids"],
        segment_rel_offset=batch["segment_rel_offset"],
        segment_rel=batch["segment_rel"],
        spans=batch["spans"],
        length=batch["length"],
    )
    output = model(
        torch.from_numpy(batch["inputs"]),
        torch.from_numpy(batch["inputs_sub"]),
        torch.from_numpy(relation),
        torch.from_numpy(batch["ext_ids"]),
        torch.from_numpy(batch["ext_sub"]),
    )
    targets = torch.from_numpy(batch["target"])
    loss = language_model_loss(output.logits, targets)
    np.testing.assert_allclose(loss.item(), batch["loss"], rtol=1e-5)

    hidden = output.hidden_states.detach().numpy()
    np.testing.assert_allclose(hidden, batch["hidden"], rtol=1e-4, atol=1e-4 * np.abs(batch["hidden"]).mean())
    logits = output.logits[targets != IGNORE_INDEX].detach().numpy()
    np.testing.assert_allclose(logits[:, :512], batch["target_logits_head"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[:, -4:], batch["target_logits_ext"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), batch["target_logits_argmax"])

    loss.backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
