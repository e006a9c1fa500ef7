"""CTranslate2: a random Llama in int8, timed token by token.

``python -m cpmbee.bench.peers.ctranslate SPEC`` measures one workload, as `cpmbee.bench.cell` does.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.bench.cell import SEED, WARM_UP_ANSWER, CellSpec, Sample, main
from cpmbee.bench.made import made_once
from cpmbee.bench.peers.protocol import LlamaShape, Peer, Target, UnavailableError, require
from cpmbee.bench.plan import Subject

DEVIATION = 73.6  # of numbers drawn evenly from -127 to 127
STRIDE = 7_368_787  # from the place of one matrix in the random numbers to that of the next
SPECIALS = ("<unk>", "<s>", "</s>")
CACHE_NUMBER_BYTES = 4  # fp32
PAIR_NUMBERS = 2  # of each head that exist at a time: scores and what softmax makes of them


class CTranslate2(Peer):
    """CTranslate2."""

    name = "ctranslate2"
    is_llama = True
    about = (
        "CTranslate2 on a Llama as large; int8 weights with one scale a row, int8 activations; greedy, the end token "
        "forbidden by the minimal length, each token timed in a callback"
    )

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the model unless it is there."""
        require("ctranslate2", "ctranslate2")
        ours, shape = target.subject, target.shape
        if ours.precision != "int8":
            raise UnavailableError("stands beside int8")
        origin = shape.origin(ours.precision, __name__)
        folder = made_once(scratch / f"{ours.label}-ctranslate2", origin, lambda out: write_model(shape, out))
        row = shape.cache_bytes(1, CACHE_NUMBER_BYTES)
        size = sum(file.stat().st_size for file in folder.iterdir())
        return replace(
            ours,
            label=target.label(self.name),
            engine=self.name,
            module="cpmbee.bench.peers.ctranslate",
            path=folder,
            cache="fp32",
            parameters=shape.parameters,
            file_bytes=size,
            weight_bytes=(folder / "model.bin").stat().st_size,
            operations=shape.operations,
            loaded_bytes=size,
            row_bytes=row,
            pair_bytes=PAIR_NUMBERS * 4 * shape.heads,
            options=(("row", str(row)), ("vocab", str(shape.vocab))),
        )


def measure(spec: CellSpec) -> Sample:
    """Load the model and let it write."""
    import ctranslate2

    work, sample = spec.workload, Sample()
    start = time.perf_counter()
    generator = ctranslate2.Generator(
        spec.path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=work.threads
    )
    sample.load = time.perf_counter() - start
    rng = random.Random(SEED)  # noqa: S311
    count = int(spec.options["vocab"]) - len(SPECIALS)
    prompts = [[f"t{rng.randrange(count)}" for _ in range(work.prompt)] for _ in range(work.batch)]

    def generate(answer: int) -> list[float]:
        times: dict[int, float] = {}

        def on_token(token: Any) -> bool:
            times[token.step] = time.perf_counter()
            return False

        generator.generate_batch(
            prompts,
            max_length=answer,
            min_length=answer,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return [times[step] for step in sorted(times)]

    begin = time.perf_counter()
    sample.cold = sample.load + generate(WARM_UP_ANSWER)[0] - begin
    for _ in range(spec.repetitions):
        begin = time.perf_counter()
        times = generate(work.answer)
        sample.prefill.append(times[0] - begin)
        sample.add_tokens(times)
    sample.cache_bytes = int(spec.options["row"]) * work.batch * (work.prompt + work.answer - 1)
    return sample


def write_model(shape: LlamaShape, folder: Path) -> None:
    """Write a model with random weights; matrices are views of one array, so memory stays small."""
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    spec = TransformerDecoderModelSpec.from_config(
        shape.layers,
        shape.heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        head_dim=shape.dim_head,
    )
    largest = max(shape.vocab * shape.hidden, 3 * shape.attention * shape.hidden, shape.ff * shape.hidden)
    numbers = np.random.default_rng(SEED).integers(-127, 128, largest + STRIDE, np.int8)
    place = 0

    def fill(layer: Any, rows: int, columns: int) -> None:
        nonlocal place
        place = (place + STRIDE) % (len(numbers) - rows * columns)
        layer.weight = numbers[place : place + rows * columns].reshape(rows, columns)
        layer.weight_scale = np.full(rows, DEVIATION * math.sqrt(columns), np.float32)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.layer_norm.gamma = np.ones(shape.hidden, np.float32)
    fill(decoder.embeddings, shape.vocab, shape.hidden)
    fill(decoder.projection, shape.vocab, shape.hidden)
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = layer.ffn.layer_norm.gamma = np.ones(shape.hidden, np.float32)
        fill(layer.self_attention.linear[0], 3 * shape.attention, shape.hidden)
        fill(layer.self_attention.linear[1], shape.hidden, shape.attention)
        fill(layer.ffn.linear_0, shape.ff, shape.hidden)
        fill(layer.ffn.linear_0_noact, shape.ff, shape.hidden)
        fill(layer.ffn.linear_1, shape.hidden, shape.ff)
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = SPECIALS
    spec.config.layer_norm_epsilon = shape.eps
    spec.register_vocabulary([*SPECIALS, *(f"t{i}" for i in range(shape.vocab - len(SPECIALS)))])
    spec.validate()
    for name in ("weight", "weight_scale"):  # tied: the file says that one is the other
        setattr(decoder.projection, name, f"decoder/embeddings/{name}")
    folder.mkdir(parents=True)
    spec.save(str(folder))


if __name__ == "__main__":
    main(measure)
