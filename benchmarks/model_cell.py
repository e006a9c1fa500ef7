"""One number of `cpmbee.bench.model_speed`, measured in a process of its own and printed as a line of JSON.

python -m cpmbee.bench.model_cell FOLDER prefill TOKENS
python -m cpmbee.bench.model_cell FOLDER decode REQUESTS BEAM_SIZE
python -m cpmbee.bench.model_cell FOLDER load
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from cpmbee import Engine

PROMPT_TOKENS = 64  # that a decoding request has read before
SHORT_TOKENS = 16  # of the prompt that is answered right after loading
STEPS = 24  # decoding steps that are timed
WARM_UP = 3  # steps or prompts before that are not
PREFILLS = {128: 5, 512: 3, 2048: 1}  # prompts timed by length


def main() -> None:
    """Measure what the command line asks for."""
    folder, kind, *numbers = sys.argv[1:]
    values = [int(number) for number in numbers]
    measures: dict[str, Callable[..., Any]] = {"prefill": prefill, "decode": decode, "load": load}
    print(json.dumps(measures[kind](folder, *values)))


def prefill(folder: str, tokens: int) -> list[float]:
    """Seconds in which prompts of ``tokens`` tokens were read and a first token was chosen."""
    engine = Engine.from_pretrained(folder)
    rng = random.Random(0)  # noqa: S311
    seconds = []
    for _ in range(1 + PREFILLS.get(tokens, 3)):
        result = engine.generate(request(engine, tokens, rng), max_new_tokens=1)
        seconds.append(result.timings.prefill)
    return seconds[1:]


def decode(folder: str, requests: int, beam_size: int) -> list[float]:
    """Seconds of single decoding steps, the engine's own work around the model included."""
    engine = Engine.from_pretrained(folder)
    rng = random.Random(0)  # noqa: S311
    batch = [request(engine, PROMPT_TOKENS, rng) for _ in range(requests)]
    times: list[float] = []
    engine.generate(
        batch,
        on_step=lambda _: times.append(time.perf_counter()),
        max_new_tokens=WARM_UP + STEPS + 2,
        beam_size=beam_size,
    )
    seconds = [end - start for start, end in pairwise(times)]  # times[0] is the prefill's end
    return seconds[WARM_UP : WARM_UP + STEPS]


def load(folder: str) -> dict[str, float]:
    """Seconds from an engine that is not loaded to the first token of a short prompt."""
    start = time.perf_counter()
    engine = Engine.from_pretrained(folder)
    loaded = time.perf_counter()
    engine.generate(request(engine, SHORT_TOKENS, random.Random(0)), max_new_tokens=1)  # noqa: S311
    return {"load": loaded - start, "first token": time.perf_counter() - start}


def request(engine: Engine, tokens: int, rng: random.Random) -> dict[str, Any]:
    """A request that makes the model read exactly ``tokens`` tokens, its opening ``<s>`` included."""
    tokenizer = engine.tokenizer
    letters = [token for token in map(tokenizer.id_to_token, range(tokenizer.vocab_size)) if len(token) == 1]
    text = ""
    while (missing := tokens - 1 - len(engine.encode({"input": text, "<ans>": ""}))) > 0:
        text += "".join(rng.choices(letters, k=missing))
    if missing < 0:
        raise ValueError(f"no prompt is as short as {tokens} tokens")
    return {"input": text, "<ans>": ""}


if __name__ == "__main__":
    main()
