"""What the columns of a request's logits mean, and which of them its answers may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpmbee.config import ModelConfig
from cpmbee.encoding import Prompt
from cpmbee.errors import PromptError
from cpmbee.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSpace:
    """What the columns of a request's logits mean.

    Tokens are numbered as the request sees them: vocabulary ids, then its own extension rows.

    Attributes:
        vocab_size: columns of the vocabulary.
        bos_id: ``<s>``, which opens each answer.
        eos_id: ``</s>``, which ends each answer.
        forbidden: a token that cannot be written, or -1.
        ext: (base id, subscript) of each extension row.
        num_answers: answers of the request, written one after the other.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    forbidden: int
    ext: tuple[tuple[int, int], ...]
    num_answers: int

    def base(self, token: int) -> tuple[int, int]:
        """The vocabulary id and subscript to feed for a chosen token."""
        return (token, 0) if token < self.vocab_size else self.ext[token - self.vocab_size]

    def ends(self, token: int, answer: int) -> bool:
        """Whether ``token`` in ``answer`` is the end of everything."""
        return token == self.eos_id and answer == self.num_answers - 1


def make_token_space(prompt: Prompt, tokenizer: Tokenizer, model: ModelConfig) -> TokenSpace:
    """The token space of an encoded request.

    Raises:
        PromptError: a subscript is too large for the model.
    """
    _check_subscripts(prompt, model)
    return TokenSpace(
        vocab_size=model.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        forbidden=-1 if (tokenizer.unk_id, 0) in prompt.ext_tokens else tokenizer.unk_id,
        ext=tuple(token for token in prompt.ext_tokens if token[1]),
        num_answers=len(prompt.answers),
    )


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
