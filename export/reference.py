"""The PyTorch reference model behind the engine's seam: same searches, same cache rows, other arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpmbee.model import CpmBee
from cpmbee.model.torch_threads import suited_threads, torch_threads
from cpmbee.runner import Backend, Runner


class ReferenceBackend(Backend):
    """A reference model with a cache of token rows.

    Args:
        model: the model, in any dtype.
        cache_rows: rows of the cache.
    """

    def __init__(self, model: CpmBee, cache_rows: int = 2048) -> None:
        self.model = model.eval()
        self.config = model.config
        self.cache_rows = cache_rows
        self.num_threads = suited_threads(sum(parameter.numel() for parameter in model.parameters()))
        shape = (cache_rows + 1, self.config.num_attention_heads, self.config.dim_head)
        dtype = model.input_embedding.weight.dtype
        self.cache = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.config.attention_layers
        ]

    @contextmanager
    def runner(self) -> Iterator[Runner]:
        """A runner; the reference is for one thread of the caller."""
        with torch_threads(self.num_threads):
            yield ReferenceRunner(self)


class ReferenceRunner(Runner):
    """Runs the sequences of a call one after the other, without their padding."""

    def __init__(self, backend: ReferenceBackend) -> None:
        super().__init__(backend.config.vocab_size)
        self._model = backend.model
        self._cache = backend.cache

    @torch.inference_mode()
    def run(self) -> None:
        """Call the model; see `Runner.run`."""
        ext_ids, ext_subs = torch.from_numpy(self.ext_ids), torch.from_numpy(self.ext_subs)
        for b in range(len(self.slots)):
            keys = int((self.slots[b] != 0).sum())
            queries = int((self.new_slots[b] != 0).sum())
            earlier = torch.from_numpy(self.slots[b, : keys - queries]).long()
            new = torch.from_numpy(self.new_slots[b, :queries]).long()
            past = [
                (k[earlier].transpose(0, 1)[None], v[earlier].transpose(0, 1)[None]) for k, v in self._cache
            ]  # (1, H, K, Dh)
            output = self._model(
                torch.from_numpy(self.input_ids[b, None, :queries]).long(),
                torch.from_numpy(self.input_subs[b, None, :queries]).long(),
                torch.from_numpy(self.relation[b, None, :queries, :keys]),
                ext_ids.long() if len(ext_ids) else None,
                ext_subs.long() if len(ext_ids) else None,
                past,
                torch.from_numpy(self.logits_index[b, None]),
            )
            for (k, v), (present_k, present_v) in zip(self._cache, output.past_key_values, strict=True):
                k[new] = present_k[0, :, keys - queries :].transpose(0, 1)
                v[new] = present_v[0, :, keys - queries :].transpose(0, 1)
            self.logits[b] = output.logits[0].float().numpy()
