"""How fast text becomes arrays: tokenizer, prompt encoder, relation matrix; compiled beside plain Python.

Run ``python -m cpmbee.bench.text``. It reads CCPM and the published vocabulary where the
development data lies (``CPMBEE_SHARED``), else a built-in paragraph and the vocabulary of its characters.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee import _prompt, _relation, _tokenizer
from cpmbee.bench.environment import SHARED, write_result
from cpmbee.config import ModelConfig
from cpmbee.plain import prompt as plain_prompt
from cpmbee.plain import relation as plain_relation
from cpmbee.plain import tokenizer as plain_tokenizer

QUESTION = "这段话形容了哪句诗的意境？"
PARAGRAPH = (
    "昏暗的灯熄灭了又被重新点亮。诗人站在船头，望着两岸的青山慢慢远去，江水在月光下静静地流着，"
    "远处传来几声雁鸣。The quick brown fox jumps over the lazy dog 12345 times!\n"
)
SPECIALS = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>")
KEYS = 4096

Request = dict[str, Any]


def main() -> None:
    """Measure, print a Markdown table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each measurement; the fastest counts")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    tokens, requests, source = load()
    compiled = measure(_tokenizer.Tokenizer(tokens), _prompt, _relation, requests, arguments.repeats)
    slow = requests[: len(requests) // 20]
    plain = measure(plain_tokenizer.Tokenizer(tokens), plain_prompt, plain_relation, slow, 1)
    print("| work | compiled | plain Python |\n|---|---:|---:|")
    for name, value in compiled.items():
        print(f"| {name} | {value:,.1f} | {plain[name]:,.1f} |")
    print(f"\nText: {source}, {len(requests):,} requests. One core.")
    if not arguments.no_write:
        write_result("text", {"data": source, "requests": len(requests), "compiled": compiled, "plain": plain})


def load() -> tuple[tuple[str, ...], list[Request], str]:
    """Vocabulary, requests, and where they come from."""
    vocabulary, examples = SHARED / "data" / "bee_vocab.txt", SHARED / "data" / "ccpm" / "train.jsonl"
    if vocabulary.exists() and examples.exists():
        tokens = plain_tokenizer.Tokenizer.from_file(vocabulary).tokens
        return tokens, [ccpm_request(line) for line in read_lines(examples)], "CCPM (train), published vocabulary"
    words = {PARAGRAPH[i : i + n] for i in range(len(PARAGRAPH)) for n in (1, 2)} - {"\n", " "}
    request = make_request(PARAGRAPH, [PARAGRAPH[i : i + 7] for i in range(0, 28, 7)])
    return (*SPECIALS, *sorted(words)), [request] * 5000, "a built-in paragraph"


def read_lines(path: Path) -> list[str]:
    """The ``input`` of each line."""
    return [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]


def ccpm_request(line: str) -> Request:
    """``[翻译]text[0]line[1]line[2]line[3]line[答案]`` as a request."""
    _, text, *lines, _ = re.split(r"\[(?:翻译|[0-3]|答案)\]", line)
    return make_request(text, lines)


def make_request(text: str, lines: list[str]) -> Request:
    """Which of the ``lines`` does the ``text`` describe?"""
    options = {f"<option_{i}>": line for i, line in enumerate(lines)}
    return {"input": text, "options": options, "question": QUESTION, "<ans>": ""}


def measure(tokenizer: Any, prompt: Any, relation: Any, requests: list[Request], repeats: int) -> dict[str, float]:
    """The numbers of one implementation, by name; larger is better but for those in microseconds."""
    texts = ["".join([request["input"], *request["options"].values()]) for request in requests]
    whole = "\n".join(texts)
    unknown = "\ue000" * len(whole)
    megabytes = len(whole.encode()) / 1e6
    builder = relation.RelationBuilder(small_config())
    layout = long_layout(tokenizer, prompt, relation, requests)
    row, matrix = np.empty((1, KEYS), np.int16), np.empty((KEYS, KEYS), np.int16)
    ids, table = tokenizer.encode(whole)
    return {
        "tokenizer, one text (MB/s)": megabytes / fastest(lambda: tokenizer.encode(whole), repeats),
        "tokenizer, request by request (MB/s)": megabytes
        / fastest(lambda: exhaust(map(tokenizer.encode, texts)), repeats),
        "tokenizer, unknown characters only (MB/s)": 3e-6
        * len(unknown)
        / fastest(lambda: tokenizer.encode(unknown), repeats),
        "decode (MB/s)": megabytes / fastest(lambda: tokenizer.decode(ids, table), repeats),
        "encode_prompt (requests/s)": len(requests)
        / fastest(lambda: exhaust(prompt.encode_prompt(request, tokenizer) for request in requests), repeats),
        f"relation, one query, {KEYS} keys, {int(layout.columns[5, 0])} segments (µs)": 1e4
        * fastest(lambda: exhaust(builder.fill(row, layout, KEYS - 1) for _ in range(100)), repeats),
        f"relation, {KEYS} queries, {KEYS} keys (µs)": 1e6 * fastest(lambda: builder.fill(matrix, layout), repeats),
    }


def long_layout(tokenizer: Any, prompt: Any, relation: Any, requests: list[Request]) -> Any:
    """A layout of `KEYS` tokens: many requests as parts of one, then an answer."""
    data: Request = {}
    for number, request in enumerate(requests):
        longer: Request = {**data, f"part {number}": request["options"] | {"input": request["input"]}}
        encoded = prompt.encode_prompt({**longer, "<ans>": ""}, tokenizer)
        if len(encoded) > KEYS - 16:
            break
        data = longer
    encoded = prompt.encode_prompt({**data, "<ans>": ""}, tokenizer)
    layout = relation.TokenLayout.from_prompt(encoded, reserve=KEYS)
    while len(layout) < KEYS:
        layout.append(encoded.answers[0].segment_id, len(layout))
    return layout


def small_config() -> ModelConfig:
    """Bucket numbers of the published models; the other sizes do not matter here."""
    return ModelConfig(vocab_size=1, hidden_size=2, num_attention_heads=1, dim_head=2, dim_ff=2, num_hidden_layers=1)


def exhaust(results: Iterable[Any]) -> None:
    """Do the work of an iterator and keep nothing."""
    for _ in results:
        pass


def fastest(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
