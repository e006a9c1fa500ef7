"""Requests with their answers, token by token: what a model is shown when its probabilities are to be compared.

The answers are fed as they are given, each in its place, so that two models are asked the same question at every token,
whatever they would have written themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.errors import ConfigError, CpmBeeError, PromptError
from cpmbee.export.probes import GraphInputs
from cpmbee.json_file import parse_json
from cpmbee.jsonl import numbered_lines
from cpmbee.prompt import Prompt, encode_prompt
from cpmbee.regular_file import open_regular
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.tokenizer import Tokenizer

ANSWER = "<ans>"


@dataclass(frozen=True)
class Transcript:
    """One request, read and answered.

    Attributes:
        inputs: one call of the graph; logits are wanted where the next token is one of an answer.
        targets: columns of the logits that the given answers have there, ends included; empty where the request has
            no answers and only the first token's place is looked at.
        forbidden: columns that no answer of this request may have.
    """

    inputs: GraphInputs
    targets: NDArray[np.int64]
    forbidden: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return self.inputs.input_ids.size


def read_requests(path: str | Path) -> list[dict[str, Any]]:
    """Requests of a JSON Lines file.

    Raises:
        ConfigError: the file cannot be read, has no requests, or has a line that is none; names the line.
    """
    path = Path(path)
    requests = []
    with open_regular(path, "requests", ConfigError) as file:
        for number, line in numbered_lines(file, str(path), ConfigError):
            request = parse_json(line, f"{path}, line {number}", ConfigError)
            if not isinstance(request, dict) or ANSWER not in request:
                raise ConfigError(f'{path}, line {number}: not a request, an object with the key "{ANSWER}"')
            requests.append(request)
    if not requests:
        raise ConfigError(f"{path}: has no requests")
    return requests


def read_transcripts(path: str | Path, tokenizer: Tokenizer, config: ModelConfig) -> list[Transcript]:
    """Transcripts of a JSON Lines file; see `read_requests` and `make_transcript`.

    Raises:
        ConfigError: a line is not a request that this model can read; names the line's number among the requests.
    """
    transcripts = []
    for number, request in enumerate(read_requests(path), 1):
        try:
            transcripts.append(make_transcript(request, tokenizer, config))
        except CpmBeeError as error:
            raise ConfigError(f"{path}, request {number}: {error}") from None
    return transcripts


def make_transcript(request: dict[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> Transcript:
    """Encode a request as the engine would, and then the answers that it holds.

    Args:
        request: a nested dict; under ``<ans>`` are its answers, or nothing but empty texts.
        tokenizer: the model's.
        config: the model's.

    Raises:
        PromptError: it is not a request of this model, has only some of its answers, or one that cannot be written.
        TokenizeError: text with a lone ``<``.
    """
    prompt = encode_prompt(request, tokenizer)
    texts = [_text(request[ANSWER], slot.path) for slot in prompt.answers]
    if any(texts) and not all(texts):
        raise PromptError("has some of its answers but not all of them")
    ids, subs = prompt.input_ids.tolist(), prompt.input_subs.tolist()
    columns = _columns(prompt, tokenizer)
    layout = TokenLayout.from_prompt(prompt, reserve=sum(map(len, texts)) + 2 * len(texts))
    targets: list[int] = []
    for slot, text in zip(prompt.answers, texts, strict=True):
        answer = list(_tokens(text, prompt, tokenizer))
        for position, token in enumerate([(tokenizer.bos_id, 0), *answer]):
            layout.append(slot.segment_id, position)
            ids.append(token[0])
            subs.append(token[1])
        targets += [*(columns.get(token, token[0]) for token in answer), tokenizer.eos_id]
        if not any(texts):
            targets = []
            break
    first = len(prompt)
    forbidden = () if (tokenizer.unk_id, 0) in prompt.ext_tokens else (tokenizer.unk_id,)
    inputs = _inputs(ids, subs, layout, list(columns), np.arange(first, len(ids)), config)
    return Transcript(inputs, np.array(targets, np.int64), forbidden)


def _text(answers: Any, path: tuple[str, ...]) -> str:
    for key in path:
        answers = answers[key]
    return "" if answers is None else str(answers)


def _columns(prompt: Prompt, tokenizer: Tokenizer) -> dict[tuple[int, int], int]:
    """Column of the logits of each extension token."""
    extension = [token for token in prompt.ext_tokens if token[1]]
    return {token: tokenizer.vocab_size + i for i, token in enumerate(extension)}


def _tokens(text: str, prompt: Prompt, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """(base id, subscript) of an answer's tokens.

    Raises:
        PromptError: a token is neither in the vocabulary nor in the request.
    """
    by_text = {text: token for token, text in prompt.ext_tokens.items()}
    ids, table = tokenizer.encode(text)
    for token in ids:
        piece = table.get(token)
        if piece is None:
            yield token, 0
        elif piece in by_text:
            yield by_text[piece]
        else:
            raise PromptError(f"its answer has {piece!r}, which is neither in the vocabulary nor in the request")


def _inputs(
    ids: list[int],
    subs: list[int],
    layout: TokenLayout,
    ext: list[tuple[int, int]],
    index: NDArray[np.int64],
    config: ModelConfig,
) -> GraphInputs:
    """One call that reads everything into an empty cache."""
    tokens = len(ids)
    relation = np.empty((1, tokens, tokens), np.int16)
    RelationBuilder(config).fill(relation[0], layout, 0)
    slots = np.arange(1, tokens + 1, dtype=np.int32)[None]
    columns = np.array(ext, np.int32).reshape(-1, 2)
    return GraphInputs(
        input_ids=np.array([ids], np.int32),
        input_subs=np.array([subs], np.int32),
        relation=relation,
        slots=slots,
        new_slots=slots,
        logits_index=index.astype(np.int32)[None],
        ext_ids=columns[:, 0].copy(),
        ext_subs=columns[:, 1].copy(),
    )
