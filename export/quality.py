"""How good the answers of a model folder still are: its probabilities against those of the fp32 reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpmbee.export.comparison import LogitsModel
from cpmbee.export.report import Quality
from cpmbee.export.transcripts import Transcript

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def measure(model: LogitsModel, transcripts: Sequence[Transcript], expected: Iterable[Float32]) -> Quality:
    """Compare a model with the reference.

    Args:
        model: the exported one.
        transcripts: what to ask.
        expected: the reference's logits for each transcript, (positions, V + E).
    """
    divergence = 0.0
    positions = agreed = right = reference_right = 0
    answers = model.run_all([transcript.inputs for transcript in transcripts])
    for transcript, theirs, (ours,) in zip(transcripts, expected, answers, strict=True):
        divergence += float(kl_divergence(theirs, ours).sum())
        positions += len(ours)
        our_choice, their_choice = (_choice(logits, transcript) for logits in (ours, theirs))
        agreed += int((our_choice == their_choice).sum())
        if len(transcript.targets):
            right += bool((our_choice == transcript.targets).all())
            reference_right += bool((their_choice == transcript.targets).all())
    total = len(transcripts)
    scored = all(len(transcript.targets) for transcript in transcripts)
    return Quality(
        requests=total,
        positions=positions,
        kl=divergence / positions,
        top1=agreed / positions,
        accuracy=right / total if scored else None,
        reference_accuracy=reference_right / total if scored else None,
    )


def kl_divergence(theirs: Float32, ours: Float32) -> Float64:
    """Of the softmax of ``ours`` from that of ``theirs``, in nats: (positions, columns) -> (positions,)."""
    p, q = _log_softmax(theirs), _log_softmax(ours)
    divergence: Float64 = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def _log_softmax(logits: Float32) -> Float64:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: Float64 = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def _choice(logits: Float32, transcript: Transcript) -> NDArray[np.int64]:
    """The likeliest token that may be written, (positions,)."""
    allowed = logits.copy()
    allowed[:, list(transcript.forbidden)] = -np.inf
    choice: NDArray[np.int64] = allowed.argmax(-1)
    return choice
