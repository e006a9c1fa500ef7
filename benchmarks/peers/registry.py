"""All peers by name; a new one is a module beside this one and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpmbee.bench.peers.ctranslate import CTranslate2
from cpmbee.bench.peers.dynamic_quantize import DynamicQuantize
from cpmbee.bench.peers.functions import Functions
from cpmbee.bench.peers.genai import OnnxRuntimeGenai
from cpmbee.bench.peers.llama_cpp import LlamaCpp
from cpmbee.bench.peers.matmulnbits import MatMulNBits
from cpmbee.bench.peers.protocol import LLAMA_NOTE, Peer, Target, UnavailableError
from cpmbee.bench.peers.torch_reference import TorchReference
from cpmbee.bench.plan import Subject
from cpmbee.bench.records import Result

_ALL: tuple[Peer, ...] = (
    Functions(),
    MatMulNBits(),
    DynamicQuantize(),
    TorchReference("torch", "fp32"),
    TorchReference("torch-compiled", "fp32", compiled=True),
    TorchReference("torch-bf16", "bf16"),
    LlamaCpp(),
    CTranslate2(),
    OnnxRuntimeGenai(),
)
PEERS = {peer.name: peer for peer in _ALL}


def prepare(names: Sequence[str], targets: Sequence[Target], scratch: Path, result: Result) -> list[Subject]:
    """Make the models of peers; those that can be measured on none are noted in ``result`` with the reason.

    A peer with a precision of its own is measured once for each shape of model, not once for each of our precisions.
    """
    subjects: list[Subject] = []
    for name in names:
        peer, reasons = PEERS[name], dict[str, str]()
        seen = set()
        for target in targets:
            key = (target.config, peer.precision or target.subject.precision)
            if key in seen:
                continue
            seen.add(key)
            try:
                subjects.append(peer.prepare(target, scratch))
            except (UnavailableError, OSError, ValueError, RuntimeError) as reason:  # the run goes on without it
                reasons[target.subject.label] = str(reason)
        if len(reasons) < len(seen):
            result.notes[name] = peer.about
            if peer.is_llama:
                result.notes["a Llama as large"] = LLAMA_NOTE
        else:
            result.skipped.append((name, "; ".join(sorted(set(reasons.values())))))
    return subjects
