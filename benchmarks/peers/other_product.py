"""Our model folder with another product in the place of ours: same graph, same attention kernel, same engine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmbee.bench.made import code_identity, folder_identity, made_once
from cpmbee.bench.peers.protocol import Peer, Target, UnavailableError, require
from cpmbee.bench.plan import Subject, Workload
from cpmbee.folder import MANIFEST

if TYPE_CHECKING:
    import onnx

MODEL_FILE = "model.onnx"


class OtherProduct(Peer):
    """A peer that runs our folder with ``QuantizedLinear`` exchanged.

    Attributes:
        precisions: of our folders that it can stand beside.
        copies: of the weights that its memory has to hold while they are loaded.
    """

    precisions: tuple[str, ...]
    copies: int

    @staticmethod
    @abstractmethod
    def write(folder: Path, out: Path) -> None:
        """Write ``folder`` with the other product to ``out``."""

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the folder unless it is there."""
        require("onnx", '"cpmbee[export]"')
        ours = target.subject
        if ours.precision not in self.precisions:
            raise UnavailableError(f"is for {' and '.join(self.precisions)} weights")
        origin = {**folder_identity(ours.path), **code_identity(__name__, type(self).__module__)}
        folder = made_once(scratch / f"{ours.label}-{self.name}", origin, lambda out: self.write(ours.path, out))
        return replace(
            ours,
            label=target.label(self.name),
            engine=self.name,
            path=folder,
            loaded_bytes=self.copies * ours.weight_bytes,
        )

    def can(self, workload: Workload) -> bool:
        """Everything that our engine can."""
        return True


def rewrite_folder(
    folder: Path, out: Path, change: Callable[[onnx.ModelProto, dict[str, Any]], onnx.ModelProto]
) -> None:
    """Write a model folder again with another graph; its other files get second names.

    Args:
        folder: of ours.
        out: to make.
        change: gives the new graph of the old one, and may add to the manifest's table of files those that it wrote
            to ``out``.

    Raises:
        FileExistsError: there is something called ``out``.
    """
    import onnx

    out.mkdir(parents=True)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = manifest["files"]
    for name in files:
        if name != MODEL_FILE:
            _link(folder / name, out / name)
    content = change(onnx.load(folder / MODEL_FILE, load_external_data=False), files).SerializeToString()
    (out / MODEL_FILE).write_bytes(content)
    files[MODEL_FILE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
