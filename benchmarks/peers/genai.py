"""onnxruntime-genai: a random Llama in int4, timed token by token.

``python -m cpmbee.bench.peers.genai SPEC`` measures one workload, as `cpmbee.bench.cell` does.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from cpmbee.bench.cell import SEED, WARM_UP_ANSWER, CellSpec, Sample, main
from cpmbee.bench.made import made_once
from cpmbee.bench.peers.protocol import Peer, Target, UnavailableError, require
from cpmbee.bench.plan import Subject
from cpmbee.onnxruntime_import import switch_off_telemetry

BITS = {"int4": 4, "int8": 8}
HEAD_MULTIPLE = 16  # of the width of a head, which GroupQueryAttention insists on
CACHE_NUMBER_BYTES = 4  # fp32
COPIES = 2  # of the weights that its memory has to hold while they are loaded


class OnnxRuntimeGenai(Peer):
    """onnxruntime-genai."""

    name = "onnxruntime-genai"
    is_llama = True
    about = (
        "onnxruntime-genai on a Llama as large; the graph that its model builder writes (MatMulNBits in blocks of 32 "
        "with int8 activations, head of 8 bits, GroupQueryAttention with heads a multiple of 16 wide, logits of the "
        "last token only); greedy, the end token forbidden by the minimal length"
    )

    def prepare(self, target: Target, scratch: Path) -> Subject:
        """Write the model unless it is there."""
        require("onnxruntime_genai", "onnxruntime-genai")
        require("onnx", '"cpmbee[export]"')
        from cpmbee.bench.peers.genai_model import write_model

        ours, shape = target.subject, target.shape.with_heads_of(HEAD_MULTIPLE)
        if ours.precision not in BITS:
            raise UnavailableError("stands beside int4 and int8")
        bits = BITS[ours.precision]
        origin = shape.origin(ours.precision, "cpmbee.bench.peers.genai_model")
        folder = made_once(scratch / f"{ours.label}-genai", origin, lambda out: write_model(shape, bits, out))
        row = shape.cache_bytes(1, CACHE_NUMBER_BYTES)
        size = sum(file.stat().st_size for file in folder.iterdir())
        return replace(
            ours,
            label=target.label(self.name),
            engine=self.name,
            module="cpmbee.bench.peers.genai",
            path=folder,
            cache="fp32",
            parameters=shape.parameters,
            file_bytes=size,
            weight_bytes=(folder / "model.onnx.data").stat().st_size,
            operations=shape.operations,
            loaded_bytes=COPIES * size,
            row_bytes=2 * row,  # a longer cache is made before the shorter one goes
            pair_bytes=4 * shape.heads,
            options=(("row", str(row)), ("vocab", str(shape.vocab))),
        )


def measure(spec: CellSpec) -> Sample:
    """Load the model and let it write."""
    switch_off_telemetry()
    import onnxruntime_genai as genai

    work, sample = spec.workload, Sample()
    start = time.perf_counter()
    config = genai.Config(spec.path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": work.threads}}}}))
    model = genai.Model(config)
    sample.load = time.perf_counter() - start
    shape = (work.batch, work.prompt)
    prompts = np.random.default_rng(SEED).integers(3, int(spec.options["vocab"]), shape, np.int32)

    def generate(answer: int) -> tuple[float, list[float]]:
        length = work.prompt + answer
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=work.batch)
        generator = genai.Generator(model, params)
        begin, times = time.perf_counter(), []
        generator.append_tokens(prompts)
        for _ in range(answer):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return begin, times

    begin, times = generate(WARM_UP_ANSWER)
    sample.cold = sample.load + times[0] - begin
    for _ in range(spec.repetitions):
        begin, times = generate(work.answer)
        sample.prefill.append(times[0] - begin)
        sample.add_tokens(times)
    sample.cache_bytes = int(spec.options["row"]) * work.batch * (work.prompt + work.answer - 1)
    return sample


if __name__ == "__main__":
    main(measure)
