"""Our own graph on ONNX Runtime's operators: the file's function bodies instead of the native kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cpmbee.bench.peers.protocol import MATMULNBITS_COPIES, Peer, Target
from cpmbee.bench.plan import Subject, Workload

COPIES = {"fp32": 1, "fp16": 3}  # of the bytes of stored weights: fp16 is kept in fp32 beside them
PAIR_NUMBERS = 4  # of each head that exist at a time: scores, bias, their sum and what softmax makes of it


class Functions(Peer):
    """``CPMBEE_NATIVE=0``."""

    name = "functions"
    about = "our model folder with CPMBEE_NATIVE=0: same weights, engine and graph, ONNX Runtime's own operators"

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """The same folder in another environment."""
        return replace(
            target.subject,
            label=target.label(self.name),
            engine=self.name,
            loaded_bytes=COPIES.get(target.subject.precision, MATMULNBITS_COPIES) * target.subject.weight_bytes,
            pair_bytes=PAIR_NUMBERS * 4 * target.config.num_attention_heads,
            environment=(("CPMBEE_NATIVE", "0"),),
        )

    def can(self, workload: Workload) -> bool:
        """Everything that our engine can."""
        return True
