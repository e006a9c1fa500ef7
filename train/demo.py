"""Train the bundled demo model: ``python -m cpmbee.train.demo OUT`` reproduces the checkpoint in ``model/demo``."""

from __future__ import annotations

import argparse
import json
import logging
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee, load_model, save_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import numerals
from cpmbee.train.batches import TrainingBatch, collate, encode_sample
from cpmbee.train.demo_card import Accuracy, model_card
from cpmbee.train.evaluate import greedy_answers
from cpmbee.train.trainer import Trainer, TrainerConfig

logger = logging.getLogger("cpmbee.train")

SPECIALS = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>")
WORDS = ("input", "prompt", "question", "options")  # keys of requests, one token each
PUNCTUATION = "，。？！：；、（）“”《》"
MAX_NEW_TOKENS = 24  # the longest numeral has 15 characters
EVALUATION_BATCH = 250
EVALUATION_SEED = 2024
SAMPLE_SEED = 2025
SAMPLE_COUNT = 100  # requests per direction that come with the model


def vocabulary() -> list[str]:
    """The demo model's tokens in id order: specials, ASCII, request keys, and the characters of the task."""
    ascii_characters = [char for char in string.printable if char > " "]
    chinese = dict.fromkeys(numerals.CHARACTERS + "".join(numerals.PROMPTS.values()) + PUNCTUATION)
    return [*SPECIALS, *ascii_characters, *WORDS, *chinese]


def model_config(vocab_size: int) -> ModelConfig:
    """Shape of the demo model."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_attention_heads=4,
        dim_head=32,
        dim_ff=320,
        num_hidden_layers=4,
        position_bias_num_buckets=64,
        position_bias_num_segment_buckets=256,
        position_bias_max_distance=128,
    )


def training_batches(tokenizer: Tokenizer, rng: np.random.Generator, batch_size: int) -> Iterator[TrainingBatch]:
    """An endless stream of batches with one sample a row; rows of one batch are about equally long.

    Samples are drawn for several batches at once and sorted by length, so that little is padding; the batches of one
    draw come in random order.
    """
    batches_per_draw = 16
    source = numerals.examples(rng, held_out=False)
    while True:
        drawn = islice(source, batches_per_draw * batch_size)
        samples = sorted((encode_sample(example.solved, tokenizer) for example in drawn), key=len)
        for start in rng.permutation(batches_per_draw) * batch_size:
            yield collate([[sample] for sample in samples[start : start + batch_size]], tokenizer)


def evaluate(model: CpmBee, tokenizer: Tokenizer, count: int) -> dict[numerals.Direction, Accuracy]:
    """Exact-match accuracy on ``count`` held-out numbers per direction, by free greedy decoding."""
    examples = numerals.held_out_examples(np.random.default_rng(EVALUATION_SEED), count)
    right = dict.fromkeys(numerals.DIRECTIONS, 0)
    for start in range(0, len(examples), EVALUATION_BATCH):
        part = examples[start : start + EVALUATION_BATCH]
        answers = greedy_answers(model, tokenizer, [example.request for example in part], MAX_NEW_TOKENS)
        for example, answer in zip(part, answers, strict=True):
            right[example.direction] += answer == example.answer
    scores = {direction: Accuracy(right[direction], count) for direction in numerals.DIRECTIONS}
    for direction, score in scores.items():
        logger.info("%s: %s of held-out numbers right", numerals.PROMPTS[direction], score)
    return scores


def write_requests(file: Path) -> None:
    """Write held-out requests with their answers, one a line: what ``cpmbee verify --quality`` reads."""
    examples = numerals.held_out_examples(np.random.default_rng(SAMPLE_SEED), SAMPLE_COUNT)
    lines = [json.dumps(example.solved, ensure_ascii=False) + "\n" for example in examples]
    file.write_text("".join(lines), encoding="utf-8")


def train_demo(out: Path, config: TrainerConfig, batch_size: int, seed: int, eval_count: int) -> None:
    """Train from scratch and write the checkpoint (fp16), its vocabulary, sample requests and model card to ``out``.

    The accuracy in the card is that of the fp16 weights as they were written.
    """
    tokenizer = Tokenizer(vocabulary())
    model = CpmBee(model_config(tokenizer.vocab_size))
    model.init_parameters(torch.Generator().manual_seed(seed))
    batches = training_batches(tokenizer, np.random.default_rng(seed), batch_size)
    result = Trainer(model, config).train(batches)
    save_checkpoint(model.half(), out, overwrite=True)
    (out / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary()), encoding="utf-8")
    write_requests(out / "requests.jsonl")
    card = model_card(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=tokenizer.vocab_size,
        file_bytes=(out / "model.safetensors").stat().st_size,
        steps=config.steps,
        batch_size=batch_size,
        result=result,
        accuracy=evaluate(load_model(out), tokenizer, eval_count),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Parse the command line; train, or measure what is there."""
    parser = argparse.ArgumentParser(prog="python -m cpmbee.train.demo", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in OUT instead of training it")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in OUT")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval-count", type=int, default=4000, help="held-out numbers per direction")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(load_model(args.out), Tokenizer.from_file(args.out / "vocab.txt"), args.eval_count)
        return
    if args.out.exists() and not (args.overwrite and (args.out / "config.json").is_file()):
        parser.error(f"{args.out} exists; --overwrite replaces it if it is a checkpoint")  # now, not after training
    config = TrainerConfig(steps=args.steps, learning_rate=args.learning_rate)
    train_demo(args.out, config, args.batch_size, args.seed, args.eval_count)


if __name__ == "__main__":
    main()
