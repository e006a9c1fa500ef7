"""Our own graph on ONNX Runtime's operators: the file's function bodies instead of the native kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cpmbee.bench.peers.protocol import Peer, Target
from cpmbee.bench.plan import Subject, Workload


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
            environment=(("CPMBEE_NATIVE", "0"),),
        )

    def can(self, workload: Workload) -> bool:
        """Everything that our engine can."""
        return True
