from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import collate, encode_sample
from cpmbee.train.demo import training_batches, vocabulary
from cpmbee.train.evaluate import greedy_answers
from cpmbee.train.numerals import make_example
from cpmbee.train.trainer import Trainer, TrainerConfig, TrainingResult


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to the meeting of threads than they gain, above all on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(vocabulary())


def tiny_model(tokenizer: Tokenizer, seed: int = 0) -> CpmBee:
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 16, 48, 2, position_bias_num_buckets=32)
    model = CpmBee(config)
    model.init_parameters(torch.Generator().manual_seed(seed))
    return model


def short_run(tokenizer: Tokenizer, steps: int, seed: int = 0) -> tuple[CpmBee, TrainingResult]:
    model = tiny_model(tokenizer, seed)
    batches = training_batches(tokenizer, np.random.default_rng(seed), batch_size=16)
    return model, Trainer(model, TrainerConfig(steps, warmup=5)).train(batches)


def test_the_loss_falls(tokenizer: Tokenizer) -> None:
    _, result = short_run(tokenizer, 40)
    assert len(result.losses) == 40
    assert np.mean(result.losses[-5:]) < 0.8 * result.losses[0]
    assert result.tokens > 40 * 16 * 20


def test_equal_seeds_give_equal_weights(tokenizer: Tokenizer) -> None:
    first, second = (short_run(tokenizer, 4)[0].state_dict() for _ in "ab")
    other = short_run(tokenizer, 4, seed=1)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_data_that_ends_early_is_an_error(tokenizer: Tokenizer) -> None:
    batches = islice(training_batches(tokenizer, np.random.default_rng(0), 4), 2)
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        Trainer(tiny_model(tokenizer), TrainerConfig(3)).train(batches)


def test_greedy_answers_of_a_memorized_pair(tokenizer: Tokenizer) -> None:
    examples = [make_example(37, "digits"), make_example(37, "chinese")]
    model = tiny_model(tokenizer)
    batch = collate([[encode_sample(example.solved, tokenizer)] for example in examples], tokenizer)
    Trainer(model, TrainerConfig(80, learning_rate=1e-2, warmup=5)).train([batch] * 80)
    answers = greedy_answers(model, tokenizer, [example.request for example in examples], 8)
    assert answers == ["37", "三十七"]
    # A batch gives what single requests give, and a budget that is too small gives no answer.
    assert answers == [greedy_answers(model, tokenizer, [example.request], 8)[0] for example in examples]
    assert greedy_answers(model, tokenizer, [example.request for example in examples], 3) == ["37", None]
