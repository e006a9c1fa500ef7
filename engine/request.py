"""One request on its way: the encoded prompt, its search, and what it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

from cpmbee.beam import BeamSearch
from cpmbee.config import ModelConfig
from cpmbee.encoding import Prompt
from cpmbee.examples import examples_of
from cpmbee.generation_config import GenerationConfig
from cpmbee.row_keeper import RowHolder
from cpmbee.sampling import SamplingSearch
from cpmbee.search import GreedySearch, Search
from cpmbee.token_space import make_token_space
from cpmbee.tokenizer import Tokenizer


@dataclass(eq=False, kw_only=True)
class Request(RowHolder):
    """State of one request that is answered.

    Attributes:
        config: its options.
        search: what decides on its tokens.
        tail: cache rows it holds for what it has written.
        encode_seconds, prefill_seconds, decode_seconds: time spent so far.
    """

    config: GenerationConfig
    search: Search
    tail: set[int] = field(default_factory=set)
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def answer_rows(self) -> int:
        """The most rows its answers can take at a time."""
        return most_answer_rows(self.config)


def most_answer_rows(config: GenerationConfig) -> int:
    """The most cache rows that answers written with these options can take at a time."""
    return config.beam_size * (config.max_new_tokens - 1)


def most_rows(prompt: Prompt, config: GenerationConfig) -> int:
    """The most cache rows that a request can take: its prompt, the first answer's ``<s>``, and its answers."""
    return len(prompt) + 1 + most_answer_rows(config)


def make_request(
    prompt: Prompt,
    tokenizer: Tokenizer,
    model: ModelConfig,
    config: GenerationConfig,
    repeats: Counter[int] | None = None,
) -> Request:
    """Set a request up.

    Args:
        prompt: the encoded request.
        tokenizer: the model's.
        model: the model's configuration.
        config: the options of the call.
        repeats: how often each request has been asked before, by its hash, where a seed must not give equal ones
            equal answers; this one is counted.

    Raises:
        PromptError: a subscript is too large for the model.
    """
    space = make_token_space(prompt, tokenizer, model)
    search: Search
    if config.sampling:
        search = SamplingSearch(space, config, _entropy(prompt, config, repeats))
    elif config.beam_size > 1:
        search = BeamSearch(space, config)
    else:
        search = GreedySearch(space, config)
    return Request(prompt=prompt, space=space, examples=examples_of(prompt), config=config, search=search)


def _entropy(prompt: Prompt, config: GenerationConfig, repeats: Counter[int] | None) -> list[int] | None:
    """What the generator of a request is made from: the seed, its arrays, how often it was asked before; no place."""
    if config.seed is None:
        return None
    key = request_hash(prompt)
    before = 0
    if repeats is not None:
        before = repeats[key]
        repeats[key] += 1
    return [config.seed, key, before]


def request_hash(prompt: Prompt) -> int:
    """64 bits that depend on the arrays of a request, its examples included, and on nothing else."""
    arrays = (prompt.input_ids, prompt.input_subs, prompt.segment_ids, prompt.sample_ids, prompt.segment_rel)
    digest = blake2b(digest_size=8)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")
