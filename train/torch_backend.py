"""A PyTorch model behind the engine's seam: generation and scoring of a model that is being trained, unexported.

    engine = Engine(TorchBackend(model), tokenizer)

answers and scores exactly as an exported folder does, since everything above the model is the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cpmbee.model import CpmBee
from cpmbee.model.torch_threads import suited_threads, torch_threads
from cpmbee.runner import Backend, Int32, Runner


class TorchBackend(Backend):
    """A model with a cache of token rows, on the model's device and in its dtype; for one thread at a time.

    Args:
        model: its parameters are read at every run, so that training may go on in between.
        cache_rows: tokens that all requests at a time may have.
        num_threads: threads of the CPU; 0 takes what suits the model.
    """

    def __init__(self, model: CpmBee, cache_rows: int = 8192, num_threads: int = 0) -> None:
        self.model = model
        self.num_threads = num_threads or suited_threads(sum(parameter.numel() for parameter in model.parameters()))
        self.config = model.config
        self.cache_rows = cache_rows
        weight = model.input_embedding.weight
        self.device = weight.device
        shape = (cache_rows + 1, self.config.num_attention_heads, self.config.dim_head)
        self.cache = [
            tuple(torch.zeros(shape, dtype=weight.dtype, device=self.device) for _ in range(2))
            for _ in self.config.attention_layers
        ]

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner; the model is in evaluation mode as long as it is out."""
        training = self.model.training
        self.model.eval()
        try:
            with torch_threads(self.num_threads):
                yield TorchRunner(self)
        finally:
            self.model.train(training)


class TorchRunner(Runner):
    """Runs all sequences of a call together."""

    def __init__(self, backend: TorchBackend) -> None:
        super().__init__(backend.config.vocab_size)
        self._backend = backend

    @torch.no_grad()
    def run(self) -> None:
        """Call the model; see `Runner.run`.

        The model appends new keys behind the old ones. Sequences have different numbers of old ones, so the old keys
        are padded to one length, and the relation matrix is rearranged to match.
        """
        backend = self._backend
        slots, new_slots = self._tensor(self.slots), self._tensor(self.new_slots)  # (B, K), (B, Q)
        relation = torch.from_numpy(self.relation).to(backend.device)  # (B, Q, K)
        queries = new_slots.shape[1]
        old = (slots != 0).sum(1) - (new_slots != 0).sum(1)  # (B,)
        width = int(old.max())
        beyond = torch.arange(width, device=backend.device) >= old[:, None]  # (B, old)
        old_relation = relation[:, :, :width].masked_fill(beyond[:, None], -1)
        columns = old[:, None] + torch.arange(queries, device=backend.device)  # (B, Q) where the new keys are
        inside = columns < slots.shape[1]
        index = columns.clamp(max=slots.shape[1] - 1)[:, None].expand(-1, queries, -1)
        new_relation = relation.gather(2, index).masked_fill(~inside[:, None], -1)
        past = [tuple(part[slots[:, :width]].transpose(1, 2) for part in pair) for pair in backend.cache]
        output = backend.model(
            self._tensor(self.input_ids),
            self._tensor(self.input_subs),
            torch.cat((old_relation, new_relation), 2),
            self._tensor(self.ext_ids) if len(self.ext_ids) else None,
            self._tensor(self.ext_subs) if len(self.ext_ids) else None,
            past,
            self._tensor(self.logits_index),
        )
        for pair, presents in zip(backend.cache, output.past_key_values, strict=True):
            for part, present in zip(pair, presents, strict=True):
                part[new_slots] = present[:, :, width:].transpose(1, 2).to(part.dtype)  # (B, Q, H, Dh)
        self.logits[:] = output.logits.float().cpu().numpy()

    def _tensor(self, array: Int32) -> Tensor:
        return torch.from_numpy(array).to(self._backend.device, torch.int64)
