"""Where the demo model's training starts: random values, arranged so that looking things up need not be discovered.

The answer to "write this in traditional characters" is a copy with changes. Between segments a CPM-Bee model sees no
distance, so a copy is made by finding the character just written in the input and taking the next one; and an option is
found by its content and named by its key. From plain random values these take most of a short training to discover (a
choice between options is not found in it at all); here their parts are there from the start, and training tunes them:

- The first head prefers the token before and the key of a value, the second the token behind.
- In the other heads queries and keys project alike, so that equal characters find each other. They look away from
  themselves; one looks from an answer to the options, one to the other values of the request. The marks of a segment's
  start and end, which are equal everywhere, count for nothing there.
- All heads but the second pass on what they find as it is: their output undoes the projection of their values.
- A traditional character starts as its simplified partner, moved in a direction that all of them share.
- Blocks add little at first, so that the token itself is what later layers see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cpmbee.model import CpmBee
from cpmbee.prompt import MAX_DEPTH
from cpmbee.tokenizer import Tokenizer

NEIGHBOUR_HEAD, NEXT_HEAD, OPTION_HEAD, VALUE_HEAD = range(4)
MATCHING_HEADS = (OPTION_HEAD, VALUE_HEAD)
COPYING_HEADS = (NEIGHBOUR_HEAD, OPTION_HEAD, VALUE_HEAD)

ATTENTION_SCALE = 0.3  # of the matrices whose results are added to the residual stream
FEED_FORWARD_SCALE = 0.1
TABLE_SCALE = 0.1  # of the biases that nothing here sets
PARTNER_SHIFT = 0.5  # length of the shared direction, in units of an embedding
PARTNER_NOISE = 0.1  # what partners differ by otherwise


@torch.no_grad()
def init_demo_model(model: CpmBee, tokenizer: Tokenizer, partners: Mapping[str, str], seed: int) -> None:
    """Fill all parameters.

    Args:
        model: with four heads.
        tokenizer: its vocabulary.
        partners: simplified character of every traditional one that differs from it; those that the vocabulary
            lacks are left out.
        seed: of the random values.
    """
    generator = torch.Generator().manual_seed(seed)
    model.init_parameters(generator)
    embedding = model.input_embedding.weight
    _pair_embeddings(embedding, tokenizer, partners, generator)
    _set_biases(model)
    _arrange_heads(model, embedding[[tokenizer.bos_id, tokenizer.eos_id]])


def _set_biases(model: CpmBee) -> None:
    table = model.position_bias.relative_attention_bias
    table.mul_(TABLE_SCALE)
    behind = model.config.position_bias_num_buckets // 2  # rows from here on are for keys behind their query
    table[1, NEIGHBOUR_HEAD] = 4
    table[behind + 1, NEXT_HEAD] = 4
    table[0, OPTION_HEAD] = table[0, VALUE_HEAD] = -4  # the token itself
    table[_between_segments(model, up=1, down=0), NEIGHBOUR_HEAD] = 8  # from a value to its key
    table[_between_segments(model, up=2, down=3), OPTION_HEAD] = 4  # from an answer to the value of an option
    table[_between_segments(model, up=2, down=2), VALUE_HEAD] = 2  # from an answer to the request's values


def _between_segments(model: CpmBee, up: int, down: int) -> int:
    """The bias row for a key in another segment, ``up`` steps to the common ancestor and ``down`` from there."""
    return model.config.position_bias_num_buckets + up * MAX_DEPTH + down


def _arrange_heads(model: CpmBee, marks: Tensor) -> None:
    """Project queries and keys of matching heads alike and without ``marks`` (M, D); undo projections of values."""
    basis = torch.linalg.qr(marks.t())[0]  # (D, M)
    width = model.config.dim_head
    parameters = dict(model.named_parameters())
    for name, query in parameters.items():
        if not name.endswith("project_q.weight"):
            continue
        key, value, out = (
            parameters[name.replace("project_q", part)] for part in ("project_k", "project_v", "attention_out")
        )
        for head in MATCHING_HEADS:
            rows = slice(head * width, (head + 1) * width)
            query[rows] -= query[rows] @ basis @ basis.t()
            key[rows] = query[rows]
        for head in COPYING_HEADS:
            rows = slice(head * width, (head + 1) * width)
            out[:, rows] = value[rows].t()
        out.mul_(ATTENTION_SCALE)
        parameters[name.replace("self_att.self_attention.project_q", "ffn.ffn.w_out")].mul_(FEED_FORWARD_SCALE)


def _pair_embeddings(
    weight: Tensor, tokenizer: Tokenizer, partners: Mapping[str, str], generator: torch.Generator
) -> None:
    dim = weight.shape[1]
    shared = torch.randn(dim, generator=generator)
    shared *= PARTNER_SHIFT * math.sqrt(dim) / shared.norm()
    for traditional, simplified in partners.items():
        ours, theirs = tokenizer.token_to_id(traditional), tokenizer.token_to_id(simplified)
        if ours is not None and theirs is not None:
            weight[ours] = weight[theirs] + shared + PARTNER_NOISE * torch.randn(dim, generator=generator)
