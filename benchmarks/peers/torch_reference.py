"""The PyTorch reference model, eager, compiled or in bf16: what runs where there is no engine.

``python -m cpmbee.bench.peers.torch_reference SPEC`` measures one workload, as `cpmbee.bench.cell` does.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmbee.bench.cell import SEED, WARM_UP_ANSWER, CellSpec, Sample, main
from cpmbee.bench.cost import cache_row_bytes
from cpmbee.bench.peers.protocol import Peer, Target, require
from cpmbee.bench.plan import Subject
from cpmbee.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cpmbee.model.cpmbee import CpmBee

MODULE = "cpmbee.bench.peers.torch_reference"
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
PAIR_NUMBERS = 3  # of each head that exist at a time: scores, bias and what softmax makes of them
RANDOM_NUMBERS = (1 << 22) + 15  # that random weights repeat


class TorchReference(Peer):
    """One way to run the reference.

    Args:
        name: of the peer.
        precision: ``"fp32"`` or ``"bf16"``.
        compiled: whether layers go through ``torch.compile``.
    """

    def __init__(self, name: str, precision: str, *, compiled: bool = False) -> None:
        self.name = name
        self.about = (
            f"the PyTorch reference, {precision}{', layers compiled by torch.compile' if compiled else ''}: the same "
            "model; greedy choice of tokens and a cache that grows by concatenation, no text, no search"
        )
        self.precision = precision
        self._compiled = compiled

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Weights of the checkpoint if there is one, else random ones of the same shapes."""
        require("torch", "torch")
        ours = target.subject
        precision = "bf16" if self.precision == "bf16" else "fp32"
        size = ours.parameters * WEIGHT_BYTES[precision]
        return replace(
            ours,
            label=target.label(self.name),
            engine=self.name,
            module=MODULE,
            precision=precision,
            cache=precision,
            file_bytes=size,
            weight_bytes=size,
            loaded_bytes=size,
            row_bytes=2 * cache_row_bytes(target.config, WEIGHT_BYTES[precision]),  # the next cache beside the last
            pair_bytes=PAIR_NUMBERS * 4 * target.config.num_attention_heads,
            options=(
                ("precision", precision),
                ("compiled", str(int(self._compiled))),
                ("checkpoint", str(target.checkpoint or "")),
            ),
        )


def measure(spec: CellSpec) -> Sample:
    """Load the model and let it write."""
    import torch

    work, sample = spec.workload, Sample()
    torch.set_num_threads(work.threads)
    start = time.perf_counter()
    model = _load(spec)
    if spec.options["checkpoint"]:
        sample.load = time.perf_counter() - start
    if spec.options["compiled"] == "1":
        for layer in model.encoder.layers:
            layer.compile(dynamic=True)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, model.config.vocab_size, (work.batch, work.prompt), generator=generator)
    with torch.inference_mode():
        _generate(model, ids, WARM_UP_ANSWER)
        for _ in range(spec.repetitions):
            begin = time.perf_counter()
            times, cache_bytes = _generate(model, ids, work.answer)
            sample.prefill.append(times[0] - begin)
            sample.add_tokens(times)
            sample.cache_bytes = cache_bytes
    return sample


def _generate(model: CpmBee, ids: Tensor, answer: int) -> tuple[list[float], int]:
    """Clock readings at each token, and the bytes of the cache at the end."""
    import torch

    batch, prompt = ids.shape
    relation = _relation(model.config, prompt, answer)
    subs = torch.zeros_like(ids)
    index = torch.full((batch, 1), prompt - 1)
    times: list[float] = []
    past: Any = None
    for n in range(answer):
        seen = prompt + n
        rows = relation[:prompt, :prompt] if n == 0 else relation[seen - 1 : seen, :seen]
        output = model(
            ids, subs, rows[None].expand(batch, -1, -1), past_key_values=past, logits_index=index if n == 0 else None
        )
        past = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        subs = torch.zeros_like(ids)
        times.append(time.perf_counter())
    return times, sum(k.nbytes + v.nbytes for k, v in past)


def _relation(config: ModelConfig, prompt: int, answer: int) -> Tensor:
    """Rows of the bias table, (T, T): one segment that sees itself, then an answer that sees what is before it."""
    import torch

    total = prompt + answer
    positions = torch.arange(total)
    distance = (positions[None] - positions[:, None]).clamp(-2, 2) % config.position_bias_num_buckets
    hidden = (positions[None] > positions[:, None]) & (positions[None] >= prompt)
    return distance.masked_fill(hidden, -1).to(torch.int16)


def _load(spec: CellSpec) -> CpmBee:
    import torch

    from cpmbee.model import load_model

    dtype = torch.bfloat16 if spec.options["precision"] == "bf16" else torch.float32
    if spec.options["checkpoint"]:
        return load_model(spec.options["checkpoint"], dtype=dtype).eval()
    return _random_model(ModelConfig.from_file(Path(spec.path) / "config.json"), dtype)


def _random_model(config: ModelConfig, dtype: torch.dtype) -> CpmBee:
    """Normally distributed weights, a repeating sequence of numbers: drawing all of them takes minutes."""
    import torch

    from cpmbee.model.cpmbee import CpmBee

    with torch.device("meta"):
        model = CpmBee(config)
    numbers = torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        tensor = torch.ones(parameter.shape, dtype=dtype)
        if parameter.ndim > 1:
            flat = tensor.view(-1)
            for begin in range(0, flat.numel(), RANDOM_NUMBERS):
                piece = flat[begin : begin + RANDOM_NUMBERS]
                piece.copy_(numbers[: piece.numel()])
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model.eval()


if __name__ == "__main__":
    main(measure)
