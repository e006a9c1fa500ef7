import json
import string
from typing import Any

import numpy as np
import pytest

from cpmbee.config import ModelConfig
from cpmbee.model import IGNORE_INDEX
from cpmbee.relation import RelationBuilder
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import numerals
from cpmbee.train.batches import TrainingBatch, collate, encode_sample
from cpmbee.train.demo_data import SPECIALS, WORDS
from tests.golden import DATA, GOLDEN, requires_golden

GOLDEN_NAMES = {  # ours -> the research code's
    "input_ids": "inputs",
    "input_subs": "inputs_sub",
    "length": "length",
    "context": "context",
    "sample_ids": "sample_ids",
    "num_segments": "num_segments",
    "segment_ids": "segment_ids",
    "segment_rel_offset": "segment_rel_offset",
    "segment_rel": "segment_rel",
    "spans": "spans",
    "targets": "target",
    "ext_ids": "ext_ids",
    "ext_subs": "ext_sub",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer([*SPECIALS, *string.digits, *string.ascii_letters, *WORDS, *numerals.CHARACTERS, *"写成数字"])


def numeral(source: str, answer: Any) -> dict[str, Any]:
    return {"input": source, "prompt": "写成数字", "<ans>": answer}


@requires_golden
def test_packed_batch_equals_the_research_codes() -> None:
    tokenizer = Tokenizer.from_file(DATA / "bee_vocab.txt")
    raw = json.loads((GOLDEN / "train" / "raw_data.json").read_text(encoding="utf-8"))
    # The recording shuffled answers; of the only pair there is, it drew the other order.
    raw[1]["input"]["<ans>"] = dict(reversed(raw[1]["input"]["<ans>"].items()))
    samples = [encode_sample(item["input"], tokenizer, item["samples"]) for item in raw]
    batch = collate([samples[:3], samples[3:]], tokenizer, row_length=320)
    with np.load(GOLDEN / "train" / "batch.npz") as golden:
        for ours, theirs in GOLDEN_NAMES.items():
            np.testing.assert_array_equal(getattr(batch, ours), golden[theirs], err_msg=ours)


def test_targets_are_the_answer_and_its_end(tokenizer: Tokenizer) -> None:
    sample = encode_sample(numeral("三十", "30"), tokenizer)
    batch = collate([[sample, sample]], tokenizer, row_length=64)
    start = len(sample) - 3  # <s> 3 0
    three, zero = (tokenizer.token_to_id(char) for char in "30")
    wanted = [three, zero, tokenizer.eos_id]
    targets = batch.targets[0]
    assert targets[start : start + 3].tolist() == wanted
    assert targets[start + len(sample) : start + len(sample) + 3].tolist() == wanted
    assert np.count_nonzero(targets != IGNORE_INDEX) == 6
    assert batch.spans[0, : 2 * len(sample)].tolist() == [0] * len(sample) + [1] * len(sample)


def test_several_answers_each_end_before_the_next_begins(tokenizer: Tokenizer) -> None:
    batch = collate([[encode_sample(numeral("三十", {"question": "3", "options": "0"}), tokenizer)]], tokenizer)
    predicted = batch.targets[batch.targets != IGNORE_INDEX].tolist()
    end = tokenizer.eos_id
    assert predicted == [tokenizer.token_to_id("3"), end, tokenizer.token_to_id("0"), end]


def test_extension_tokens_are_predicted_by_their_row(tokenizer: Tokenizer) -> None:
    data = {"input": "1", "options": {"<option_a>": "1", "<option_b>": "2"}, "<ans>": "<option_b>"}
    batch = collate([[encode_sample(data, tokenizer)]], tokenizer)
    assert batch.ext_ids.tolist() == [tokenizer.token_to_id("<option>")]
    assert batch.ext_subs.tolist() == [1]
    predicted = batch.targets[batch.targets != IGNORE_INDEX].tolist()
    assert predicted == [tokenizer.vocab_size, tokenizer.eos_id]


def test_shuffling_moves_answers_only(tokenizer: Tokenizer) -> None:
    data = numeral("三十", {char: char for char in "0123456789"})
    plain = encode_sample(data, tokenizer)
    shuffled = encode_sample(data, tokenizer, rng=np.random.default_rng(1))
    first_answer = int(np.argmin(plain.context)) - 3  # the key before it belongs to the answers, too
    assert plain.input_ids[:first_answer].tolist() == shuffled.input_ids[:first_answer].tolist()
    assert plain.input_ids.tolist() != shuffled.input_ids.tolist()
    assert sorted(plain.input_ids.tolist()) == sorted(shuffled.input_ids.tolist())


def test_a_packed_sample_sees_what_it_sees_alone(tokenizer: Tokenizer) -> None:
    samples = [encode_sample(numeral(*pair), tokenizer) for pair in (("三十", "30"), ("五", "5"), ("十一", "11"))]
    config = ModelConfig(tokenizer.vocab_size, 8, 2, 4, 8, 1, position_bias_num_buckets=16)
    builder = RelationBuilder(config)

    def relation(batch: TrainingBatch) -> np.ndarray[Any, np.dtype[np.int16]]:
        return batch.relation(builder)

    packed = relation(collate([samples], tokenizer))[0]
    start = 0
    covered = np.zeros(packed.shape, bool)
    for sample in samples:
        block = slice(start, start + len(sample))
        alone = relation(collate([[sample]], tokenizer))[0]
        np.testing.assert_array_equal(packed[block, block], alone)
        covered[block, block] = True
        start += len(sample)
    assert (packed[~covered] == -1).all()
