"""What a verification asks the models: reproducible requests, and their arrays as the graph reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.errors import PromptError
from cpmbee.prompt import Prompt, encode_prompt
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.tokenizer import Tokenizer
from cpmbee.vocabulary import is_special

Int32 = NDArray[np.int32]

TEXT_TOKENS = 12  # of one text
COMPARED_POSITIONS = 24  # of a prompt whose logits are compared, at most
UNKNOWN = "\U00013000\U00013001"  # hieroglyphs: no vocabulary of this family has them


class GraphInputs(NamedTuple):
    """One call of the graph without the caches; the field names are those of the graph's inputs."""

    input_ids: Int32  # (B, Q)
    input_subs: Int32  # (B, Q)
    relation: NDArray[np.int16]  # (B, Q, K)
    slots: Int32  # (B, K)
    new_slots: Int32  # (B, Q)
    logits_index: Int32  # (B, R)
    ext_ids: Int32  # (E,)
    ext_subs: Int32  # (E,)


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        name: for the report.
        data: the request.
        examples: in-context examples.
    """

    name: str
    data: dict[str, Any]
    examples: tuple[dict[str, Any], ...] = ()


def make_requests(tokenizer: Tokenizer, seed: int = 0) -> list[Request]:
    """Requests of every kind that the encoding knows, with random text of the model's own vocabulary."""
    rng = np.random.default_rng(seed)
    plain = [t for i in range(tokenizer.vocab_size) if not is_special(t := tokenizer.id_to_token(i)) and "<" not in t]

    def text() -> str:
        return "".join(plain[i] for i in rng.integers(0, len(plain), TEXT_TOKENS))

    options = {f"<option_{i}>": text() for i in range(4)}
    examples = tuple({"input": text(), "<ans>": text()} for _ in range(2))
    masked = f"{text()}<mask_0>{text()}<mask_1>"
    inner = {"c": text(), "d": {"e": text()}}
    return [
        Request("one segment", {"input": text(), "<ans>": ""}),
        Request("two answers", {"document": masked, "<ans>": {"<mask_0>": "", "<mask_1>": ""}}),
        Request("unknown text", {"input": f"{text()}{UNKNOWN}{text()}", "prompt": text(), "<ans>": ""}),
        Request("options", {"input": text(), "options": options, "question": text(), "<ans>": ""}),
        Request("nested", {"a": {"b": inner, "f": text()}, "<user_1>": text(), "<ans>": ""}),
        Request("examples", {"input": text(), "<ans>": ""}, examples),
    ]


class Probe:
    """A request on its way through the graph: its tokens, then answer tokens one by one.

    Attributes:
        name: of the request.
        prompt: its arrays.
        ext: (base id, subscript) of its extension tokens.
        ids: token ids, the opening ``<s>`` of the answer included.
        subs: their subscripts.
        first_row: its tokens take the cache rows from here on.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, config: ModelConfig, first_row: int, reserve: int
    ) -> None:
        self.name = request.name
        self.prompt: Prompt = encode_prompt(request.data, tokenizer, request.examples)
        self.ext = [token for token in self.prompt.ext_tokens if token[1] > 0]
        self.first_row = first_row
        self._relations = RelationBuilder(config)
        self._layout = TokenLayout.from_prompt(self.prompt, reserve=reserve)
        self._answer = self.prompt.answers[0].segment_id
        self.ids = [*self.prompt.input_ids.tolist(), tokenizer.bos_id]
        self.subs = [*self.prompt.input_subs.tolist(), 0]
        self._layout.append(self._answer, 0)

    def __len__(self) -> int:
        return len(self.ids)

    def relation(self, q_start: int) -> NDArray[np.int16]:
        """(Q, K) of the tokens from ``q_start`` on.

        Raises:
            PromptError: the model's bias table has no row for a relation in this request.
        """
        out = np.empty((len(self) - q_start, len(self)), np.int16)
        self._relations.fill(out, self._layout, q_start)
        return out

    def append(self, token: tuple[int, int]) -> None:
        """Write one answer token, given by base id and subscript."""
        self._layout.append(self._answer, len(self) - len(self.prompt))
        self.ids.append(token[0])
        self.subs.append(token[1])

    def inputs(self, q_start: int, ext: list[tuple[int, int]]) -> GraphInputs:
        """A call that reads the tokens from ``q_start`` on, those before it being in the cache."""
        return batch_inputs([self], q_start, ext)


def make_probes(requests: list[Request], tokenizer: Tokenizer, config: ModelConfig, reserve: int) -> list[Probe]:
    """Probes of the requests that the model can encode, on cache rows that do not overlap.

    A model with few segment buckets cannot encode deep nesting; such requests are left out.
    """
    probes = []
    first_row = 1
    for request in requests:
        probe = Probe(request, tokenizer, config, first_row, reserve)
        try:
            probe.relation(0)
        except PromptError:
            continue
        probes.append(probe)
        first_row += len(probe) + reserve
    return probes


def batch_inputs(probes: Sequence[Probe], q_start: int, ext: list[tuple[int, int]]) -> GraphInputs:
    """One call for several probes from token ``q_start`` on, padded behind the shorter ones."""
    keys = max(len(probe) for probe in probes)
    shape = (len(probes), keys - q_start)
    ids, subs, new_slots = (np.zeros(shape, np.int32) for _ in range(3))
    slots = np.zeros((len(probes), keys), np.int32)
    relation = np.full((*shape, keys), -1, np.int16)
    index = np.empty((len(probes), min(COMPARED_POSITIONS, shape[1])), np.int32)
    for i, probe in enumerate(probes):
        length = len(probe) - q_start
        ids[i, :length] = probe.ids[q_start:]
        subs[i, :length] = probe.subs[q_start:]
        slots[i, : len(probe)] = probe.first_row + np.arange(len(probe))
        new_slots[i, :length] = slots[i, q_start : len(probe)]
        relation[i, :length, : len(probe)] = probe.relation(q_start)
        index[i] = np.linspace(0, length - 1, index.shape[1]).round()
    columns = np.array(ext, np.int32).reshape(-1, 2)
    return GraphInputs(ids, subs, relation, slots, new_slots, index, columns[:, 0].copy(), columns[:, 1].copy())
