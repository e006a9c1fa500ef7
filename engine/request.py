"""One request on its way: the encoded prompt, its search, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cpmbee.beam import BeamSearch
from cpmbee.cache import Rows
from cpmbee.config import ModelConfig
from cpmbee.encoding import Prompt
from cpmbee.errors import PromptError
from cpmbee.examples import Example, examples_of
from cpmbee.generation_config import GenerationConfig
from cpmbee.relation import TokenLayout
from cpmbee.sampling import SamplingSearch
from cpmbee.search import GreedySearch, Search, TokenSpace
from cpmbee.tokenizer import Tokenizer


@dataclass(eq=False)
class Request:
    """State of one request.

    Attributes:
        prompt: its arrays.
        config: its options.
        search: what decides on its tokens.
        examples: its in-context examples.
        rows: cache rows it holds for its prompt (those of shared examples not counted).
        tail: cache rows it holds for what it has written.
        example_rows: rows of the examples it uses so far, by key.
        reserved: rows promised to it.
        owner: who they are promised to.
        cancelled: the caller wants no more tokens.
        encode_seconds, prefill_seconds, decode_seconds: time spent so far.
    """

    prompt: Prompt
    config: GenerationConfig
    search: Search
    examples: list[Example]
    rows: set[int] = field(default_factory=set)
    tail: set[int] = field(default_factory=set)
    example_rows: dict[bytes, Rows] = field(default_factory=dict)
    reserved: int = 0
    owner: int = 0
    cancelled: bool = False
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def own_tokens(self) -> int:
        """Tokens of the prompt without its examples, the first answer's ``<s>`` included."""
        return len(self.prompt) - sum(len(example.indices) for example in self.examples) + 1

    @property
    def answer_rows(self) -> int:
        """The most rows its answers can take at a time."""
        return self.config.beam_size * (self.config.max_new_tokens - 1)

    def layout(self) -> TokenLayout:
        """Its tokens with examples first (so that rows computed earlier come first), and room for the answers."""
        layout = TokenLayout.from_prompt(self.prompt)
        room = self.config.max_new_tokens + 1
        (own,) = np.nonzero(self.prompt.sample_ids == 0)
        order = np.concatenate([*(example.indices for example in self.examples), own])
        return layout.take(order, room)


def make_request(
    prompt: Prompt, index: int, tokenizer: Tokenizer, model: ModelConfig, config: GenerationConfig
) -> Request:
    """Set a request up.

    Args:
        prompt: the encoded request.
        index: its place in the call.
        tokenizer: the model's.
        model: the model's configuration.
        config: the options of the call.

    Raises:
        PromptError: a subscript is too large for the model.
    """
    _check_subscripts(prompt, model)
    space = TokenSpace(
        vocab_size=model.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        forbidden=-1 if (tokenizer.unk_id, 0) in prompt.ext_tokens else tokenizer.unk_id,
        ext=tuple(token for token in prompt.ext_tokens if token[1]),
        num_answers=len(prompt.answers),
    )
    search: Search
    if config.sampling:
        search = SamplingSearch(space, config, index)
    elif config.beam_size > 1:
        search = BeamSearch(space, config)
    else:
        search = GreedySearch(space, config)
    return Request(prompt, config, search, examples_of(prompt))


def _check_subscripts(prompt: Prompt, model: ModelConfig) -> None:
    """Half-precision models compute phases in fp16, where those of large subscripts are infinite."""
    largest = max((sub for _, sub in prompt.ext_tokens), default=0)
    largest = max(largest, int(prompt.input_subs.max(initial=0)))
    with np.errstate(over="ignore"):
        phase = np.float16(largest * model.distance_scale)
    if model.half and not np.isfinite(phase):
        raise PromptError(
            f"the request has {largest + 1} different special or unknown tokens of one kind, more than the "
            "half-precision phases of this model can tell apart; use fewer"
        )
