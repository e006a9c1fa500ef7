"""Things that no caller should hand over, and calls of every compiled entry with them; seeded.

Run ``python -m tests.engine.hostile 20000 1``: it ends with 0 unless the process is killed or an error is raised
that a caller could not expect.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cpmbee import _logits, _prompt, _quantize, _relation, _tokenizer
from cpmbee.encoding import EncodedData
from cpmbee.errors import CpmBeeError
from tests.engine.relation_cases import SMALL, columns_with
from tests.engine.small_vocabulary import TOKENS

EXPECTED = (CpmBeeError, ValueError, TypeError, OverflowError, MemoryError, BufferError)
TOKENIZER = _tokenizer.Tokenizer(TOKENS)


class Text(str):
    """Runs code of its own wherever it is read."""

    __slots__ = ()

    def __str__(self) -> str:
        return "other"

    def __eq__(self, other: object) -> bool:
        return False

    def __len__(self) -> int:
        return 10**6

    def __hash__(self) -> int:
        return 0

    def find(self, *args: Any) -> int:  # type: ignore[override]
        raise RuntimeError("read")


class Number(int):
    """Is another number whenever it is asked."""

    def __index__(self) -> int:
        return random.choice([-1, 2**70, 3])

    def __eq__(self, other: object) -> bool:
        return random.random() < 0.5

    def __hash__(self) -> int:
        return random.choice([0, 3])


class Changing(dict[Any, Any]):
    """Runs ``change`` whenever its items are read."""

    change: Callable[[], object] = staticmethod(lambda: None)

    def items(self) -> Any:
        self.change()
        return super().items()


class OddItems(dict[Any, Any]):
    """Its items are whatever it holds under None."""

    def items(self) -> Any:
        return self[None]


class SkipsInit(_tokenizer.Tokenizer):
    def __init__(self) -> None:
        pass


class OtherTrie(_tokenizer.Tokenizer):
    """Says that its trie is one that nobody keeps."""

    @property
    def trie_capsule(self) -> object:
        return _tokenizer.Tokenizer(TOKENS).trie_capsule


def endless() -> Iterator[tuple[str, str]]:
    while True:
        yield "a", "b"


def mutating(rng: random.Random) -> dict[str, Any]:
    """A request whose dicts are emptied, filled and freed while it is read."""
    root: dict[Any, Any] = {"<ans>": ""}
    nest = root
    for i in range(rng.randrange(1, 5)):
        lazy = Changing(a="b" * i)
        inner: dict[Any, Any] = {f"k{j}": "天" for j in range(rng.randrange(6))}
        inner["lazy"] = lazy
        inner |= {f"z{j}": "天" for j in range(rng.randrange(30))}
        lazy.change = rng.choice(
            [root.clear, nest.clear, inner.clear, lazy.clear, gc.collect, lambda n=nest: n.update(new={}, other="x")]
        )
        nest["n"] = inner
        nest = inner
    return root


def odd(rng: random.Random) -> Any:
    """Anything at all."""
    return rng.choice(
        [
            None, True, -1, 0, 5, 2**31, -(2**31), 2**63, 10**30, -(10**5000), 1.5, float("nan"), "", "a", "<",
            "<mask_3>é", "\ud800", b"a", [], [-1], [2**40], [None], (), {}, {"a": 1}, {1: "a"}, {-5: "é"}, {2**40: "é"},
            {"<ans>": ""}, Text("天<mask>"), Number(3), Changing(a="b"), OddItems({None: endless()}),
            OddItems({None: [1, 2]}), OddItems({None: [("a",)]}), object(), iter([1, 2]), range(5), np.int64(3),
            np.float32(2), np.zeros(3), np.zeros(0), np.zeros((7, 2), np.int32), np.full((7, 2), 2**40),
            np.zeros((2, 2, 2), np.int16), np.array(["a"]), np.zeros(4, np.int32)[::2], np.zeros((3, 3), ">i2"),
            np.array(None), SkipsInit, lambda: 1, EncodedData.__new__(EncodedData), TOKENIZER, mutating(rng),
        ]
    )  # fmt: skip


def objects(rng: random.Random) -> tuple[Any, Any, Any]:
    """A tokenizer, a layout and a builder, sometimes ones that were never initialized."""
    tokenizer = rng.choice(
        [TOKENIZER, TOKENIZER, SkipsInit(), OtherTrie(TOKENS), _tokenizer.Tokenizer.__new__(SkipsInit)]
    )
    layout = _relation.TokenLayout(columns_with(num_segments=2, segment=rng.randrange(2)), np.zeros(4, np.int32))
    builder = _relation.RelationBuilder(SMALL)
    if rng.random() < 0.2:
        layout = _relation.TokenLayout.__new__(_relation.TokenLayout)
    if rng.random() < 0.2:
        builder = _relation.RelationBuilder.__new__(_relation.RelationBuilder)
    if rng.random() < 0.2:
        layout.truncate(rng.randrange(len(layout) + 1))
    return tokenizer, layout, builder


def array(rng: random.Random, dtype: Any, ndim: int) -> Any:
    """An array that may well be right; or anything."""
    if rng.random() < 0.1:
        return odd(rng)
    shape = [rng.choice([0, 1, 3, 4, 16, 32, 40]) for _ in range(ndim)]
    values = np.zeros(shape, dtype)
    values.ravel()[: values.size] = rng.choice([0, 1, 3]) if rng.random() < 0.7 else rng.choice([100, 255, 127])
    return values if rng.random() < 0.9 else values.T


def calls(rng: random.Random) -> list[Callable[[], object]]:
    """Every public entry, each once, with arguments of this draw."""
    tokenizer, layout, builder = objects(rng)
    anything = [odd(rng) for _ in range(10)]
    one, two, three, *more = anything
    request = rng.choice([mutating(rng), {"<ans>": "", "x": one}, one])
    integers = [rng.choice([-1, 0, 1, 2, 3, 4, 33, 40, 2**31, 2**62]) for _ in range(4)]
    shape = rng.choice([(3, 3), (0, 0), (3, 5), (2, 3), (1, 3)])
    out = rng.choice(
        [np.empty(shape, np.int16), np.empty((3, 6), np.int16)[:, ::2], np.empty((3, 3), np.int16)[::-1], one]
    )
    names = (
        "context",
        "sample_ids",
        "num_segments",
        "segment_ids",
        "segment_rel_offset",
        "segment_rel",
        "spans",
        "length",
    )
    batch = {name: rng.choice([np.zeros((1, 3), np.int32), np.full((1, 3), 2), odd(rng)]) for name in names}
    earlier = EncodedData(*([np.zeros(1, np.int32)] * 5), 1, one, two)  # type: ignore[arg-type]
    return [
        lambda: tokenizer.encode(one, two),
        lambda: tokenizer.encode("é<x>a", one),
        lambda: tokenizer.encode("é<x>a", {rng.choice([-5, 0, 3, 70, 2**31 - 1]): "é"}),
        lambda: tokenizer.decode(one, two),
        lambda: tokenizer.decode([one, two], {1: "a"}),
        lambda: tokenizer.id_to_token(one),
        lambda: tokenizer.token_to_id(one),
        lambda: tokenizer.escape(one),
        lambda: tokenizer.unescape(one),
        lambda: tokenizer.__init__(one),
        lambda: _tokenizer.Tokenizer(one),
        lambda: _tokenizer.Tokenizer([*TOKENS, one]),
        lambda: (copy.copy(tokenizer), repr(tokenizer), tokenizer.tokens, tokenizer.vocab_size),
        lambda: _prompt.encode_prompt(request, tokenizer, rng.choice([(), [request], one])),
        lambda: _prompt.encode_data(request, tokenizer, rng.choice([None, one, earlier]), rng.choice([None, two])),
        lambda: _prompt.encode_data(request, tokenizer, None, np.random.default_rng(1)),
        lambda: _prompt.encode_prompt(request, one),
        lambda: _relation.TokenLayout(one, two, three),
        lambda: _relation.TokenLayout(array(rng, np.int32, 2), array(rng, np.int32, 1)),
        lambda: _relation.TokenLayout.from_prompt(one),
        lambda: layout.append(one, two, three, *more[:2]),
        lambda: layout.append(*integers),
        lambda: layout.truncate(one),
        lambda: layout.take(one),
        lambda: layout.__init__(one, two),
        lambda: (layout.columns, len(layout), layout.copy().columns, copy.copy(layout).columns),
        lambda: pickle.loads(pickle.dumps(layout)).columns,  # noqa: S301
        lambda: builder.fill(out, layout, rng.choice([0, 0, 1, 3, -1, one])),
        lambda: builder.fill(one, two, three),
        lambda: builder.packed(**batch),
        lambda: builder.__init__(one),
        lambda: copy.deepcopy(builder),
        lambda: _logits.select(
            array(rng, np.float32, 1), *integers[:3], array(rng, np.int32, 1), rng.choice([1.0, 0.0, -1.0, 2.0, one]),
            integers[3], array(rng, np.float32, 1), array(rng, np.int32, 1),
        ),
        lambda: _logits.select(
            np.zeros(40, np.float32), 32, 32, 40, array(rng, np.int32, 1), 2.0, -1, np.zeros(3, np.float32),
            np.zeros(3, np.int32),
        ),
        lambda: _quantize.quantize(
            array(rng, np.float32, 2), array(rng, np.float32, 1), rng.choice([4, 8, 0, -1, one]),
            rng.choice([32, 64, 0, -32, 2**31 - 1]), array(rng, np.float32, 1), rng.choice([True, one]),
        ),
        lambda: _quantize.widen(array(rng, np.uint16, 2), 1.0, array(rng, np.float32, 2)),
        lambda: _quantize.expand(
            np.zeros((rng.randrange(3), rng.choice([0, 4, 8, 16]), 16, 4), np.uint8),
            np.zeros((rng.randrange(3), rng.choice([0, 1, 2]), 16), np.uint16),
            rng.choice([4, 8, 0, 5]), array(rng, np.float32, 2),
        ),
    ]  # fmt: skip


def require_one_line(error: Exception) -> None:
    """Of the project's own errors."""
    if isinstance(error, CpmBeeError):
        assert "\n" not in str(error)
        assert len(str(error)) <= 500


def run(count: int, seed: int) -> dict[str, int]:
    """Makes at least ``count`` calls; how many ended how.

    Raises:
        AssertionError: an error has more than one line, or is of a kind that no caller could expect.
    """
    rng = random.Random(seed)
    random.seed(seed)
    ends: dict[str, int] = {}
    done = 0
    while done < count:
        for call in calls(rng):
            try:
                call()
                end = "returned"
            except EXPECTED as error:
                end = type(error).__name__
                require_one_line(error)
            except RuntimeError as error:
                if "built once" not in str(error):
                    raise
                end = "RuntimeError"
            ends[end] = ends.get(end, 0) + 1
            done += 1
    return ends


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2])))
